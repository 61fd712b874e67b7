"""One look for all figures: colours that colour-blind readers tell apart, the same for a system everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
)
_GREY = "#999999"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "expertflow",  # the same bytes for the same figure
}


@contextmanager
def styled() -> Iterator[None]:
    with rc_context(STYLE):
        yield


def new_figure(columns: int, rows: int = 1, width: float = 3.2, height: float = 2.6, **options: Any) -> Any:
    """(figure, axes[row][column])"""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def grouped_bars(
    axes: Axes, groups: Sequence[str], bars: Mapping[str, Sequence[float | None]], colours: Mapping[str, str]
) -> None:
    """A bar for each name in each group; None leaves its place empty."""
    width = 0.8 / max(1, len(bars))
    for number, (name, heights) in enumerate(bars.items()):
        places = [n - 0.4 + width * (number + 0.5) for n in range(len(groups))]
        shown = [(x, y) for x, y in zip(places, heights, strict=True) if y is not None]
        axes.bar(
            [x for x, _ in shown],
            [y for _, y in shown],
            width,
            label=name,
            color=colours.get(name, _GREY),
            edgecolor="white",
            linewidth=0.4,
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="x", visible=False)


def legend_above(figure: Figure, axes: Axes, columns: int = 4) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def save(figure: Figure, stem: Path) -> list[Path]:
    """PNG and SVG; the same bytes for the same figure."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + ending) for ending in (".png", ".svg")]
    with styled():
        figure.savefig(paths[0], dpi=110, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
