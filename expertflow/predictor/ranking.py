"""Who is needed sooner? The quality of a score by which a cache would evict, against the true next uses.

A position is a visit of one MoE layer: pass t, layer l is t * L + l (DESIGN: the clock). Pure functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NEVER = float("inf")


def next_use(truth_TLE: Tensor) -> Tensor:
    """Passes from t to the next pass after t that uses the expert: 1 is the very next; inf when none does.

    truth_TLE: bool, by pass. Returns float32 of the same shape.
    """
    steps, layers, experts = truth_TLE.shape
    out = torch.empty(truth_TLE.shape, dtype=torch.float32)
    ahead = torch.full((layers, experts), NEVER)
    for t in range(steps - 1, -1, -1):
        out[t] = ahead
        ahead = torch.where(truth_TLE[t], torch.ones(()), ahead + 1)
    return out


def last_use(truth_TLE: Tensor) -> Tensor:
    """Passes since the expert was used, seen just after pass t: 0 when t used it; inf when none has."""
    out = torch.empty(truth_TLE.shape, dtype=torch.float32)
    ago = torch.full(truth_TLE.shape[1:], NEVER)
    for t in range(truth_TLE.shape[0]):
        ago = torch.where(truth_TLE[t], torch.zeros(()), ago + 1)
        out[t] = ago
    return out


def pairwise_accuracy(score_N: Tensor, next_use_N: Tensor) -> tuple[float, int]:
    """Of all pairs whose next uses differ, the share whose order the score tells; and how many pairs.

    A higher score says "needed sooner". Equal scores count one half; (nan, 0) when no pair differs.
    """
    sooner = next_use_N[:, None] < next_use_N[None, :]
    pairs = int(sooner.sum())
    if pairs == 0:
        return float("nan"), 0
    right = (score_N[:, None] > score_N[None, :]).float() + 0.5 * (
        score_N[:, None] == score_N[None, :]
    ).float()
    return (right * sooner).sum().item() / pairs, pairs


def ranking_quality(
    truth_TLE: Tensor,
    scores: dict[str, Callable[[int], Tensor]],
    num_resident: int,
    every: int = 4,
) -> dict[str, float]:
    """Mean pairwise accuracy of each score among residents, at every `every`-th pass of one run.

    scores: name -> (t -> score_LE known just after pass t; higher is needed sooner). Residents are the
    num_resident experts used most recently, over all layers. Recency and frequency are always added. The
    true order counts visits of layers, so within a pass an earlier layer is sooner.
    """
    steps, layers, _ = truth_TLE.shape
    ahead, ago = next_use(truth_TLE), last_use(truth_TLE)
    used = truth_TLE.float().cumsum(0)
    layer_LE = torch.arange(layers, dtype=torch.float32)[:, None].expand(truth_TLE.shape[1:])
    recency = {"recency": lambda t: -(ago[t] * layers - layer_LE), "frequency": lambda t: used[t]}
    totals = {name: [0.0, 0] for name in (*scores, *recency)}
    for t in range(every - 1, steps - 1, every):
        when = (ago[t] * layers - layer_LE).reshape(-1)
        resident = when.topk(min(num_resident, when.numel()), largest=False, sorted=False).indices
        resident = resident[when[resident] < NEVER]
        order = (ahead[t] * layers + layer_LE).reshape(-1)[resident]
        for name, score in (scores | recency).items():
            accuracy, pairs = pairwise_accuracy(score(t).reshape(-1)[resident], order)
            if pairs:
                totals[name][0] += accuracy * pairs
                totals[name][1] += pairs
    return {name: total / pairs if pairs else float("nan") for name, (total, pairs) in totals.items()}
