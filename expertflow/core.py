"""The vocabulary: what an expert is called, and how routes are counted.

No files, threads, clocks or devices: everything that decides builds on this.
Shape letters: B sequences, T tokens, L MoE layers, E experts per layer, K experts per token, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class ExpertId(NamedTuple):
    layer: int  # counts MoE layers only; Switch numbers the encoder first
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of MoE layer {self.layer}"


@dataclass(frozen=True, slots=True)
class MoEShape:
    """How many experts a model has: E differs between layers in a few families only."""

    experts_per_layer: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.experts_per_layer)

    @property
    def num_experts(self) -> int:
        """All experts of all layers."""
        return sum(self.experts_per_layer)


def routes_to_mask(routes_TK: Tensor, num_experts: int) -> Tensor:
    """Multi-hot form of routes, of one layer or of many: any leading dimensions.

    routes_TK: integer expert ids; an id equal to num_experts means "nowhere" (dropped over capacity).
    Returns mask_TE, bool: token t needs expert e.
    """
    shape = (*routes_TK.shape[:-1], num_experts + 1)
    mask_TE = torch.zeros(shape, dtype=torch.bool, device=routes_TK.device)
    mask_TE.scatter_(-1, routes_TK, True)
    return mask_TE[..., :num_experts]
