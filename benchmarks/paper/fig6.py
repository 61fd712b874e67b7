"""Fig. 6: throughput of six models over cache sizes and batch sizes, against the paper's rivals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.paper import recordings
from benchmarks.paper.item import Item, Part, Result, Row, Say, Section, Settings, Table, Target
from benchmarks.paper.published import MODELS, Published
from benchmarks.paper.simulated import (
    A40,
    BEST_GROUPED,
    BEST_JOINT,
    CACHE_MOE,
    CACHE_MOE_BOTH,
    GROUPED,
    JOINT,
    ON_DEMAND,
    PREGATED,
    SE_MOE,
    SPLIT,
    Grid,
    compared,
    systems_for,
)
from benchmarks.paper.units import PIPELINE
from expertflow.sim.hardware import hardware

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCHES, CACHE_SIZES, MIXTRAL_CACHE_SIZES = (8, 16, 32), (4, 8, 16), (1, 2, 4)
MOST_STEPS = 24  # of each answer
# A pass through so many layers takes the simulator seconds, so such a model is simulated for fewer of them.
DEEP, DEEP_STEPS, DEEP_SEQUENCES = 24, 12, 64
QUICK_BATCHES, QUICK_STEPS = (8, 32), 6
OVER_SE_MOE = {
    ("Switch-32", 16): 2.01,
    ("Switch-64", 16): 3.19,
    ("Switch-128", 16): 5.86,
    ("Switch-128", 4): 9.99,
}
OVER_CACHE_MOE = {"Mixtral-8": 1.99, "Qwen1.5": 2.12, "DeepSeek-MoE": 1.94}
BOUND = "belady-prefetch"  # with our grouping, or joint
SHOWN = (CACHE_MOE, SE_MOE, PREGATED, ON_DEMAND, SPLIT, GROUPED, JOINT)
PAPER = (
    "at 16 experts per layer (CS) and batches of 32 (BS), 2.01, 3.19 and 5.86 times SE-MoE on Switch-32, "
    "-64 and -128, 9.99 times at CS = 4 on the last; up to 1.99, 2.12 and 1.94 times Cache-MoE on "
    "Mixtral-8, Qwen1.5 and DeepSeek-MoE."
)


def cache_sizes(model: Published, quick: bool) -> Sequence[int]:
    sizes = MIXTRAL_CACHE_SIZES if model.in_paper.experts == 8 else CACHE_SIZES
    return (sizes[0], sizes[-1]) if quick or is_deep(model) else sizes


def is_deep(model: Published) -> bool:
    return model.in_paper.layers >= DEEP


def most_steps(model: Published, quick: bool) -> int:
    return QUICK_STEPS if quick else DEEP_STEPS if is_deep(model) else MOST_STEPS


def part_key(model: Published, what: str, quick: bool) -> str:
    return f"{what}, {DEEP_STEPS} steps of {DEEP_SEQUENCES}" if is_deep(model) and not quick else what


def parts(settings: Settings) -> list[Part]:
    for model in MODELS:
        recordings.recording(
            settings, model.recording, model.task
        )  # all or none: say at once what is missing
    batches = QUICK_BATCHES if settings.quick else BATCHES
    return [
        Part(
            part_key(model, f"{model.name}, batch {batch}", settings.quick),
            partial(simulate, settings, model, model.task, batch),
        )
        for model in MODELS
        for batch in batches
    ]


def simulate(
    settings: Settings, model: Published, task: str, batch: int, say: Say, trained_on: str | None = None
) -> list[Row]:
    foretold = recordings.told(settings, model.recording, task, say, trained_on)["ours"]
    sizes, steps = cache_sizes(model, settings.quick), most_steps(model, settings.quick)
    sequences = DEEP_SEQUENCES if is_deep(model) else None
    return compared(model, foretold, batch, sizes, hardware(A40), systems_for(model), steps, sequences)


def conditions(settings: Settings) -> dict[str, Any]:
    predictors = recordings.conditions(settings, [(model.recording, model.task) for model in MODELS])
    return {
        "hardware": A40,
        "most_steps": QUICK_STEPS if settings.quick else MOST_STEPS,
        **PIPELINE,
        **predictors,
    }


def section(result: Result) -> Section:
    grid = Grid(result.rows)
    return Section(
        PAPER,
        [*notes(result), *_both_batches(grid)],
        [table(grid, [model.name for model in MODELS])],
        list(_targets(grid)),
    )


def notes(result: Result) -> list[str]:
    ratios = [row["transfer_to_compute"] for row in result.rows if row["system"] == ON_DEMAND]
    return [
        f"Decode only, the first {result.conditions['most_steps']} tokens of held-out answers "
        f"({DEEP_STEPS} of {DEEP_SEQUENCES} sequences for models of {DEEP} layers and more); predictors: "
        f"{result.conditions['predictor']}. WMT16 is stood for by recorded translation, Alpaca by chat, "
        "AIME2024 by math, and XSUM, of which nothing was recorded, by chat. On the profile "
        f"{result.conditions['hardware']} (25 GB/s, 696 GB/s, 0.1 ms per expert, from data sheets) the "
        f"transfers of LRU take {min(ratios):.1f} to {max(ratios):.1f} times its arithmetic.",
        "SE-MoE is whichever is faster, whole layers streamed through the slots there are or through a ring of two "
        "whole layers, even where that is more memory; Pregated-MoE predicts with our predictor, and its router "
        "corrects it. TS: two batches take turns and are grouped anew before each step; joint: they meet at every "
        "MoE layer, so that an expert is loaded once for both. Ours holds two batches in either case, as the paper's "
        "pipeline does; a rival holds one. Bound: belady-prefetch, which knows all that comes.",
    ]


def _both_batches(grid: Grid) -> Iterator[str]:
    """What a rival would gain by the same two batches."""
    ratios = [ratio for c in grid.by if (ratio := grid.faster(c, JOINT, CACHE_MOE_BOTH)) is not None]
    if ratios:
        yield (
            "Given both batches as one of twice the size, Cache-MoE is closer: joint is then "
            f"{min(ratios):.2f} to {max(ratios):.2f} times as fast."
        )


def table(grid: Grid, models: Sequence[str]) -> Table:
    header = (
        "",
        "CS",
        "BS",
        *(name.removeprefix("ours, ") for name in SHOWN),
        "bound, TS",
        "bound, joint",
        "ratio",
    )
    rows = []
    for model in models:
        for condition in sorted(grid.conditions(model), key=lambda c: (c[2], c[1])):
            found = grid.by[condition]
            cells = [_rate(found.get(name)) for name in (*SHOWN, BEST_GROUPED, BEST_JOINT)]
            ratio = f"{found[ON_DEMAND]['transfer_to_compute']:.1f}"
            rows.append((model, f"{condition[2]:g}", f"{condition[1]:g}", *cells, ratio))
    return Table(
        "Tokens per second; from `on demand` to `joint` ours; bound: knows all that comes, with our grouping",
        header,
        rows,
    )


def _rate(row: Row | None) -> str:
    return (
        ""
        if row is None
        else f"{row['tokens_per_s']:.3g}"
        if row["tokens_per_s"] < 100
        else f"{row['tokens_per_s']:.0f}"
    )


def _targets(grid: Grid) -> Iterator[Target]:
    for (model, size), asked in OVER_SE_MOE.items():
        condition = (model, 32, size)
        got = grid.faster(condition, GROUPED, SE_MOE)
        if got is not None:
            bound = max(grid.faster(condition, best, SE_MOE) or 0.0 for best in (BEST_GROUPED, BEST_JOINT))
            at = "TS, batches in turn, as the paper runs them"
            yield Target(f"{model} over SE-MoE, CS={size}, BS=32", asked, got, "x", at, bound, BOUND)
    for model, asked in OVER_CACHE_MOE.items():
        yield from up_to(grid, model, asked)


def up_to(grid: Grid, model: str, asked: float) -> Iterator[Target]:
    """The best ratio over Cache-MoE, for batches in turn and for joint ones; the bound is that of either."""
    bounds = [grid.best(model, best, CACHE_MOE) for best in (BEST_GROUPED, BEST_JOINT)]
    bound = max((found[0] for found in bounds if found is not None), default=None)
    for system, how in ((GROUPED, "TS"), (JOINT, "joint")):
        got = grid.best(model, system, CACHE_MOE)
        if got is not None:
            at = f"CS={got[1][2]:g}, BS={got[1][1]:g}"
            yield Target(f"{model} over Cache-MoE, up to, {how}", asked, got[0], "x", at, bound, BOUND)


def figures(result: Result) -> dict[str, Figure]:
    return {f"{result.name}-{result.mode}": bars(Grid(result.rows), [model.name for model in MODELS])}


def bars(grid: Grid, models: Sequence[str]) -> Figure:
    """Models side by side, the smallest cache above the largest."""
    from benchmarks.paper import style

    shown = {
        CACHE_MOE: style.ORANGE, SE_MOE: style.PINK, PREGATED: style.YELLOW, ON_DEMAND: style.SKY,
        GROUPED: style.BLUE, JOINT: style.GREEN, BEST_JOINT: style.BLACK,
    }  # fmt: skip
    models = [model for model in models if grid.conditions(model)]
    figure, axes = style.new_figure(len(models), 2, width=2.5, height=2.1)
    for column, model in enumerate(models):
        sizes = sorted({condition[2] for condition in grid.conditions(model)})
        for row, size in enumerate((sizes[0], sizes[-1])):
            panel = axes[row][column]
            batches = sorted({c[1] for c in grid.conditions(model) if c[2] == size})
            heights = {
                name: [_height(grid, (model, batch, size), name) for batch in batches]
                for name in shown
                if name in grid.by[model, batches[0], size]
            }
            style.grouped_bars(panel, [f"{batch:g}" for batch in batches], heights, shown)
            panel.set_title(f"{model}, CS={size:g}")
            if row:
                panel.set_xlabel("batch")
            if not column:
                panel.set_ylabel("tokens per second")
    style.legend_above(figure, axes[0][0], columns=len(shown))
    return figure


def _height(grid: Grid, condition: tuple[str, float, float], system: str) -> float | None:
    row = grid.by.get(condition, {}).get(system)
    return None if row is None else row["tokens_per_s"]


ITEM = Item("fig6", "simulated", "Fig. 6: throughput", conditions, parts, section, figures)
