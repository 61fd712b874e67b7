"""Items: what a table or figure is made of. Nothing here reads or writes anything.

An item is one table or figure in one mode. Its parts are the pieces that are kept when a run is killed; its section is
what the page says of it, made of its rows alone, so that a page can be made again without running anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
# counted: from published configurations alone. simulated: recorded routes on a virtual clock. measured: on the clock
# of this machine. Figures of different modes never share a table.
Mode = Literal["counted", "simulated", "measured"]
MODES: tuple[Mode, ...] = ("counted", "simulated", "measured")
Row = dict[str, Any]  # plain JSON
Say = Callable[[str], None]


class Skipped(Exception):
    """This item cannot be made here (no room on the disk, a rival that is not installed); says why and the remedy."""


@dataclass(frozen=True)
class Settings:
    """What the command line gave. out: results and predictors; predictors: a folder with one for each recording that
    has one there, None for OUT/predictors; traces: a folder of recordings by model and task."""

    out: Path = ROOT / "out" / "paper"
    quick: bool = False
    seed: int = 0
    predictors: Path | None = None
    traces: Path = ROOT / "zoo" / "traces"
    zoo: Path = ROOT / "out" / "zoo"
    llama_cpp: Path | None = None  # a source tree with a build, for full-size

    @property
    def results(self) -> Path:
        """A quick run never takes the place of a whole one."""
        return self.out / "quick" if self.quick else self.out


@dataclass(frozen=True)
class Part:
    """A piece of an item: kept as soon as it is done. key: the conditions it runs under, unique within its item."""

    key: str
    run: Callable[[Say], list[Row]]

    def made(self, say: Say) -> dict[str, Any]:
        """Its rows, and how long they took."""
        began = time.monotonic()
        rows = self.run(say)
        return {"rows": rows, "seconds": round(time.monotonic() - began, 1)}


@dataclass(frozen=True)
class Result:
    """An item as kept on disk."""

    name: str
    mode: Mode
    title: str
    conditions: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Any]]  # by key: rows, seconds
    provenance: Mapping[str, Any] = field(default_factory=dict)  # commit, machine, seed, quick, finished
    complete: bool = False
    skipped: str | None = None

    @property
    def rows(self) -> list[Row]:
        return [row for part in self.parts.values() for row in part["rows"]]


@dataclass(frozen=True)
class Target:
    """A number of the paper, ours beside it, and what nobody could beat.

    unit: "x", "%", "GB" or "". bound: None where none is known. at: the conditions of ours, in words. in_paper: False
    for what we asked of ourselves.
    """

    name: str
    asked: float
    got: float
    unit: str
    at: str
    bound: float | None = None
    bound_name: str = ""
    lower_is_better: bool = False
    in_paper: bool = True

    @property
    def met(self) -> bool:
        """As the paper prints its numbers, with two digits."""
        got = round(self.got, 2)
        return got <= self.asked if self.lower_is_better else got >= self.asked

    @property
    def within_bound(self) -> bool | None:
        """Whether the paper's number lies within the bound; None where none is known."""
        if self.bound is None:
            return None
        return self.bound <= self.asked if self.lower_is_better else self.bound >= self.asked


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """What the page says of one item. paper: what the paper reports; notes: how ours was made, and what it shows."""

    paper: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    targets: Sequence[Target] = ()


def _no_figures(result: Result) -> dict[str, Figure]:
    return {}


@dataclass(frozen=True)
class Item:
    """A table or figure in one mode.

    conditions: plain JSON that all parts depend on; kept parts of other conditions are made again. parts: raises
    ValueError with the remedy where something is missing, Skipped where this machine cannot. figures: by file name
    without its ending.
    """

    name: str
    mode: Mode
    title: str
    conditions: Callable[[Settings], dict[str, Any]]
    parts: Callable[[Settings], Sequence[Part]]
    section: Callable[[Result], Section]
    figures: Callable[[Result], dict[str, Figure]] = _no_figures

    @property
    def file_name(self) -> str:
        return f"{self.name}-{self.mode}.json"
