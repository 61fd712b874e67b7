"""What the token scheduler is worth: the paper's table 2, joint execution beside it, and what could be had at most.

    python -m benchmarks.scheduling                          # simulated, on committed recordings of three Switch models
    python -m benchmarks.scheduling TRACES... --predictor DIR
    python -m benchmarks.scheduling --engine models/tiny-moe --link 20MB/s     # the engine on the clock

Simulated: recorded sequences decode in three units of two batches with continuous refills, over the link of a published
model on an A40 (sim/scheduling.py). `true paths` knows each token's experts beforehand. On the clock: every way runs in
turn in one process on the same prompts, for several rounds, over a link that is slow enough to be the limit.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from benchmarks.common import console, other_load, report
from benchmarks.throughput import PROMPT_TOKENS, prompts_for
from expertflow.disturbance import Watch
from expertflow.predictor.recordings import load_predictors, read_recordings
from expertflow.sim.hardware import costs, hardware
from expertflow.sim.recordings import size_of
from expertflow.sim.scheduling import PARTS, WAYS, compare_scheduling
from expertflow.sim.workload import foretell

ROOT = Path(__file__).parents[1]
SWITCHES = ("switch-32", "switch-64", "switch-128")
COMMITTED = [ROOT / "zoo" / "traces" / name / "chat" for name in SWITCHES]
ASKED = {"switch-32": 1.03, "switch-64": 1.15, "switch-128": 1.17}  # with TS over without: table 2
ASKED_JOINT = 1.3  # of split
ON_THE_CLOCK = {
    "split": ("split", "fixed"),
    "split, TS": ("split", "auto"),
    "joint": ("joint", "fixed"),
    "joint, TS": ("joint", "auto"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="*", type=Path, help="default: chat of three Switch models")
    parser.add_argument("--predictor", nargs="*", default=[], help="trained; then only held-out sequences")
    parser.add_argument("--mixed", action="store_true", help="all recordings given form one queue")
    parser.add_argument("--parts", action="store_true", help="of joint's scheduling, each alone")
    parser.add_argument("--batch", type=int, default=16, help="T; a unit has two batches")
    parser.add_argument("--share", default="0.25,0.5", help="of the experts that have a slot")
    parser.add_argument("--hardware", default="a40")
    parser.add_argument("--steps", type=int, default=120, help="of units, at most; 0 for all")
    parser.add_argument(
        "--engine", nargs="+", type=Path, default=[], help="models to run on the clock instead"
    )
    parser.add_argument("--link", default="20MB/s", help="of the engine")
    parser.add_argument("--units", type=int, default=3, help="of the engine")
    parser.add_argument("--prompts", type=int, default=96, help="of the engine")
    parser.add_argument("--max-tokens", type=int, default=16, help="of the engine")
    parser.add_argument("--rounds", type=int, default=3, help="of the engine")
    parser.add_argument("--quick", action="store_true", help="few steps, one share")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.steps, options.rounds, options.prompts = 24, 1, 24
        options.share = options.share.split(",")[0]
    rows, load = [], other_load()
    if options.engine:
        for model in options.engine:
            rows += on_the_clock(options, model)
    else:
        groups = [options.traces] if options.mixed else [[folder] for folder in options.traces or COMMITTED]
        for folders in groups:
            rows += simulated(options, folders)
    metrics = {"rows": rows, "load_before": load, "threads": 1}
    report("scheduling", metrics, {"true paths": "in the rows"}, judge(rows), 0, options.json)


def simulated(options: argparse.Namespace, folders: list[Path]) -> list[dict[str, Any]]:
    """Of one model's recordings, every share of the experts and predictor."""
    meta, sequences = read_recordings(folders)
    trained = load_predictors(options.predictor, meta, folders)
    warm = [sequence for sequence in sequences if sequence.split == "train"][:64] if trained else []
    if trained:
        sequences = [sequence for sequence in sequences if sequence.split == "test"]
    size, stands_for = size_of(meta, None, None)
    console.print(stands_for)
    cost = costs(hardware(options.hardware), size.expert_bytes, size.dense_bytes)
    found: list[dict[str, Any]] = []
    for name in ["online", *trained]:
        foretold = foretell(meta, sequences, name, trained.get(name), warm)
        for share in map(float, options.share.split(",")):
            rows = compare_scheduling(
                foretold,
                cost,
                share * size.experts,
                options.batch,
                max_steps=options.steps or None,
                ways=[*WAYS, *(PARTS if options.parts else ())],
            )
            of = {"model": meta.model, "recordings": "+".join(f.name for f in folders), "predictor": name}
            found += [of | {"share": share} | row for row in rows]
            console.print(_table(f"{meta.model}, {of['recordings']}, {name}, slots for {share:.0%}", rows))
    return found


