"""Two groups of alike rows, by the paper's K-means-like iteration with medoids (3.3.2).

Rows go to the medoid they are more similar to, as far as the groups' sizes allow; the medoid of a group is the row
with the highest average similarity to its group. The first two medoids are the two rows least alike. The paper
takes what the iteration ends with; we take the best split it passed, by Eq. 2. Ties go to arrival order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from expertflow.scheduler.similarity import Paths

MAX_ROUNDS = 20


@dataclass(frozen=True)
class Grouping:
    """Which rows share a batch. Every row is in one group; a group's rows stand in arrival order."""

    groups: tuple[tuple[int, ...], ...]
    activated: float  # Eq. 2 of these groups; expected, where paths are probabilities
    activated_in_arrival_order: float
    rounds: int  # of two-means, over all splits
    swaps: int  # tried by the local search
    moved: int  # rows that are not in the group they would be in by arrival

    @property
    def kept_arrival_order(self) -> bool:
        return self.moved == 0


def two_means(paths_NLE: Tensor, max_rounds: int = MAX_ROUNDS) -> Grouping:
    """Split rows into two groups, the first as large as the second or by one larger.

    paths_NLE: bool, or probabilities. Deterministic. Keeps arrival order where the split does not lower Eq. 2.
    Raises ValueError for malformed paths.
    """
    paths = Paths(paths_NLE)
    sizes = even_sizes(paths.num_rows, 2)
    arrival_N = arrival_groups(sizes)
    group_N, rounds = split(paths, paths.similarity_NN(), np.arange(paths.num_rows), sizes[0], max_rounds)
    return grouping(paths, arrival_N, keep_names(group_N, arrival_N, sizes), len(sizes), rounds, 0)


def split(
    paths: Paths, similarity_NN: np.ndarray, rows_M: np.ndarray, first_size: int, max_rounds: int
) -> tuple[np.ndarray, int]:
    """(side_M, rounds) of some of the rows: 0 for first_size of them, 1 for the others."""
    similarity_MM = similarity_NN[np.ix_(rows_M, rows_M)]
    num_rows = len(rows_M)
    best_M, fewest = np.repeat([0, 1], [first_size, num_rows - first_size]), np.inf
    if first_size in (0, num_rows):
        return best_M, 0
    weight_FM = paths.weight_FN if num_rows == paths.num_rows else paths.weight_FN[:, rows_M]
    medoids = divmod(int(similarity_MM.argmin()), num_rows)
    seen: set[tuple[int, int]] = set()
    while len(seen) < max_rounds and medoids not in seen:
        seen.add(medoids)
        nearer_first_M = similarity_MM[:, medoids[0]] - similarity_MM[:, medoids[1]]
        side_M = np.ones(num_rows, dtype=np.intp)
        side_M[np.argsort(-nearer_first_M, kind="stable")[:first_size]] = 0
        member_M2 = side_M[:, None] == np.arange(2)
        count = paths.activated(weight_FM @ member_M2.astype(np.float32))
        if count < fewest:
            best_M, fewest = side_M, count
        closeness_M2 = similarity_MM @ member_M2.astype(np.float32)
        closeness_M2[~member_M2] = -np.inf
        first, second = closeness_M2.argmax(0).tolist()
        medoids = first, second
    return best_M, len(seen)


def even_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """Sizes that differ by one at most, larger ones first."""
    small, larger = divmod(num_rows, num_groups)
    return (small + 1,) * larger + (small,) * (num_groups - larger)


def arrival_groups(sizes: tuple[int, ...]) -> np.ndarray:
    """group_N of rows that are grouped as they came."""
    return np.repeat(np.arange(len(sizes)), sizes)


def keep_names(group_N: np.ndarray, arrival_N: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """The same groups, numbered so that many rows stay where they arrived; groups only take numbers of their size.

    Greedy: the two groups that share most rows first. A group's number says where its KV rows lie.
    """
    num_groups = len(sizes)
    shared_GG = np.zeros((num_groups, num_groups), dtype=np.intp)
    np.add.at(shared_GG, (group_N, arrival_N), 1)
    same_size_GG = np.equal.outer(sizes, sizes)
    name_G = np.full(num_groups, -1)
    taken_G = np.zeros(num_groups, dtype=bool)
    for pair in np.argsort(-shared_GG, axis=None, kind="stable"):
        found, name = divmod(int(pair), num_groups)
        if name_G[found] < 0 and not taken_G[name] and same_size_GG[found, name]:
            name_G[found], taken_G[name] = name, True
    return name_G[group_N]


def grouping(
    paths: Paths,
    arrival_N: np.ndarray,
    group_N: np.ndarray,
    num_groups: int,
    rounds: int,
    swaps: int,
    moving_NG: np.ndarray | None = None,
) -> Grouping:
    """What is reported of an assignment; arrival order, where that is as good."""
    before = paths.activated(paths.load_FG(arrival_N, num_groups))
    after = paths.activated(paths.load_FG(group_N, num_groups))
    moving = 0.0 if moving_NG is None else float(moving_NG[np.arange(len(group_N)), group_N].sum())
    if after + moving >= before:
        group_N, after = arrival_N, before
    return Grouping(
        as_rows(group_N, num_groups), after, before, rounds, swaps, int((group_N != arrival_N).sum())
    )


def as_rows(group_N: np.ndarray, num_groups: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(np.flatnonzero(group_N == g).tolist()) for g in range(num_groups))
