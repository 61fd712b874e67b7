"""Fig. 7: throughput of Qwen1.5 with a predictor that was trained on another task."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.paper import fig6, recordings
from benchmarks.paper.item import Item, Part, Result, Row, Say, Section, Settings, Target
from benchmarks.paper.published import published
from benchmarks.paper.simulated import A40, Grid
from benchmarks.paper.units import PIPELINE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL, TRAINED_ON = published("Qwen1.5"), "chat"
# Our recording -> the paper's data set and its best ratio over Cache-MoE, which it has at CS=4, BS=16.
TASKS = {"translation": ("WMT16", 2.18), "math": ("XSUM", 2.21)}
BATCH = 16  # where the paper has its best


def parts(settings: Settings) -> list[Part]:
    for task in TASKS:
        recordings.recording(settings, MODEL.recording, task)
    return [Part(f"{task}, batch {BATCH}", partial(_simulate, settings, task, BATCH)) for task in TASKS]


def _simulate(settings: Settings, task: str, batch: int, say: Say) -> list[Row]:
    rows = fig6.simulate(settings, MODEL, task, batch, say, TRAINED_ON)
    return [row | {"model": _title(task)} for row in rows]


def _title(task: str) -> str:
    return f"{MODEL.name}, {task}"


def conditions(settings: Settings) -> dict[str, Any]:
    predictors = recordings.conditions(settings, [(MODEL.recording, TRAINED_ON)])
    return {
        "hardware": A40,
        "most_steps": fig6.most_steps(MODEL, settings.quick),
        **PIPELINE,
        **predictors,
        "trained on": TRAINED_ON,
    }


def section(result: Result) -> Section:
    grid = Grid(result.rows)
    return Section(
        "Qwen1.5 with a predictor trained on Alpaca: up to 2.18 times Cache-MoE on WMT16 and 2.21 times on "
        "XSUM, at CS = 4 and BS = 16.",
        [
            f"The predictor was trained on {TRAINED_ON}, its online table served nothing of these tasks "
            "before. WMT16 is stood for by translation, XSUM (nothing recorded) by math. As in Fig. 6 "
            "otherwise.",
        ],
        [fig6.table(grid, [_title(task) for task in TASKS])],
        list(_targets(grid)),
    )


def _targets(grid: Grid) -> Iterator[Target]:
    for task, (_, asked) in TASKS.items():
        yield from fig6.up_to(grid, _title(task), asked)


def figures(result: Result) -> dict[str, Figure]:
    return {"fig7-simulated": fig6.bars(Grid(result.rows), [_title(task) for task in TASKS])}


ITEM = Item(
    "fig7",
    "simulated",
    "Fig. 7: throughput with a predictor of another domain",
    conditions,
    parts,
    section,
    figures,
)
