"""Can prediction lose? `plec` against the better of LRU and LFU on every recording, cache size, batch and link.

    python -m benchmarks.never_worse                          # all of zoo/traces; half an hour on one core
    python -m benchmarks.never_worse zoo/traces/switch-32/chat --predictors noise
    python -m benchmarks.never_worse zoo/traces/tiny-moe/chat --predictors zoo/predictors/tiny-moe

Simulated: the engine's own plan and policy on recorded routes. A link is given by its ratio, of the transfers of LRU to
its arithmetic. What is asked: at most 1.02 of the better one's time with predictions, 1.05 where they are noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.common import console, report
from expertflow.sim.compare import simulate
from expertflow.sim.hardware import Costs, costs, hardware
from expertflow.sim.recordings import foretell_all, size_of
from expertflow.sim.workload import Foretold, decode_steps, make_workload
from expertflow.trace import read_trace

ROOT = Path(__file__).parents[1] / "zoo" / "traces"
ASKED, ASKED_OF_NOISE = 1.02, 1.05
PLAIN = ("lru", "lfu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="*", type=Path, help="default: every recording of zoo/traces")
    parser.add_argument("--predictors", nargs="*", default=["online", "noise"])
    parser.add_argument("--cache-size", nargs="*", type=int, default=[4, 8, 16], help="experts per layer")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--ratio", nargs="*", type=float, default=[0.5, 1.0, 4.0])
    parser.add_argument("--split", default="test")
    parser.add_argument("--steps", type=int, default=150, help="of each batch size, at most")
    parser.add_argument("--quick", action="store_true", help="few steps, three batch sizes")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.steps, options.batch = 24, options.batch[:3]
    folders = options.traces or sorted(file.parent for file in ROOT.glob("*/*/routes.trace"))
    for folder in folders:  # before the work, which a wrong one would lose
        if not (folder / "routes.trace").exists():
            parser.error(
                f"{folder} is no recording (routes.trace is missing); give folders such as {ROOT}/*/chat"
            )
    rows: list[dict[str, Any]] = []
    for folder in folders:
        found = list(cells(options, folder))
        console.print(_table(f"{folder.parent.name}, {folder.name}", found))
        rows += found
    report("never_worse", {"rows": rows}, {}, judge(rows), 0, options.json)


def cells(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Every cache size, batch and link of one recording; a cache that holds all experts decides nothing."""
    trace = read_trace(folder, weights=False)
    size, _ = size_of(trace.meta, None, None)
    foretold = foretell_all(trace, folder, options.split, options.predictors, warm=64)
    known = foretold.pop("oracle")
    decoding = sum(decode_steps(sequence) > 0 for sequence in known.sequences)
    given = costs(hardware("a40"), size.expert_bytes, size.dense_bytes)
    for batch in options.batch:
        if batch > decoding:
            continue
        for cache_size in options.cache_size:
            if cache_size < size.experts:
                of = {
                    "model": trace.meta.model,
                    "task": folder.name,
                    "batch": batch,
                    "cache_size": cache_size,
                }
                for cell in one_cache(options, known, foretold, given, batch, cache_size):
                    yield of | cell


def one_cache(
    options: argparse.Namespace,
    known: Foretold,
    foretold: dict[str, Foretold],
    given: Costs,
    batch: int,
    cache_size: int,
) -> Iterator[dict[str, Any]]:
    workloads = {
        name: make_workload(said, batch, options.steps) for name, said in {**foretold, "": known}.items()
    }
    plain = workloads[""]
    num_slots = cache_size * plain.shape.num_layers
    # What LRU loads hardly depends on how long it takes.
    lru = simulate("lru", plain, num_slots, given)
    for ratio in options.ratio:
        cost = replace(given, chunk_s=ratio * lru.compute_seconds / lru.loads / given.chunks)
        best = {name: simulate(name, plain, num_slots, cost) for name in PLAIN}
        name = min(best, key=lambda name: best[name].seconds)
        for predictor in foretold:
            plec = simulate("plec", workloads[predictor], num_slots, cost)
            yield {
                "ratio": ratio,
                "predictor": predictor,
                "steps": plec.passes,
                "better": name,
                "to_better": plec.seconds / best[name].seconds,
                "to_lru": plec.seconds / best["lru"].seconds,
                "bytes_to_better": plec.loads / best[name].loads,
                "hits": plec.hit_ratio,
                "hits_of_better": best[name].hit_ratio,
            }


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each predictor and recording its worst cell."""
    worst: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["model"], row["task"], row["predictor"]
        if key not in worst or row["to_better"] > worst[key]["to_better"]:
            worst[key] = row
    targets = {}
    for key, row in worst.items():
        asked = ASKED_OF_NOISE if row["predictor"] == "noise" else ASKED
        at = {name: row[name] for name in ("batch", "cache_size", "ratio", "better")}
        got = row["to_better"]
        targets[", ".join(key)] = {"asked": asked, "got": got, "met": got <= asked, "at": at}
    return targets


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{title}: time of plec to the better of LRU and LFU")
    predictors = list(dict.fromkeys(row["predictor"] for row in rows))
    for column in ("batch", "cache size", "ratio", *predictors, *(f"bytes, {name}" for name in predictors)):
        table.add_column(column, justify="right")
    for first in range(0, len(rows), len(predictors)):
        row, told = rows[first], rows[first : first + len(predictors)]
        table.add_row(
            str(row["batch"]), str(row["cache_size"]), f"{row['ratio']:g}",
            *(f"{one['to_better']:.3f}" for one in told), *(f"{one['bytes_to_better']:.2f}" for one in told),
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
