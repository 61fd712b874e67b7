"""What a predictor is: one that speaks before a pass, and one that speaks during it.

A PathPredictor sees tokens and names experts of every layer at once, so loads can be ordered for the whole
pass. A LayerPredictor sees one layer at work and names the experts of the next. Neither decides anything.

Every prediction is causal: what is said of a position depends on no later token and on no route of that
position or a later one. So one call for a whole text says the same as one call per step, and the evaluation
makes use of that (predictors that learn between steps are stepped through).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

UNKNOWN = -1  # in PathContext.routes_BTLK: nobody has run that position yet


@dataclass(frozen=True, kw_only=True)
class PathContext:
    """What is known before a pass, for B sequences.

    source_BS, source_mask_BS: int64 and bool, what an encoder read, padded on the right; None without one.
    target_BT, target_mask_BT: int64 and bool, all tokens on the decoder's side, the new ones included;
        padded on the left. A mask of None means that all are real.
    num_new: the last num_new positions are wanted: 1 in decode, the prompt's length in prefill.
    routes_BTLK: integer routes of the decoder side's MoE layers; UNKNOWN where not known. For a position t
        only entries before t may be used. An id of E means "nowhere" (dropped over capacity).
    num_prefill_B: target tokens of each row that were known before the first decode step; a predictor that
        reads the prompt in both directions must know where it ends. None where nobody asks.
    """

    target_BT: Tensor
    target_mask_BT: Tensor | None = None
    num_new: int = 1
    source_BS: Tensor | None = None
    source_mask_BS: Tensor | None = None
    routes_BTLK: Tensor | None = None
    num_prefill_B: Tensor | None = None

    @property
    def new_BS(self) -> Tensor:
        """Token ids of the positions that are wanted."""
        return self.target_BT[:, self.target_BT.shape[1] - self.num_new :]

    @property
    def new_mask_BS(self) -> Tensor | None:
        if self.target_mask_BT is None:
            return None
        return self.target_mask_BT[:, self.target_mask_BT.shape[1] - self.num_new :]


@runtime_checkable
class PathPredictor(Protocol):
    """Predicts before the pass."""

    def predict(self, context: PathContext) -> Tensor:
        """p_BSLE, float in [0, 1]: S = num_new, L = MoE layers on the decoder's side. Padding: anything."""
        ...


@runtime_checkable
class SourcePredictor(Protocol):
    """A PathPredictor of an encoder-decoder model also predicts the encoder's layers."""

    def predict_source(self, context: PathContext) -> Tensor:
        """p_BSLE at the encoder's positions (context.source_BS), L = the encoder's MoE layers."""
        ...


@runtime_checkable
class NextUsePredictor(Protocol):
    """Sees further than this pass: what a cache evicts by."""

    def next_use_path(self, context: PathContext) -> Tensor:
        """passes_BSLE: how many passes until the expert is used again, expected just after each new position."""
        ...


@runtime_checkable
class OnlinePredictor(Protocol):
    """Learns from every route it is shown."""

    def observe_pass(self, context: PathContext, routes_BSLK: Tensor) -> None:
        """Learn what the routers chose at the new positions of `context`; padding is skipped."""
        ...


@runtime_checkable
class LayerPredictor(Protocol):
    """Predicts during the pass, one layer ahead."""

    def observe(self, layer: int, hidden_BD: Tensor | None, routes_BK: Tensor | None) -> Tensor | None:
        """What entered MoE block `layer` and what its router chose -> p_BE of MoE layer + 1.

        layer: on the decoder's side, from 0. None when this predictor has nothing to say of that layer.
        B counts rows: tokens of one pass, of any sequence.
        """
        ...
