"""The pieces of a T5 stack (Raffel et al., 2020): RMSNorm before each sublayer, biases by distance, no others.

Positions enter only as the distance between two columns, so padding rows on the left shifts nothing and a
window of keys can be kept in a ring. Extra letters: N new columns, W columns of a ring, M columns attended to,
H heads, F features of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_BUCKETS = 32
FARTHEST = 128  # tokens; all larger distances share one bias, as in T5
_MASKED = -1e9  # finite: a row of padding attends to everything instead of turning into NaN


def distance_buckets(distance: Tensor, both_ways: bool) -> Tensor:
    """T5's buckets: exact for near keys, logarithmic up to FARTHEST.

    distance: int64, query column minus key column. both_ways: keys to the right get buckets of their own; else
    they share bucket 0 (and are masked). Returns int64 of the same shape, 0 to NUM_BUCKETS - 1.
    """
    buckets, offset = NUM_BUCKETS, torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        offset = (distance < 0) * buckets
        distance = distance.abs()
    distance = distance.clamp(min=0)
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1) / exact) / math.log(FARTHEST / exact) * (buckets - exact)
    return offset + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))


class DistanceBias(nn.Module):
    """One learnt number per head and bucket, shared by the layers of a stack."""

    def __init__(self, heads: int, both_ways: bool):
        super().__init__()
        self.table = nn.Embedding(NUM_BUCKETS, heads)
        self.both_ways = both_ways
        nn.init.zeros_(self.table.weight)

    def forward(self, query_N: Tensor, key_M: Tensor) -> Tensor:
        """Column numbers, int64 -> bias_HNM."""
        bucket_NM = distance_buckets(query_N[:, None] - key_M[None, :], self.both_ways)
        return self.table(bucket_NM).permute(2, 0, 1)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def keys_values(self, states_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """(keys_BHMF, values_BHMF)."""
        split = states_BMD.unflatten(-1, (self.heads, -1)).shape
        keys = self.key(states_BMD).view(split).transpose(1, 2)
        return keys, self.value(states_BMD).view(split).transpose(1, 2)

    def forward(self, states_BND: Tensor, keys_BHMF: Tensor, values_BHMF: Tensor, bias: Tensor) -> Tensor:
        """bias: added to the scores, broadcast to BHNM."""
        query = self.query(states_BND).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores_BHNM = query @ keys_BHMF.transpose(2, 3) * query.shape[-1] ** -0.5 + bias
        return self.out((scores_BHNM.softmax(-1) @ values_BHMF).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, attention to an encoder's states where there is one, feed-forward; all residual."""

    def __init__(self, hidden: int, feed_forward: int, heads: int, cross: bool):
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.attention = Attention(hidden, heads)
        self.cross_norm = nn.RMSNorm(hidden, eps=1e-6) if cross else None
        self.cross = Attention(hidden, heads) if cross else None
        self.feed_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.up = nn.Linear(hidden, feed_forward, bias=False)
        self.down = nn.Linear(feed_forward, hidden, bias=False)

    def attend_and_feed(
        self,
        states_BND: Tensor,
        normed_BND: Tensor,
        keys_values: tuple[Tensor, Tensor],
        bias: Tensor,
        memory: tuple[Tensor, Tensor, Tensor] | None,
    ) -> Tensor:
        """keys_values: of self-attention, the new columns included. memory: keys, values and bias of cross."""
        states_BND = states_BND + self.attention(normed_BND, *keys_values, bias)
        if self.cross is not None and self.cross_norm is not None:
            assert memory is not None, "a block with cross-attention needs an encoder's states"
            states_BND = states_BND + self.cross(self.cross_norm(states_BND), *memory)
        return states_BND + self.down(F.relu(self.up(self.feed_norm(states_BND))))


class Encoder(nn.Module):
    """Reads in both directions."""

    def __init__(self, hidden: int, feed_forward: int, heads: int, layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(hidden, feed_forward, heads, cross=False) for _ in range(layers))
        self.bias = DistanceBias(heads, both_ways=True)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)

    def forward(self, states_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        columns_S = torch.arange(states_BSD.shape[1], device=states_BSD.device)
        bias_BHSS = self.bias(columns_S, columns_S)[None] + blocked(mask_BS)[:, None, None]
        blocks: Any = self.blocks
        for block in blocks:
            normed_BSD = block.attention_norm(states_BSD)
            pair = block.attention.keys_values(normed_BSD)
            states_BSD = block.attend_and_feed(states_BSD, normed_BSD, pair, bias_BHSS, None)
        return self.norm(states_BSD)


def blocked(mask: Tensor) -> Tensor:
    """bool, true where a key may be seen -> what to add to its score."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, _MASKED)
