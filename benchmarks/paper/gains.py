"""What is varied, and what the rows say of it: sentences, tables and figures, made of the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.paper.item import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINKS = (1, 2, 4, 8, 16, 25, 32, 64)  # GB/s
EXPERT_MB = (1, 4, 17.3, 64, 350)  # Switch's is 18.9 in float32, Mixtral's 352
EXPERTS = (8, 16, 32, 60, 128, 256, 512)
BATCHES, DRAWN_BATCHES = (1, 2, 4, 8, 16, 32, 64), (32, 128, 256)
SWAPS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
FAST_LINK = 64  # GB/s: where loads take little longer than arithmetic
RECORDED, DRAWN = "recorded", "synthetic"
LRU, CACHE_MOE, OURS, ORACLE, BOUND = "lru", "cache-moe", "plec, predicted", "plec, oracle", "belady-prefetch"


@dataclass(frozen=True)
class Axis:
    """One thing that is varied. quick: every so many values."""

    name: str
    title: str
    unit: str
    values: Sequence[float]

    def chosen(self, quick: bool) -> Sequence[float]:
        return self.values[:: max(1, len(self.values) // 3)] if quick else self.values


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("link", "The link from slow to fast memory", "GB/s", LINKS),
        Axis("expert", "The size of an expert", "MB", EXPERT_MB),
        Axis("experts", "Experts per layer", "experts", EXPERTS),
        Axis("batch", "Sequences that decode together", "sequences", sorted({*BATCHES, *DRAWN_BATCHES})),
        Axis("predictor", "How good the predictor is", "of the named experts wrong", SWAPS),
        Axis(
            "predictor-fast",
            f"How good the predictor is, over {FAST_LINK} GB/s",
            "of the named experts wrong",
            SWAPS,
        ),
    )
}


def of_predictor(axis: str) -> bool:
    """Whether the predictor is varied, and not what it runs on."""
    return axis.startswith("predictor")


def gains(rows: Sequence[Row], axis: str, source: str, system: str) -> list[tuple[float, float]]:
    """(value, how many times as fast as LRU), by value."""
    wanted = (axis, source, system)
    found = [(r["value"], r["gain"]) for r in rows if (r["axis"], r["source"], r["system"]) == wanted]
    return sorted(found)


HELPS, HARDLY = 1.10, 1.02  # times as fast as LRU


def sentences(rows: Sequence[Row], axis: Axis) -> list[str]:
    """What the numbers say of one axis, in words."""
    said = []
    for source in (RECORDED, DRAWN):
        ours = gains(rows, axis.name, source, OURS)
        bound = dict(gains(rows, axis.name, source, BOUND))
        if not ours:
            continue
        best, worst = max(ours, key=lambda pair: pair[1]), min(ours, key=lambda pair: pair[1])
        label = "On synthetic routes p" if source == DRAWN else "P"
        text = (
            f"{label}rediction is worth most at {best[0]:g} {axis.unit} ({best[1]:.2f} times as fast as LRU)"
        )
        if worst[1] < HARDLY:
            text += f" and least at {worst[0]:g} ({worst[1]:.2f})"
            if bound[worst[0]] < HELPS:
                text += f", where knowing all that comes would give no more than {bound[worst[0]]:.2f}"
        else:
            text += f", and never less than {worst[1]:.2f} (at {worst[0]:g})"
        said.append(text + ".")
        if helped := [f"{value:g}" for value, gain in ours if gain >= HELPS]:
            said.append(f"A tenth faster or more: at {', '.join(helped)}.")
        if lost := [f"{value:g} ({gain:.2f})" for value, gain in ours if gain < 1]:
            said.append(f"Slower than LRU: at {', '.join(lost)}.")
    return said


BINS: tuple[tuple[float, float], ...] = ((0, 0.5), (0.5, 1), (1, 2), (2, 4), (4, float("inf")))


def rule_of_thumb(rows: Sequence[Row]) -> Table:
    """Gains by the one number that decides: how long LRU's loads take beside its arithmetic."""
    lines = []
    for least, most in BINS:
        inside = [row for row in rows if least <= row["ratio"] < most and not of_predictor(row["axis"])]
        cells = [_range([r["gain"] for r in inside if r["system"] == name]) for name in (OURS, ORACLE, BOUND)]
        label = f"{least:g} to {most:g}" if most < float("inf") else f"above {least:g}"
        lines.append((label, str(len(inside) // 5), *cells))
    header = (
        "loads / arithmetic under LRU",
        "conditions",
        "predicted",
        "oracle for this step",
        "knowing all that comes",
    )
    return Table("Times as fast as LRU: median (least to most)", header, lines)


def rule_sentences(rows: Sequence[Row]) -> list[str]:
    """The table in words: where prediction is worth most, and where it is not worth having."""
    middles: dict[str, tuple[float, float]] = {}
    for least, most in BINS:
        inside = [row for row in rows if least <= row["ratio"] < most and not of_predictor(row["axis"])]
        label = f"{least:g} to {most:g} times" if most < float("inf") else f"more than {least:g} times"
        if inside:
            ours, bound = (
                median([row["gain"] for row in inside if row["system"] == name]) for name in (OURS, BOUND)
            )
            middles[label] = ours, bound
    if not middles:
        return []
    best = max(middles, key=lambda label: middles[label][0])
    said = [
        f"Prediction is worth most where loads take {best} as long as arithmetic: there a step is typically "
        f"{middles[best][0]:.2f} times as fast as with LRU, of {middles[best][1]:.2f} for whoever knows all that comes."
    ]
    for label, (ours, bound) in middles.items():
        if ours < HARDLY:
            whose = (
                "nobody gains much"
                if bound < HELPS
                else f"the rest of {bound:.2f} takes knowing what comes later"
            )
            said.append(f"At {label} it is hardly worth anything ({ours:.2f}); {whose}.")
    return said


def _range(gains: Sequence[float]) -> str:
    if not gains:
        return ""
    return f"{median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"


def axis_table(rows: Sequence[Row], axis: Axis) -> Table:
    lines = []
    for value, source in sorted({(r["value"], r["source"]) for r in rows if r["axis"] == axis.name}):
        by = {
            r["system"]: r for r in rows if (r["axis"], r["value"], r["source"]) == (axis.name, value, source)
        }
        lru = by[LRU]
        lines.append(
            (
                f"{value:g}", source, f"{lru['ratio']:.2f}", f"{lru['step_seconds'] * 1e3:.1f}",
                f"{lru['bytes_per_step'] / 1e6:.0f}", *(f"{by[name]['gain']:.2f}x" for name in SHOWN),
                f"{by[OURS]['recall']:.2f}",
            )
        )  # fmt: skip
    header = (axis.unit, "routes", "loads / arithmetic", "LRU: ms per step", "MB per step", *SHOWN, "recall")
    return Table(axis.title, header, lines)


SHOWN = (CACHE_MOE, OURS, ORACLE, BOUND)


def figure(rows: Sequence[Row], axis: Axis) -> Figure:
    from benchmarks.paper import style

    figure, axes = style.new_figure(1, width=4.6, height=3.0)
    panel = axes[0][0]
    colours = {CACHE_MOE: style.ORANGE, OURS: style.BLUE, ORACLE: style.SKY, BOUND: style.BLACK}
    for source, line in ((RECORDED, "-"), (DRAWN, "--")):
        for name, colour in colours.items():
            if points := gains(rows, axis.name, source, name):
                label = name if source == RECORDED or axis.name == "experts" else f"{name}, {source}"
                panel.plot(*zip(*points, strict=True), line, marker="o", ms=3, color=colour, label=label)
    panel.axhline(1, color="#999999", lw=0.8)
    if not of_predictor(axis.name):
        panel.set_xscale("log", base=2)
        panel.set_xticks(
            ticks := sorted({r["value"] for r in rows if r["axis"] == axis.name}), [f"{t:g}" for t in ticks]
        )
        panel.minorticks_off()
    panel.set_xlabel(f"{axis.title} ({axis.unit})")
    panel.set_ylabel("times as fast as LRU")
    panel.legend(fontsize=7)
    return figure
