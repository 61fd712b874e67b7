"""Does the simulator tell the truth? Its prediction beside the engine's time on the clock, for 12 runs.

    python -m benchmarks.simulator_accuracy           # the embedded model: a few minutes
    python -m benchmarks.simulator_accuracy --quick   # a third of the steps
    python -m benchmarks.simulator_accuracy --model out/qwen  # a model with large experts as well

Experts are in RAM behind a throttled link. Costs of the virtual clock come from other runs: other texts, another
cache size, another link (see `calibration` in the JSON). Predicted runs give their routes and what the predictor
said of them, and no time, but for their pace: how long another model instance takes for steps of its own between
theirs, since a virtual machine's processor changes its speed from run to run (`pace.py`; in the table relative to
the calibration's). A run beside which others had the processors is called neither a success nor a failure.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from benchmarks.common import console, other_load, report
from benchmarks.on_the_clock import (
    TINY,
    Case,
    Run,
    bandwidth_for,
    calibrate,
    over_link,
    run,
    simulate,
    texts,
)
from benchmarks.pace import Gauge, at_pace
from expertflow.config import format_bandwidth
from expertflow.sim.hardware import Costs

TOLERANCE = 0.15
BATCHES = (1, 4)
POLICIES = (("lru", "none"), ("lfu", "none"), ("plec", "online"))
SHARES_AND_RATIOS = ((1 / 4, 0.5), (1 / 2, 1), (1 / 4, 4), (1 / 2, 0.5), (1 / 4, 1), (1 / 2, 4))
COLUMNS = (
    *("policy", "batch", "slots", "ratio", "link", "ms/step", "predicted", "error"),
    *("hits", "pace", "stolen / others"),
)
GAUGE_TOKENS = 48  # of each row's text
CALIBRATED_AT = 3 / 8  # share of the experts that fits, of no run that is predicted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a third of the steps")
    parser.add_argument("--model", type=Path, default=None, help="a folder with another model, run as well")
    parser.add_argument("--steps", type=int, default=192, help="decode steps of each run")
    parser.add_argument("--threads", type=int, default=1, help="of arithmetic; the loader has one of its own")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = max(16, options.steps // 3) if options.quick else options.steps
    load = other_load()
    folders = [TINY]
    if options.model is not None:
        if not options.model.is_dir():
            raise SystemExit(
                f"--model {options.model} is no folder; give one with a checkpoint and a tokenizer"
            )
        folders.append(options.model)
    models = {folder.name: compare(folder, steps) for folder in folders}
    rows = [row for found in models.values() for row in found["runs"]]
    metrics = {"models": models, "load_before": load, "threads": options.threads, "steps": steps}
    report("simulator_accuracy", metrics, {"perfect_prediction": 0.0}, targets(rows), 0, options.json)


def targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Met when every run is within the tolerance; null as long as a run was disturbed."""
    quiet = [row for row in rows if not row["disturbed"] and row["stolen"] is not None]
    worst = max((abs(row["error"]) for row in quiet), default=None)
    met: bool | None = worst is not None and worst <= TOLERANCE
    if len(quiet) < len(rows) and (met or worst is None):
        met = None
    return {
        "worst_error": {
            "asked": TOLERANCE,
            "got": worst,
            "met": met,
            "runs": len(rows),
            "undisturbed_runs": len(quiet),
            "worst_of_all": max(abs(row["error"]) for row in rows),
        }
    }


def cases() -> Iterator[tuple[str, str, int, float, float]]:
    """(policy, predictor, batch, share that fits, ratio) of the 12 runs: every policy meets every ratio, and each
    share with each ratio comes up twice."""
    groups = [(policy, predictor, batch) for policy, predictor in POLICIES for batch in BATCHES]
    for number, group in enumerate(groups):
        for place in (number, (number + 1) % len(SHARES_AND_RATIOS)):
            yield *group, *SHARES_AND_RATIOS[place]


def compare(folder: Path, steps: int) -> dict[str, Any]:
    layer_experts = _experts_per_layer(folder)
    at = CALIBRATED_AT * layer_experts
    table = Table(
        title=f"{folder.name}: predicted and measured, {steps} steps each",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in COLUMNS:
        table.add_column(column, justify="right")
    rows, calibrations = [], {}
    for batch in BATCHES:
        console.print(f"{folder.name}, batch {batch}: calibrating ...")
        with Gauge(folder, batch, at, GAUGE_TOKENS) as gauge:
            gauge.read(texts(gauge.llm, batch, GAUGE_TOKENS, part=0))
            costs, runs = calibrate(folder, batch, ["online"], steps, at, gauge)
            calibrations[str(batch)] = _calibration(costs, runs)
            for case in cases():
                if case[2] == batch:
                    rows.append(_compare(folder, case, layer_experts, steps, costs, runs[0], gauge))
                    _add(table, rows[-1])
    console.print(table)
    return {"runs": rows, "calibration": calibrations}


def _compare(
    folder: Path,
    case: tuple[str, str, int, float, float],
    layer_experts: int,
    steps: int,
    costs: dict[str, Costs],
    free: Run,
    gauge: Gauge,
) -> dict[str, Any]:
    """One run of the engine and what was predicted of it."""
    policy, predictor, batch, share, ratio = case
    cache_size = share * layer_experts
    slots = round(cache_size * free.shape.num_layers)
    link = bandwidth_for(ratio, free, at_pace(costs["on demand"], free.pace), slots)
    console.print(f"{policy}, batch {batch}, {cache_size:g} per layer, ratio {ratio:g} ...")
    measured = run(folder, Case(policy, batch, cache_size, predictor, link), steps, 1, gauge)
    own = at_pace(costs[measured.case.family], measured.pace)
    predicted = simulate(measured, over_link(own, measured))
    return {
        **asdict(measured.case),
        "ratio": ratio,
        **measured.measures(),
        "pace": measured.pace / free.pace,
        "predicted_step_seconds": predicted.seconds / predicted.passes,
        "predicted_hit_ratio": round(predicted.hit_ratio, 4),
        "predicted_bytes_per_step": round(predicted.loads * measured.expert_bytes / predicted.passes),
        "predicted_stall_seconds": predicted.stall_seconds / predicted.passes,
        "error": predicted.seconds / measured.seconds - 1,
    }


def _experts_per_layer(folder: Path) -> int:
    from expertflow.engine.llm import LLM

    with LLM(folder, cache_size=2, context=64) as llm:
        return max(llm.experts.cache.shape.experts_per_layer)


def _calibration(costs: dict[str, Costs], runs: list[Run]) -> dict[str, Any]:
    measured = [{**asdict(one.case), **one.measures()} for one in runs]
    return {"costs": {family: asdict(cost) for family, cost in costs.items()}, "runs": measured}


def _add(table: Table, row: dict[str, Any]) -> None:
    stolen, others = ("?" if row[key] is None else f"{row[key]:.0%}" for key in ("stolen", "others"))
    table.add_row(
        row["policy"], str(row["batch"]), f"{row['cache_size']:g}", f"{row['ratio']:g}",
        format_bandwidth(row["bytes_per_s"]), f"{row['step_seconds'] * 1e3:.2f}",
        f"{row['predicted_step_seconds'] * 1e3:.2f}",
        f"{row['error']:+.0%}" + (" (disturbed)" if row["disturbed"] else ""),
        f"{row['hit_ratio']:.2f}", f"{row['pace']:.2f}", f"{stolen} / {others}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
