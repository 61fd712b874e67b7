"""Regrouping: move sequences, with all they carry, between batches and between two decode steps.

The paper's two primitives (section 3.3.3) are `merge` and `reindex`, slow and obvious. `regroup` gives the same
bits and copies only the sequences that change place. What the model must be told afterwards is
batch_state.py's `model_kwargs_of`; whether a move pays is for moves.py to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from expertflow.scheduler.batch_state import BatchState
from expertflow.scheduler.carried import Axis, Carried
from expertflow.scheduler.moves import Chain, Layout, Place, checked, ordered


@torch.no_grad()
def merge(states: Sequence[BatchState]) -> BatchState:
    """One batch with the sequences of all, in order (the paper's Merge). Copies everything.

    Shorter batches are padded with zeros, which the masks hide. ValueError when the batches are not of one
    model, or hold unequal lengths that cannot share a batch.
    """
    _plan(states, [[(batch, row) for batch, state in enumerate(states) for row in range(state.num_rows)]])
    lengths = {axis: max(state.length(axis) for state in states) for axis in Axis}
    carried = [state.tensors() for state in states]
    tensors = {
        name: torch.cat([tensors[name].padded(part.width(lengths[part.axis])) for tensors in carried])
        for name, part in carried[0].items()
    }
    return states[0].holding(tensors, _merged_masks(states))


@torch.no_grad()
def reindex(state: BatchState, rows: Sequence[int]) -> BatchState:
    """The named rows, in this order (the paper's Reindex). Copies them.

    Columns that none of them uses are cut off. ValueError when a row is named twice or does not exist.
    """
    plan = _plan([state], [[(0, row) for row in rows]])
    lengths = plan.lengths[0]
    tensors = {
        name: part.chosen(rows, part.width(lengths[part.axis])) for name, part in state.tensors().items()
    }
    return state.holding(tensors, _masks_of(state.masks(), rows, lengths))


def regroup_by_copying(states: Sequence[BatchState], layout: Layout) -> list[BatchState]:
    """The reference for `regroup`: merge, then reindex once for each new batch."""
    places = checked(layout, [state.num_rows for state in states])
    merged, first_row = merge(states), _first_rows(states)
    return [reindex(merged, [first_row[place.batch] + place.row for place in batch]) for batch in places]


@torch.no_grad()
def regroup(states: Sequence[BatchState], layout: Layout) -> list[BatchState]:
    """The sequences in their new places: layout[b][r] = (state, row) is who gets row r of new batch b.

    Sequences that the layout does not name are dropped. The same bits as `regroup_by_copying`, but new batch b
    lives on in the memory of states[b] wherever it has no more rows and positions than that, and rows that keep
    their place there are not touched. The states given are used up: their tensors are overwritten or emptied.

    ValueError as `merge` and `reindex`, raised before anything is moved.
    """
    plan = _plan(states, layout)
    carried = [state.tensors() for state in states]
    new_tensors: list[dict] = [{} for _ in plan.places]
    for name in carried[0]:
        parts = [tensors[name] for tensors in carried]
        moved = _move(parts, plan)
        _release(parts, moved)
        for tensors, tensor in zip(new_tensors, moved, strict=True):
            tensors[name] = tensor
    # Masks are small, and the caller may still look at the old ones: new ones, by the slow way.
    merged_masks, first_row = _merged_masks(states), _first_rows(states)
    return [
        states[0].holding(
            tensors,
            _masks_of(merged_masks, [first_row[place.batch] + place.row for place in places], lengths),
        )
        for tensors, places, lengths in zip(new_tensors, plan.places, plan.lengths, strict=True)
    ]


def _release(parts: Sequence[Carried], moved: Sequence[Tensor]) -> None:
    """Empty the old tensors that nobody lives on in: a KV cache must not exist twice, not even for a moment."""
    kept = {tensor.untyped_storage().data_ptr() for tensor in moved}
    for part in parts:
        if part.tensor.untyped_storage().data_ptr() not in kept:
            part.tensor.set_(part.tensor.new_empty(0).untyped_storage())


def bytes_moved(states: Sequence[BatchState], layout: Layout) -> int:
    """Bytes that `regroup` would write: cache and encoder states, not the masks. Moves nothing."""
    plan = _plan(states, layout)
    carried = [state.tensors() for state in states]
    total = 0
    for name in carried[0]:
        parts = [tensors[name] for tensors in carried]
        route = _route(parts, plan)
        total += sum(
            parts[source.batch].row_bytes(route.widths[batch]) for source, batch in route.copies(plan)
        )
    return total


@dataclass(frozen=True)
class _Plan:
    """places[b][r]: the old place of the sequence that gets row r of new batch b; lengths[b]: b's positions."""

    places: list[list[Place]]
    lengths: list[dict[Axis, int]]


@dataclass(frozen=True)
class _Route:
    """How one tensor of all batches gets to its new places.

    widths[b]: columns of new batch b; fresh: new batches that need memory of their own; chains: moves among the
    others, which keep theirs.
    """

    widths: list[int]
    fresh: list[int]
    chains: list[Chain]

    def copies(self, plan: _Plan) -> Iterator[tuple[Place, int]]:
        """Every row copied, and the new batch whose width it is cut to."""
        for batch in self.fresh:
            yield from ((source, batch) for source in plan.places[batch])
        for chain in self.chains:
            yield from ((source, target.batch) for source, target in chain.moves)
            if chain.cyclic:
                source, target = chain.moves[-1]
                yield source, target.batch


def _plan(states: Sequence[BatchState], layout: Layout) -> _Plan:
    _check_alike(states)
    places = checked(layout, [state.num_rows for state in states])
    row_lengths = [state.row_lengths() for state in states]
    if any(state.lengths_must_agree for state in states):
        for batch in places:
            _check_lengths_agree(
                states, [(place, row_lengths[place.batch][Axis.TOKENS][place.row]) for place in batch]
            )
    lengths = [
        {axis: max(row_lengths[place.batch][axis][place.row] for place in batch) for axis in Axis}
        for batch in places
    ]
    return _Plan(places, lengths)


def _check_lengths_agree(states: Sequence[BatchState], rows: Sequence[tuple[Place, int]]) -> None:
    lengths = {length for _, length in rows} | {states[place.batch].length(Axis.TOKENS) for place, _ in rows}
    if len(lengths) > 1:
        raise ValueError(
            f"sequences of {min(lengths)} and {max(lengths)} positions cannot share a batch: what this model computes "
            "depends on the length of the batch; regroup sequences of one length, without padding"
        )


def _route(parts: Sequence[Carried], plan: _Plan) -> _Route:
    widths = [parts[0].width(lengths[parts[0].axis]) for lengths in plan.lengths]
    fresh = [
        batch
        for batch, places in enumerate(plan.places)
        if batch >= len(parts)
        or len(places) > parts[batch].num_rows
        or widths[batch] > parts[batch].num_columns
    ]
    source_of = {
        Place(batch, row): source
        for batch, places in enumerate(plan.places)
        if batch not in fresh
        for row, source in enumerate(places)
        if source != (batch, row)
    }
    return _Route(widths, fresh, ordered(source_of))


def _move(parts: Sequence[Carried], plan: _Plan) -> list[Tensor]:
    route = _route(parts, plan)
    moved: dict[int, Carried] = {}
    # New memory first: the chains then overwrite what it was filled from.
    for batch in route.fresh:
        moved[batch] = parts[0].empty(len(plan.places[batch]), route.widths[batch])
        for row, source in enumerate(plan.places[batch]):
            moved[batch].put(row, parts[source.batch].row(source.row))
    for batch, places in enumerate(plan.places):
        if batch not in moved:
            moved[batch] = parts[batch].cut(len(places), route.widths[batch])
    for chain in route.chains:
        *moves, (last, end) = chain.moves
        kept = parts[last.batch].row(last.row, at_most=route.widths[end.batch])
        if chain.cyclic:
            kept = kept.clone()
        for source, target in moves:
            moved[target.batch].put(target.row, parts[source.batch].row(source.row))
        moved[end.batch].put(end.row, kept)
    return [moved[batch].tensor for batch in range(len(plan.places))]


def _merged_masks(states: Sequence[BatchState]) -> dict[Axis, Tensor]:
    merged = {}
    for axis in states[0].masks():
        masks = [Carried(state.masks()[axis], axis, columns=1) for state in states]
        merged[axis] = torch.cat([mask.padded(max(mask.num_columns for mask in masks)) for mask in masks])
    return merged


def _masks_of(
    masks: Mapping[Axis, Tensor], rows: Sequence[int], lengths: Mapping[Axis, int]
) -> dict[Axis, Tensor]:
    return {axis: Carried(mask, axis, columns=1).chosen(rows, lengths[axis]) for axis, mask in masks.items()}


def _first_rows(states: Sequence[BatchState]) -> list[int]:
    """The row of the merged batch at which each state begins."""
    return [0, *accumulate(state.num_rows for state in states)]


def _check_alike(states: Sequence[BatchState]) -> None:
    if not states:
        raise ValueError("there is no batch to regroup; give at least one")
    first = {name: part.layout() for name, part in states[0].tensors().items()}
    for index, state in enumerate(states[1:], 1):
        other = {name: part.layout() for name, part in state.tensors().items()}
        different = [name for name in first.keys() | other.keys() if first.get(name) != other.get(name)]
        if different:
            raise ValueError(
                f"batches 0 and {index} are not of one model at one stage of its work: they differ in "
                f"{sorted(map(str, different))[:3]}; regroup batches that are both between two decode steps"
            )
