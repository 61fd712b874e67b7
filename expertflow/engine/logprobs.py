"""Log-probabilities of chosen tokens, and of the likeliest ones beside them.

Of the model's own distribution: log softmax of its logits in float32, before logit_bias, penalties, temperature,
filters and transformers' processors (vLLM's `raw_logprobs`). So what a filter excludes has its probability too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenLogprobs:
    """One position of an answer. top: (token id, natural logarithm), likeliest first; the chosen one may be missing."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits_V: Tensor, token_id: int, most: int | None) -> TokenLogprobs | None:
    """Of `token_id` and of the `most` likeliest; None where none were asked for. logits_V: as the model gave them."""
    if most is None:
        return None
    logprobs_V = logits_V.log_softmax(dim=-1)
    best = logprobs_V.topk(min(most, len(logprobs_V)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs_V[token_id]), top)
