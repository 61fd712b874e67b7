"""Routing paths for tests of grouping, and the slow, obvious best split."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from expertflow.core import routes_to_mask


def random_paths(
    num_rows: int, seed: int, layers: int = 3, experts: int = 8, top_k: int = 2, kinds: int = 3
) -> Tensor:
    """paths_NLE of rows that are of a few kinds, each with its favourite experts, as text of a few topics."""
    draw = torch.Generator().manual_seed(seed)
    taste_KLE = 2 * torch.rand(kinds, layers, experts, generator=draw)
    kind_N = torch.randint(kinds, (num_rows,), generator=draw)
    scores_NLE = taste_KLE[kind_N] + torch.rand(num_rows, layers, experts, generator=draw)
    return routes_to_mask(scores_NLE.topk(top_k).indices, experts)


def predicted(num_rows: int, seed: int, layers: int = 3, experts: int = 8, kinds: int = 3) -> Tensor:
    """Probabilities without a tie, of rows that are of a few kinds; many of them small."""
    draw = torch.Generator().manual_seed(seed)
    taste_KLE = torch.rand(kinds, layers, experts, generator=draw) ** 3
    kind_N = torch.randint(kinds, (num_rows,), generator=draw)
    return 0.5 * taste_KLE[kind_N] + 0.48 * torch.rand(num_rows, layers, experts, generator=draw) ** 3


def count_activated(paths_NLE: Tensor, groups: tuple[tuple[int, ...], ...]) -> int:
    """Eq. 2 as it is written."""
    total = 0
    for rows in groups:
        needed = {(layer, expert) for row in rows for layer, expert in paths_NLE[row].nonzero().tolist()}
        total += len(needed)
    return total


def halves(num_rows: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    for first in combinations(range(num_rows), num_rows // 2):
        yield first, tuple(row for row in range(num_rows) if row not in first)


def brute_force(paths_NLE: Tensor) -> int:
    """The least Eq. 2 of any split into halves."""
    return min(count_activated(paths_NLE, groups) for groups in halves(len(paths_NLE)))
