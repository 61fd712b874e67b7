"""Grouping as the engine asks for it: any number of groups, two-means first, then swaps.

A queue of sequences becomes units, and a unit's sequences its batches, by the same call. Groups come from halving
again and again; rows are then swapped between all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from expertflow.scheduler.similarity import Paths, group_of_rows
from expertflow.scheduler.swaps import swap_while_it_pays
from expertflow.scheduler.two_means import (
    MAX_ROUNDS,
    Grouping,
    arrival_groups,
    as_rows,
    even_sizes,
    grouping,
    keep_names,
    split,
)

# Measured on one core of the reference machine: 0.1 to 0.25 ms a swap.
_SWAP_WORK = 4e8
_FEWEST_SWAPS = 8


def group(
    paths_NLE: Tensor,
    num_groups: int = 2,
    sizes: Sequence[int] | None = None,
    cost_of_moving_N: Tensor | None = None,
    max_swaps: int | None = None,
) -> Grouping:
    """Group rows so that few experts are activated over all groups (Eq. 2), or leave them as they arrived.

    paths_NLE: bool, or probabilities of predicted paths (better than thresholded ones). sizes: of each group; even
    without it. cost_of_moving_N: what it costs to move each row out of the group it arrives in, in experts
    activated (bytes of its KV cache over bytes of an expert); the sum of both is lowered. max_swaps: bounds the
    local search, 0 leaves it out; by default about 10 ms for 2T = 128, L = 32, E = 128 in all. Deterministic.
    Raises ValueError for malformed paths, or sizes and costs that do not fit them.
    """
    paths = Paths(paths_NLE)
    if num_groups < 1:
        raise ValueError(f"num_groups={num_groups}: rows need at least one group")
    even = even_sizes(paths.num_rows, num_groups) if sizes is None else tuple(sizes)
    _check_sizes(even, paths.num_rows)
    arrival_N = arrival_groups(even)
    moving_NG = (
        None
        if cost_of_moving_N is None
        else _moving(cost_of_moving_N, arrival_N, len(even), 2 * paths.num_experts)
    )
    group_N, rounds = arrival_N, 0
    if moving_NG is None:  # two-means knows of no costs: with them the search starts where nothing moves
        group_N, rounds = _halve(paths, even)
        group_N = keep_names(group_N, arrival_N, even)
    limit = default_swaps(paths) if max_swaps is None else max_swaps
    found = swap_while_it_pays(paths, group_N, len(even), moving_NG, limit, patience=paths.num_rows // 2)
    return grouping(paths, arrival_N, found.group_N, len(even), rounds, found.swaps, moving_NG)


def refine_by_swaps(
    paths_NLE: Tensor, groups: Sequence[Sequence[int]], max_swaps: int | None = None, patience: int = 0
) -> tuple[tuple[int, ...], ...]:
    """The local search alone: swap rows of these groups while Eq. 2 falls. Sizes stay.

    patience: swaps that may be for the worse before giving up; with 0 and enough max_swaps, the result has no pair
    whose swap lowers Eq. 2. Raises ValueError for malformed paths, or groups that do not share out the rows.
    """
    paths = Paths(paths_NLE)
    group_N = group_of_rows(groups, paths.num_rows)
    limit = default_swaps(paths) if max_swaps is None else max_swaps
    found = swap_while_it_pays(paths, group_N, len(groups), None, limit, patience)
    return as_rows(found.group_N, len(groups))


def default_swaps(paths: Paths) -> int:
    """As many as take a few milliseconds on one core: a swap costs in proportion to the paths and their pairs."""
    return max(
        _FEWEST_SWAPS, min(8 * paths.num_rows, int(_SWAP_WORK / max(1, paths.p_FN.size * paths.num_rows)))
    )


def _halve(paths: Paths, sizes: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """group_N and rounds of two-means, by splitting the groups' list in its middle until one is left."""
    group_N = np.zeros(paths.num_rows, dtype=np.intp)
    similarity_NN = paths.similarity_NN()
    rounds = 0
    pending = [(np.arange(paths.num_rows), 0, len(sizes))]
    while pending:
        rows_M, first, end = pending.pop()
        if end - first == 1:
            group_N[rows_M] = first
            continue
        middle = (first + end + 1) // 2
        side_M, taken = split(paths, similarity_NN, rows_M, sum(sizes[first:middle]), MAX_ROUNDS)
        rounds += taken
        pending += [(rows_M[side_M == 0], first, middle), (rows_M[side_M == 1], middle, end)]
    return group_N, rounds


def _check_sizes(sizes: tuple[int, ...], num_rows: int) -> None:
    if not sizes or min(sizes) < 0 or sum(sizes) != num_rows:
        raise ValueError(f"groups of sizes {sizes} do not take {num_rows} rows; give sizes that add up to it")


def _moving(
    cost_of_moving_N: Tensor, arrival_N: np.ndarray, num_groups: int, most_saved: float
) -> np.ndarray:
    """moving_NG: nothing for the group a row arrives in, its cost for every other.

    A cost above what any move can save forbids the move, so larger ones say no more.
    """
    shape = tuple(cost_of_moving_N.shape)
    if shape != arrival_N.shape or not bool((cost_of_moving_N >= 0).all()):
        raise ValueError(f"cost_of_moving_N of shape {shape}: give {len(arrival_N)} costs, none below 0")
    cost_N = cost_of_moving_N.detach().cpu().to(torch.float32).clamp(max=most_saved).numpy()
    return cost_N[:, None] * (arrival_N[:, None] != np.arange(num_groups))
