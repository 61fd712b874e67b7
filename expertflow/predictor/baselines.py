"""What a predictor must beat, a screen each: they need no hidden state and learn nothing while serving.

Those that read hidden states are in layer_baselines.py, the one that learns while serving in online_table.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from expertflow.core import routes_to_mask
from expertflow.predictor.protocol import UNKNOWN, PathContext

_CHOSEN = 0.9  # of what a draft's router chose: a mixture learns how far to trust it


def said_by_routes(routes_NK: Tensor, experts: int, widest: int) -> Tensor:
    """p_NE of a layer with so many experts, E = widest, where a draft's router chose these; `experts` is nowhere."""
    rows, top_k = routes_NK.shape
    # The others share what is left of top_k, the number of experts that a token takes.
    p_NE = torch.full((rows, widest + 1), top_k * (1 - _CHOSEN) / max(1, experts - top_k))
    p_NE.scatter_(1, routes_NK.clamp(max=widest), _CHOSEN)
    p_NE[:, experts:] = 0.0  # "nowhere", and what a narrower layer lacks
    return p_NE[:, :widest]


def multi_hot(routes_NLK: Tensor, num_experts: int) -> Tensor:
    """routes_to_mask of any integer dtype; UNKNOWN positions are all False."""
    routes = routes_NLK.long()
    return routes_to_mask(routes.masked_fill(routes == UNKNOWN, num_experts), num_experts)


def used_by_any(routes_NLK: Tensor, num_experts: int) -> Tensor:
    """used_LE (bool): `multi_hot` of any of the N, in two calls of numpy; for each pass, between large products."""
    layers = routes_NLK.shape[1]
    used_LE = np.zeros((layers, num_experts + 1), bool)  # the last one is nowhere, and UNKNOWN is -1
    used_LE[np.arange(layers)[:, None], routes_NLK.numpy()] = True
    return torch.from_numpy(used_LE[:, :-1])


class TLP:
    """Temporal locality (the paper's baseline): the routes of the step before."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def predict(self, context: PathContext) -> Tensor:
        """p_BSLE of ones and zeros; zeros where the step before is not known, as in prefill."""
        if context.routes_BTLK is None:
            raise ValueError("TLP repeats the routes of the step before; give context.routes_BTLK")
        batch, length = context.target_BT.shape
        routes_BTLK = context.routes_BTLK.long()
        first = length - context.num_new
        known = routes_BTLK[:, max(first - 1, 0) : length - 1]
        if first == 0:
            nothing = torch.full((batch, 1, *routes_BTLK.shape[2:]), UNKNOWN)
            known = torch.cat([nothing, known], dim=1)
        return multi_hot(known, self.num_experts).float()


class SLP:
    """Spatial locality (the paper's baseline): the next layer uses the numbers this layer used."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def observe(self, layer: int, hidden_BD: Tensor | None, routes_BK: Tensor | None) -> Tensor | None:
        if routes_BK is None:
            return None
        return multi_hot(routes_BK, self.num_experts).float()


class Popularity:
    """How often a layer uses each expert, whatever the token."""

    def __init__(self, p_LE: Tensor):
        self.p_LE = p_LE

    @staticmethod
    def fit(sequences: Iterable[tuple[Tensor, Tensor]], num_experts: int) -> Popularity:
        """sequences: (token ids_T, routes_TLK) of the training split. Raises ValueError without any."""
        count_LE, tokens = None, 0
        for ids_T, routes_TLK in sequences:
            used_LE = multi_hot(routes_TLK, num_experts).sum(0).float()
            count_LE = used_LE if count_LE is None else count_LE + used_LE
            tokens += len(ids_T)
        if count_LE is None or not tokens:
            raise ValueError("no token to count: give sequences of the training split")
        return Popularity(count_LE / tokens)

    def predict(self, context: PathContext) -> Tensor:
        batch = context.target_BT.shape[0]
        return self.p_LE.expand(batch, context.num_new, *self.p_LE.shape)


class TokenTable:
    """P(expert | layer, token id), counted on the training split; rare tokens lean on popularity."""

    def __init__(self, row_V: Tensor, p_RLE: Tensor):
        """row_V: int64, token id -> row of p_RLE; row 0 is popularity, for tokens never seen."""
        self.row_V = row_V
        self.p_RLE = p_RLE

    @staticmethod
    def fit(
        sequences: Iterable[tuple[Tensor, Tensor]],
        num_experts: int,
        vocab_size: int,
        prior_tokens: float = 1.0,
    ) -> TokenTable:
        """prior_tokens: how many occurrences the back-off to popularity weighs as much as.

        Only tokens that occur get a row. Raises ValueError without sequences.
        """
        sequences = list(sequences)
        p_LE = Popularity.fit(sequences, num_experts).p_LE
        seen = torch.cat([ids_T.long() for ids_T, _ in sequences]).unique()
        row_V = torch.zeros(vocab_size, dtype=torch.int64)
        row_V[seen] = torch.arange(1, len(seen) + 1)
        count_RLE = torch.zeros(len(seen) + 1, *p_LE.shape)
        tokens_R = torch.zeros(len(seen) + 1)
        for ids_T, routes_TLK in sequences:
            rows_T = row_V[ids_T.long()]
            count_RLE.index_add_(0, rows_T, multi_hot(routes_TLK, num_experts).float())
            tokens_R.index_add_(0, rows_T, torch.ones(len(rows_T)))
        p_RLE = (count_RLE + prior_tokens * p_LE) / (tokens_R + prior_tokens)[:, None, None]
        return TokenTable(row_V, p_RLE)

    def predict(self, context: PathContext) -> Tensor:
        return self.p_RLE[self.row_V[context.new_BS]]


class Oracle:
    """Knows the future because it is told: the bound nobody can beat."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self._routes_BSLK: Tensor | None = None

    def reveal(self, routes_BSLK: Tensor) -> None:
        """What the routers will choose at the new positions of the next `predict`."""
        self._routes_BSLK = routes_BSLK

    def predict(self, context: PathContext) -> Tensor:
        if self._routes_BSLK is None:
            raise ValueError("the oracle was told nothing; call reveal(routes_BSLK) before predict")
        return multi_hot(self._routes_BSLK, self.num_experts).float()
