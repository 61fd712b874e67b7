"""Table 2: what the token scheduler is worth, on Switch with 32, 64 and 128 experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.paper import recordings
from benchmarks.paper.item import Item, Part, Result, Row, Say, Section, Settings, Table, Target
from benchmarks.paper.published import Published, published
from benchmarks.paper.simulated import A40, measures, slots
from benchmarks.paper.units import PIPELINE, Way, unit_workload
from expertflow.sim.compare import simulate
from expertflow.sim.hardware import costs, hardware, model_size

# Tokens per second without and with the scheduler.
IN_PAPER = {"Switch-32": (854.19, 881.91), "Switch-64": (680.72, 788.30), "Switch-128": (628.36, 735.35)}
UP_TO = 16.19  # per cent, in the abstract
# The paper does not name its batch; the more rows, the more there is to group.
BATCHES, QUICK_BATCHES, CACHE_SIZES, MAX_STEPS, QUICK_STEPS = (8, 16, 32, 64), (32,), (4, 16), 24, 8
WAYS: dict[str, Way] = {"without TS": "split", "with TS": "grouped", "true paths": "known", "joint": "joint"}
PAPER = (
    "854.19 to 881.91 tokens/s on Switch-32 (1.03x), 680.72 to 788.30 on Switch-64 (1.15x by its own "
    "rounding), 628.36 to 735.35 on Switch-128 (1.17x); the abstract says up to 16.19 %. Cache size "
    "and batch are not given."
)


def parts(settings: Settings) -> list[Part]:
    models = [published(name) for name in IN_PAPER]
    for model in models:
        recordings.recording(settings, model.recording, model.task)
    return [
        Part(f"{model.name}, batch {batch}", partial(_simulate, settings, model, batch))
        for model in models
        for batch in _batches(settings)
    ]


def _batches(settings: Settings) -> Sequence[int]:
    return QUICK_BATCHES if settings.quick else BATCHES


def _simulate(settings: Settings, model: Published, batch: int, say: Say) -> list[Row]:
    foretold = recordings.told(settings, model.recording, model.task, say)["ours"]
    size = model_size(model.size)
    cost = costs(hardware(A40), size.expert_bytes, size.dense_bytes)
    steps = QUICK_STEPS if settings.quick else MAX_STEPS
    rows = []
    for name, way in WAYS.items():
        workload = unit_workload(foretold, batch, way, steps)
        used = sum(len(experts) for step in workload.passes for experts in step.experts_L)
        for cache_size in CACHE_SIZES:
            outcome = simulate("plec", workload, slots(workload, cache_size), cost)
            row = {
                "model": model.name,
                "batch": batch,
                "cache_size": cache_size,
                "way": name,
                "activated": used,
            }
            rows.append(row | measures(workload, outcome, size.expert_bytes))
    return rows


def conditions(settings: Settings) -> dict[str, Any]:
    predictors = recordings.conditions(
        settings, [(published(n).recording, published(n).task) for n in IN_PAPER]
    )
    steps = QUICK_STEPS if settings.quick else MAX_STEPS
    batches = _batches(settings)
    return {"hardware": A40, "max_steps": steps, "batches": list(batches), **PIPELINE, **predictors}


def section(result: Result) -> Section:
    found = _found(result)
    rows = []
    for model, batch, size in dict.fromkeys(key[:3] for key in found):
        without, *others = (found[model, batch, size, way] for way in WAYS)
        rows.append(
            (
                *(model, f"{size}", f"{batch}", f"{without['tokens_per_s']:.0f}"),
                *(f"{row['tokens_per_s']:.0f} ({_gain(row, without):.2f}x)" for row in others),
                f"{1 - others[0]['activated'] / without['activated']:.1%}",
            )
        )
    header = ("", "CS", "BS", *WAYS, "fewer experts activated")
    return Section(
        PAPER,
        [
            "Tokens per second on an A40's data sheet. Without TS the two batches of a unit take turns as "
            "they arrived; with it they are grouped anew before each step by predicted paths "
            f"({result.conditions['predictor']}); by true paths, what a perfect predictor would gain; "
            "joint, what meeting at every layer gains instead. Grouping itself is hidden behind the other "
            "unit and costs nothing here.",
        ],
        [Table("Tokens per second and gain", header, rows)],
        list(_targets(found)),
    )


def _gain(row: Row, without: Row) -> float:
    return row["tokens_per_s"] / without["tokens_per_s"]


def _found(result: Result) -> dict[tuple, Row]:
    return {(row["model"], row["batch"], row["cache_size"], row["way"]): row for row in result.rows}


def _targets(found: dict[tuple, Row]) -> Iterator[Target]:
    """The best of our conditions against the paper's one, since it does not name its own."""

    def gain(condition: tuple, way: str) -> float:
        return 100 * (_gain(found[(*condition, way)], found[(*condition, "without TS")]) - 1)

    def target(name: str, asked: float, here: Sequence[tuple], label: str = "") -> Target:
        best = max(here, key=lambda c: gain(c, "with TS"))
        bound = max(gain(c, "true paths") for c in here)
        at = f"{label}CS={best[2]}, BS={best[1]}"
        return Target(name, asked, gain(best, "with TS"), "%", at, bound, "grouping by true paths")

    conditions = [key[:3] for key in found if key[3] == "with TS"]
    if conditions:
        model = max(conditions, key=lambda c: gain(c, "with TS"))[0]
        yield target("gain of TS, up to", UP_TO, conditions, f"{model}, ")
    for model, (without, with_ts) in IN_PAPER.items():
        if here := [condition for condition in conditions if condition[0] == model]:
            yield target(f"{model}, gain of TS", 100 * (with_ts / without - 1), here)


ITEM = Item("table2", "simulated", "Table 2: the token scheduler", conditions, parts, section)