def on_the_clock(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """The engine, each way in turn; medians of rounds."""
    from expertflow import LLM, SamplingParams
    from expertflow.engine.engine import Engine

    share = float(options.share.split(",")[0])
    settings: dict[str, Any] = {
        "store": "ram",
        "link": options.link,
        "predictor": "online",
        "context": PROMPT_TOKENS + options.max_tokens,
        "batch": options.batch,
        "sequences": 2 * options.batch * options.units,
    }
    taken: dict[str, list[dict[str, Any]]] = {way: [] for way in ON_THE_CLOCK}
    with LLM(model, cache_size=share * _experts_per_layer(model), **settings) as llm:
        prompts = prompts_for(llm, options.prompts)
        # Answers of different lengths, so that places fall free one by one.
        params = [
            SamplingParams(
                temperature=0.8, seed=number, max_tokens=options.max_tokens - number % 4, ignore_eos=True
            )
            for number in range(len(prompts))
        ]
        for number in range(options.rounds):
            ways = list(ON_THE_CLOCK)
            for way in ways if number % 2 == 0 else reversed(ways):
                execution, schedule = ON_THE_CLOCK[way]
                llm.reset_stats()
                watch, began = Watch(), time.perf_counter()
                with Engine(llm, execution=execution, schedule=schedule) as engine:  # type: ignore[arg-type]
                    outputs = engine.generate(prompts, params)
                    stats = engine.stats
                seconds = time.perf_counter() - began
                tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
                cache = llm.stats
                taken[way].append(
                    {
                        "tokens_per_second": tokens / seconds,
                        "activations_per_token": sum(map(sum, cache.uses_LE)) / tokens,
                        "loads_per_token": sum(map(sum, cache.loads_LE)) / tokens,
                        "hit_ratio": cache.hit_ratio,
                        "stalled": cache.stall_seconds / seconds,
                        "scheduling_share": stats.scheduling_share,
                        "paths_share": stats.paths_share,
                        "regroupings": stats.regroupings,
                        "exchanges": stats.exchanges,
                        "preferred": stats.preferred,
                        "late": stats.late,
                        **watch.so_far().to_dict(),
                    }
                )
                console.print(f"{model.name}, {way}: {taken[way][-1]}", soft_wrap=True)
    rows = []
    for way, runs in taken.items():
        numbers = {key: median(run[key] for run in runs) for key in runs[0] if runs[0][key] is not None}
        rows.append({"model": model.name, "way": way, "share": share, "link": options.link, **numbers})
        rows[-1]["to_split"] = rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"]
    console.print(_table(f"{model.name} on the clock, {options.link}, slots for {share:.0%}", rows))
    return rows


def _experts_per_layer(model: Path) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    return next(
        int(getattr(config, name))
        for name in ("num_experts", "num_local_experts", "n_routed_experts")
        if hasattr(config, name)
    )


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    targets: dict[str, Any] = {}
    for row in rows:
        asked = ASKED.get(row["model"]) if row["way"] == "split, TS" else None
        if row["way"].startswith("joint") and "true" not in row["way"]:
            asked = ASKED_JOINT
        if asked is not None:
            words = (row[key] for key in ("model", "recordings", "predictor", "way", "share") if key in row)
            title = ", ".join(map(str, words))
            targets[title] = {"asked": asked, "got": row["to_split"], "met": row["to_split"] >= asked}
    return targets


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for column in ("way", "tokens/s", "to split", "activations", "loads per token", "hits", "stalled"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        table.add_row(
            row["way"], f"{row['tokens_per_second']:.1f}", f"{row['to_split']:.2f}",
            f"{row['activations_per_token']:.2f}", f"{row['loads_per_token']:.2f}", f"{row['hit_ratio']:.2f}",
            f"{row['stalled']:.0%}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
