"""Policies on the clock where the link is the limit: the engine over a throttled link, beside what could be had.

    python -m benchmarks.link_bound           # the embedded model, 48 runs: about ten minutes
    python -m benchmarks.link_bound --quick   # ratio 1, 8 experts per layer, a third of the steps

The link is such that lru's transfers take `ratio` times its arithmetic. Every policy runs the same text, so the routes
are the same, and the simulator's bounds are for these routes: belady (the fewest bytes anyone can move),
belady-prefetch (all the future known), plec told this pass as it will be (oracle). The gate that would stop
prefetching where it does not pay is left open, since here that is the question.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from benchmarks.common import console, other_load, report
from benchmarks.on_the_clock import TINY, Case, Run, bandwidth_for, calibrate, over_link, run, simulate
from expertflow.cache.policies import Forecast
from expertflow.config import format_bandwidth
from expertflow.sim.clock import Outcome, Pass
from expertflow.sim.hardware import Costs

AIM = 1.02  # of the better of lru and lfu, with predictions
CALIBRATED_AT = 12.0
COLUMNS = (
    "policy (predictor)",
    "ms/step",
    "to lru",
    "hits",
    "kB/step",
    "stall",
    "link busy",
    "stolen",
    "others",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one ratio, one cache size, a third of the steps"
    )
    parser.add_argument(
        "--predictor", type=Path, default=None, help="a trained predictor's folder, beside online"
    )
    parser.add_argument("--ratios", default="0.5,1,4", help="of lru's transfers to its arithmetic")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--cache-sizes", default="8,16", help="of 32 experts per layer")
    parser.add_argument("--steps", type=int, default=192, help="decode steps of each run")
    parser.add_argument("--threads", type=int, default=1, help="of arithmetic; the loader has one of its own")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ratios, batches, sizes = (
        [float(number) for number in text.split(",")]
        for text in (options.ratios, options.batches, options.cache_sizes)
    )
    steps = options.steps
    if options.quick:
        ratios, sizes, steps = ratios[len(ratios) // 2 :][:1], sizes[:1], max(16, steps // 3)
    load, rows = other_load(), []
    predictors = ["online", *map(str, trained(options.predictor))]
    for batch in map(int, batches):
        console.print(f"batch {batch}: calibrating ...")
        costs, (free, *_) = calibrate(TINY, batch, [], steps, CALIBRATED_AT)
        for size in sizes:
            for ratio in ratios:
                link = bandwidth_for(ratio, free, costs["on demand"], round(size * free.shape.num_layers))
                rows += compare(batch, size, ratio, link, predictors, costs["on demand"], steps)
    metrics = {"runs": rows, "load_before": load, "threads": options.threads, "steps": steps}
    report("link_bound", metrics, {"simulated": "in the runs"}, targets(rows), 0, options.json)


def trained(given: Path | None) -> list[Path]:
    """Predictors of the embedded model: the one that was given, else those that lie beside it."""
    if given is not None:
        return [given]
    return sorted(path.parent for path in TINY.parent.glob("tiny-moe*/**/predictor.json"))


def compare(
    batch: int, size: float, ratio: float, link: int, predictors: Sequence[str], costs: Costs, steps: int
) -> list[dict[str, Any]]:
    """Every policy under one condition, and the bounds for its routes."""
    title = f"batch {batch}, {size:g} experts per layer, ratio {ratio:g}: a link of {format_bandwidth(link)}"
    console.print(f"{title} ...")
    cases = [Case(policy, batch, size, "none", link) for policy in ("lru", "lfu", "cache-moe")]
    cases += [Case("plec", batch, size, predictor, link) for predictor in predictors]
    runs = [run(TINY, case, steps, part=1) for case in cases]
    lru, foretold = runs[0], runs[3]
    rows = [{"kind": "measured", "ratio": ratio, **asdict(one.case), **one.measures()} for one in runs]
    costs = over_link(costs, lru)
    for policy, passes in (
        ("lru", None),
        ("belady", None),
        ("belady-prefetch", None),
        ("plec", oracle(foretold)),
    ):
        outcome = simulate(lru, costs, policy, passes)
        case = replace(lru.case, policy=policy, predictor="oracle" if passes is not None else "none")
        rows.append({"kind": "simulated", "ratio": ratio, **asdict(case), **_simulated(outcome, lru)})
    for row in rows:
        base = rows[0] if row["kind"] == "measured" else rows[len(runs)]
        row["time_to_lru"] = row["step_seconds"] / base["step_seconds"]
    console.print(_table(title, rows))
    return rows


def oracle(foretold: Run) -> list[Pass]:
    """The run's passes with what they need known beforehand; of what comes after them, what the predictor said."""
    passes = []
    for step in foretold.passes:
        experts_L = foretold.shape.experts_per_layer
        now_LE = [
            [float(expert in set(chosen)) for expert in range(experts)]
            for chosen, experts in zip(step.experts_L, experts_L, strict=True)
        ]
        later_LE = step.forecast.later_LE if step.forecast is not None else None
        passes.append(Pass(step.experts_L, Forecast(now_LE, later_LE)))
    return passes


def _simulated(outcome: Outcome, of: Run) -> dict[str, Any]:
    return {
        "step_seconds": outcome.seconds / outcome.passes,
        "hit_ratio": round(outcome.hit_ratio, 4),
        "bytes_per_step": round(outcome.loads * of.expert_bytes / outcome.passes),
        "stall_seconds": outcome.stall_seconds / outcome.passes,
        "link_busy": round(outcome.link_seconds / outcome.seconds, 4),
    }


def targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """plec with the online table against the better of lru and lfu, worst condition; null where disturbed."""
    measured = [row for row in rows if row["kind"] == "measured"]
    by_condition: dict[tuple, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in measured:
        condition = row["batch"], row["cache_size"], row["ratio"]
        by_condition.setdefault(condition, {})[row["policy"], row["predictor"]] = row
    worst = max(
        found["plec", "online"]["step_seconds"]
        / min(found[name, "none"]["step_seconds"] for name in ("lru", "lfu"))
        for found in by_condition.values()
    )
    quiet = not any(row["disturbed"] or row["stolen"] is None for row in measured)
    return {
        "plec_online_to_best_on_demand": {"asked": AIM, "got": worst, "met": worst <= AIM if quiet else None}
    }


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right", no_wrap=True)
    kind = rows[0]["kind"]
    for row in rows:
        if row["kind"] != kind:
            kind = row["kind"]
            table.add_section()
        name = (
            row["policy"]
            if row["predictor"] == "none"
            else f"{row['policy']} ({Path(row['predictor']).name})"
        )
        table.add_row(
            name if kind == "measured" else f"{name}, simulated",
            f"{row['step_seconds'] * 1e3:.2f}",
            f"{row['time_to_lru']:.2f}",
            f"{row['hit_ratio']:.3f}",
            f"{row['bytes_per_step'] / 1e3:.0f}",
            f"{row['stall_seconds'] / row['step_seconds']:.0%}",
            f"{row['link_busy']:.0%}",
            *("" if row.get(key) is None else f"{row[key]:.0%}" for key in ("stolen", "others")),
        )
    return table


if __name__ == "__main__":
    main()
