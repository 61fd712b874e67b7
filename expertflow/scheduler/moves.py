"""Moves: in which order rows are copied over one another, and whether copying them pays.

Decides only: numbers in, a plan out; regroup.py copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    batch: int
    row: int


# Who stands where afterwards: layout[b][r] is the old place of the sequence that gets row r of batch b.
Layout = Sequence[Sequence[tuple[int, int]]]


class Move(NamedTuple):
    source: Place
    target: Place


@dataclass(frozen=True)
class Chain:
    """Moves to be made in this order: each one frees the row that the next one overwrites.

    cyclic: the first move overwrites what the last one reads, so that row must be set aside before.
    """

    moves: tuple[Move, ...]
    cyclic: bool


def checked(layout: Layout, rows_per_batch: Sequence[int]) -> list[list[Place]]:
    """The layout as places. ValueError when it names a row that does not exist, or one twice."""
    places = [[Place(*place) for place in batch] for batch in layout]
    named = [place for batch in places for place in batch]
    for place in named:
        if not (0 <= place.batch < len(rows_per_batch) and 0 <= place.row < rows_per_batch[place.batch]):
            raise ValueError(
                f"the layout names row {place.row} of batch {place.batch}, and the batches have "
                f"{list(rows_per_batch)} rows; name existing ones, counted from 0"
            )
    if len(set(named)) < len(named):
        twice = next(place for place in named if named.count(place) > 1)
        raise ValueError(
            f"the layout names row {twice.row} of batch {twice.batch} twice; a sequence can be in one place only"
        )
    if not all(places):
        raise ValueError("the layout has a batch without rows; leave empty batches out")
    return places


def ordered(source_of: Mapping[Place, Place]) -> list[Chain]:
    """Order the moves so that no row is overwritten before it has been read.

    source_of: target -> source; each place is at most once a target and at most once a source, and none is its
    own. As few copies as possible: one for each move, and one more for each cycle.
    """
    left = dict(source_of)
    chains = []
    sources = set(left.values())
    for start in [target for target in left if target not in sources]:
        chains.append(Chain(_follow(left, start), cyclic=False))
    while left:
        chains.append(Chain(_follow(left, next(iter(left))), cyclic=True))
    return chains


def _follow(left: dict[Place, Place], target: Place) -> tuple[Move, ...]:
    moves = []
    while target in left:
        source = left.pop(target)
        moves.append(Move(source, target))
        target = source
    return tuple(moves)


def move_pays(num_bytes: float, bytes_per_second: float, loads_saved: float, seconds_per_load: float) -> bool:
    """Whether moving sequences costs less time than the expert loads it saves (paper 3.3, Eq. 2).

    num_bytes: what `bytes_moved` says; bytes_per_second: how fast memory is copied (a copied byte is read and
    written, so about half of what one-way bandwidth is quoted at). loads_saved: expected over all steps until the
    sequences are grouped anew; seconds_per_load: what one more load delays a step by, 0 where loads are hidden.
    """
    if not bytes_per_second > 0:
        raise ValueError(
            f"bytes_per_second={bytes_per_second} must be above 0: the rate at which memory is copied"
        )
    return num_bytes / bytes_per_second < loads_saved * seconds_per_load
