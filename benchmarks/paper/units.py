"""The same sequences in the ways in which a unit of two batches can run, as workloads of the simulator.

Whoever is compared decodes the same tokens of the same sequences, in batches of at most `batch`, except where two
batches run as one pass (joint).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from expertflow.core import routes_to_mask
from expertflow.scheduler.group import group
from expertflow.sim.workload import (
    Foretold,
    Step,
    Workload,
    alike_in_length,
    decode_steps,
    shape_of,
    workload_of,
)

# alone: one batch to its end, then the other. split: they take turns, and while one computes the other's next pass is
# predicted. grouped: they take turns and are grouped anew before each step by predicted paths (the paper's token
# scheduler), so that of a step's second pass alone something is known before; known: by true paths. joint: both in one
# pass.
# Results made with another idea of what is known are made anew.
PIPELINE = {"two_batches": "next pass known"}
Way = Literal["alone", "split", "grouped", "known", "joint"]


def unit_workload(
    foretold: Foretold,
    batch: int,
    way: Way,
    most_steps: int | None = None,
    most_sequences: int | None = None,
    seed: int = 0,
) -> Workload:
    """Decode steps of units of two batches. most_steps: of each sequence; most_sequences: of the recording, in random
    order; what is left out is so for every way alike.

    Raises ValueError where fewer than two batches were recorded, or a grouping needs predictions there are none of.
    """
    if way == "grouped" and foretold.p_TLE is None:
        raise ValueError(f"{foretold.prediction!r} predicts no paths to group by")
    return workload_of(foretold, batch, _steps(foretold, batch, way, most_steps, most_sequences, seed), seed)


def _steps(
    foretold: Foretold, batch: int, way: Way, most_steps: int | None, most_sequences: int | None, seed: int
) -> Iterator[Step]:
    units = alike_in_length(foretold.sequences[:most_sequences], 2 * batch, seed)
    draw = torch.Generator().manual_seed(seed)
    for unit in units:
        # In random order of arrival: sorted by length, one batch would have the longer answers.
        arrived = [unit[n] for n in torch.randperm(len(unit), generator=draw).tolist()]
        halves = [arrived[:batch], arrived[batch:]]
        if way == "alone":
            for half in halves:
                yield from _marked(([members] for members in _decoding(foretold, half, most_steps)), way)
            continue
        yield from _marked(_shared_out(foretold, arrived, halves, way, most_steps), way)


def _shared_out(
    foretold: Foretold, arrived: Sequence[int], halves: list[list[int]], way: Way, most_steps: int | None
) -> Iterator[list[list[tuple[int, int]]]]:
    """The passes of each step of a unit. Who sits with whom carries over to the next step, as in the engine."""
    for rows in _decoding(foretold, arrived, most_steps):
        if way == "joint":
            yield [rows]
            continue
        t_of = dict(rows)
        parts = [part for half in halves if (part := [(n, t_of[n]) for n in half if n in t_of])]
        if way != "split" and len(parts) > 1:
            parts = _grouped(foretold, parts, way)
            halves = [[n for n, _ in part] for part in parts]
        yield parts


def _grouped(
    foretold: Foretold, parts: Sequence[Sequence[tuple[int, int]]], way: Way
) -> list[list[tuple[int, int]]]:
    flat = [row for part in parts for row in part]
    paths_NLE = torch.stack([_path(foretold, n, t, way) for n, t in flat])
    found = group(paths_NLE, sizes=[len(part) for part in parts])
    return [[flat[place] for place in members] for members in found.groups]


def _decoding(
    foretold: Foretold, members: Sequence[int], most_steps: int | None
) -> Iterator[list[tuple[int, int]]]:
    """At each step those that have not ended."""
    lengths = {n: decode_steps(foretold.sequences[n]) for n in members}
    longest = max(lengths.values())
    for t in range(longest if most_steps is None else min(most_steps, longest)):
        yield [(n, t) for n in members if t < lengths[n]]


def _path(foretold: Foretold, n: int, t: int, way: Way) -> Tensor:
    if way == "grouped":
        assert foretold.p_TLE is not None
        return foretold.p_TLE[n][t].float()
    sequence = foretold.sequences[n]
    routes_LK = torch.from_numpy(sequence.target_routes_TLK[sequence.num_prefill + t].astype("int64"))
    return routes_to_mask(routes_LK, max(shape_of(foretold.meta).experts_per_layer))


def _marked(steps: Iterable[Sequence[Sequence[tuple[int, int]]]], way: Way) -> Iterator[Step]:
    """Steps of a unit as passes; the last says so."""
    passes = [(rows, rows is parts[-1]) for parts in steps for rows in parts]
    for number, (rows, ends_step) in enumerate(passes):
        last = number == len(passes) - 1
        after = {n for n, _ in passes[number + 1][0]} if not last else set()
        others = not after & {n for n, _ in rows}  # the same sequences have yet to find their next tokens
        yield Step(rows, last, not last and others and (way == "split" or not ends_step))
