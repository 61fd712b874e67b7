"""An oracle made worse step by step, and how good a predictor is on the same scale."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from expertflow.core import routes_to_mask
from expertflow.sim.workload import Foretold, shape_of


def degraded(oracle: Foretold, swap: float, seed: int = 0) -> Foretold:
    """Predictions that name K experts per token and layer, each swapped with probability `swap` for one that the token
    does not use.

    It knows how good it is: a named expert has probability 1 - swap, the others share the rest alike. Raises
    ValueError for a probability that is none.
    """
    if not 0 <= swap <= 1:
        raise ValueError(f"swap={swap} must lie between 0 and 1")
    draw = torch.Generator().manual_seed(seed)
    return replace(
        oracle,
        prediction=f"oracle, {swap:.0%} swapped",
        p_TLE=[_named(_true(oracle, n), swap, draw) for n in range(len(oracle.sequences))],
    )


def _named(true_TLE: Tensor, swap: float, draw: torch.Generator) -> Tensor:
    top_k = int(true_TLE[0, 0].sum())
    others = true_TLE.shape[-1] - top_k
    order_TLE = torch.rand(true_TLE.shape, generator=draw)
    # The true ones that go, and as many of the others that come, each at random: swapped ranks among equals.
    goes_TLE = true_TLE & (torch.rand(true_TLE.shape, generator=draw) < swap)
    number_TL1 = goes_TLE.sum(-1, keepdim=True).clamp(max=others)
    rank_TLE = order_TLE.masked_fill(true_TLE, 2.0).argsort(-1).argsort(-1)
    named_TLE = (true_TLE & ~goes_TLE) | (rank_TLE < number_TL1)
    experts = true_TLE.shape[-1]
    rest = swap * top_k / (experts - top_k) if experts > top_k else 0.0
    return torch.where(named_TLE, 1.0 - swap, rest).half()


def _true(foretold: Foretold, number: int) -> Tensor:
    """Which experts the decode steps of a sequence used, [T, L, E]."""
    sequence = foretold.sequences[number]
    routes = torch.from_numpy(sequence.target_routes_TLK[sequence.num_prefill :].astype("int64"))
    return routes_to_mask(routes, max(shape_of(foretold.meta).experts_per_layer))


def recall(foretold: Foretold) -> float:
    """Of the experts that tokens used, the share among the K that were thought most likely. 1 - swap of a degraded
    oracle (for swap below the point where the others are as likely)."""
    assert foretold.p_TLE is not None, f"{foretold.prediction!r} predicts nothing"
    right = total = 0
    for number, p_TLE in enumerate(foretold.p_TLE):
        true_TLE = _true(foretold, number)
        best_TLK = p_TLE.float().topk(foretold.top_k, dim=-1).indices
        right += int(true_TLE.gather(-1, best_TLK).sum())
        total += int(true_TLE.sum())
    return right / total
