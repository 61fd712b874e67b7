"""Sampler: logits to the next token of one row, each row by its own SamplingParams.

Randomness is a function of (seed, answer, position, token id) and of nothing else: not of the row, the
batch, the budget, nor of how many numbers others have drawn. A counter-based generator gives every
position its own noise, so nothing has to be carried along and a position can be drawn again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from expertflow.engine.sampling import SamplingParams

_GREEDY_BELOW = 1e-5  # of temperature, as in vLLM: logits divided by less leave float32


def choose_token(
    logits_V: Tensor,
    params: SamplingParams,
    *,
    seed: int,
    answer: int,
    position: int,
    seen: Sequence[int],
    written: Sequence[int] = (),
) -> int:
    """The token at `position` of answer number `answer`.

    logits_V: float32, unchanged. seen: the ids that the repetition penalty counts (prompt and answer). written: those
    of the answer so far, which the presence and frequency penalties count.
    The order is vLLM's, and transformers' where it has them: bias, repetition, frequency and presence penalty,
    temperature, top-k, top-p, min-p.
    """
    if params.logit_bias is not None:
        logits_V = biased(logits_V, params.logit_bias)
    if params.repetition_penalty != 1.0:
        logits_V = penalize(logits_V, seen, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        logits_V = penalize_written(
            logits_V, written, presence=params.presence_penalty, frequency=params.frequency_penalty
        )
    if params.temperature < _GREEDY_BELOW:
        return int(logits_V.argmax())
    ids_N, logits_N = candidates(logits_V / params.temperature, params)
    # The largest of logit + Gumbel noise is a draw from softmax(logits). The noise belongs to the token id:
    # a logit that differs in its last bits elsewhere in the vocabulary cannot shift the draw.
    gumbel_V = gumbel_noise(len(logits_V), seed, answer, position)
    return int(ids_N[(logits_N.double() + gumbel_V[ids_N]).argmax()])


def penalize(logits_V: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens in `seen`, each token once."""
    ids_N = torch.tensor(sorted(set(seen)), dtype=torch.long)
    logits_V = logits_V.clone()
    logits_N = logits_V[ids_N]
    logits_V[ids_N] = torch.where(logits_N < 0, logits_N * penalty, logits_N / penalty)
    return logits_V


def penalize_written(
    logits_V: Tensor, written: Sequence[int], *, presence: float, frequency: float
) -> Tensor:
    """Subtract from the logit of each token in `written`: presence once, frequency each time it is there."""
    counts = Counter(written)
    if not counts:
        return logits_V
    ids_N = torch.tensor(list(counts), dtype=torch.long)
    times_N = torch.tensor(list(counts.values()), dtype=logits_V.dtype)
    logits_V = logits_V.clone()
    logits_V[ids_N] -= presence + frequency * times_N
    return logits_V


def biased(logits_V: Tensor, bias: Mapping[int, float]) -> Tensor:
    """logits_V with each token id's bias added."""
    logits_V = logits_V.clone()
    logits_V[torch.tensor(list(bias))] += torch.tensor(list(bias.values()), dtype=logits_V.dtype)
    return logits_V


def candidates(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """(ids_N, logits_N): what top-k, top-p and min-p leave; always the likeliest token at least.

    Working on the survivors of top-k keeps the sort that top-p needs small.
    """
    if params.top_k and params.top_k < len(logits_V):
        threshold = logits_V.topk(params.top_k).values[-1]
        ids_N = (logits_V >= threshold).nonzero().squeeze(1)
    else:
        ids_N = torch.arange(len(logits_V))
    logits_N = logits_V[ids_N]
    if params.top_p < 1.0:
        ascending_N, order_N = logits_N.sort()
        keep_N = ascending_N.softmax(dim=0).cumsum(dim=0) > 1 - params.top_p
        keep_N[-1] = True
        kept = order_N[keep_N]
        ids_N, logits_N = ids_N[kept], logits_N[kept]
    if params.min_p > 0:
        keep_N = logits_N >= logits_N.max() + math.log(params.min_p)
        ids_N, logits_N = ids_N[keep_N], logits_N[keep_N]
    return ids_N, logits_N


def gumbel_noise(vocabulary: int, seed: int, answer: int, position: int) -> Tensor:
    """float64[V], the same for the same arguments on every machine."""
    philox = np.random.Philox(key=np.array([seed, answer], np.uint64), counter=[0, position, 0, 0])
    uniform_V = torch.from_numpy(np.random.Generator(philox).random(vocabulary))
    exponential_V = -torch.log1p(-uniform_V)
    return -torch.log(exponential_V)
