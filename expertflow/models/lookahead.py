"""Gate look-ahead: ask the next layer's router about this layer's input, and prefetch what it names.

No training, and right more often than not: the residual stream changes slowly from layer to layer. It is a
hint and nothing else: the real router has the last word, so a wrong guess costs time, never a bit. It uses
the disk while attention computes; demands go before it, and guesses that are not wanted are dropped.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertflow.core import ExpertId
from expertflow.models.spans import MoELayer

logger = logging.getLogger(__name__)
# Of more tokens nearly every expert is needed, and demand loads keep the disk busy anyway.
MAX_TOKENS = 8


class Failure:
    """Of any layer's look-ahead: whether it is still asked, which all layers share."""

    def __init__(self) -> None:
        self.cause: str | None = None

    def note(self, error: Exception) -> None:
        self.cause = f"{type(error).__name__}: {error}"
        logger.warning(
            "look-ahead failed (%s) and is not asked again; the run goes on without it, and its output is the same",
            self.cause,
        )


class LookAhead:
    """Predicts a layer's experts from the hidden states that enter the MoE block before it.

    block: the router's, which gives it what it wants beside them by name (MiniMax-M2 and LFM2: a bias).
    """

    def __init__(
        self,
        router: nn.Module,
        block: nn.Module,
        layer: int,
        num_experts: int,
        failure: Failure | None = None,
    ):
        self.router = router
        self.block = block
        self.layer = layer
        self.num_experts = num_experts
        self.failure = failure or Failure()
        wanted = list(inspect.signature(router.forward).parameters)[1:]
        self._from_block = [name for name in wanted if hasattr(block, name)]

    def predict(self, hidden_TD: Tensor) -> list[ExpertId]:
        """Experts that the router would choose, those wanted by most tokens first.

        [] for many tokens, and after a failure: a router may want more than the hidden states.
        """
        if hidden_TD.shape[0] > MAX_TOKENS or self.failure.cause is not None:
            return []
        try:
            with torch.no_grad():
                return self._predict(hidden_TD)
        except Exception as error:
            self.failure.note(error)
            return []

    def _predict(self, hidden_TD: Tensor) -> list[ExpertId]:
        # Not called as a module: hooks are for the router's own turn (transformers records router logits by one).
        given = {name: getattr(self.block, name) for name in self._from_block}
        index_TK = chosen_experts(self.router.forward(hidden_TD, **given))
        if index_TK is None:
            return []
        experts, counts = index_TK.reshape(-1).unique(return_counts=True)
        ordered = experts[counts.argsort(descending=True, stable=True)].tolist()
        return [ExpertId(self.layer, expert) for expert in ordered if expert < self.num_experts]


def chosen_experts(routed: Any) -> Tensor | None:
    """The integer tensor [T, K] in what a router module returned, or None when it only returns scores."""
    outputs = routed if isinstance(routed, tuple) else (routed,)
    for output in outputs:
        if isinstance(output, Tensor) and output.dim() == 2 and not output.is_floating_point():
            return output
    return None


def look_ahead_for(model: PreTrainedModel, moe_layers: Sequence[MoELayer]) -> list[LookAhead | None]:
    """For each MoE layer, what predicts the layer after it.

    None where the next block's router does not say which experts it chose (DeepSeek-V3 groups scores
    outside of it; Switch gives a mask), and for the last layer: the first one's input is not known yet.
    """
    found: list[LookAhead | None] = []
    failure = Failure()
    for layer in moe_layers[1:]:
        block = model.get_submodule(layer.name.rpartition(".")[0])
        router = next((child for name, child in block.named_children() if name in ("gate", "router")), None)
        if router is None or layer.one_module_per_expert:
            found.append(None)
        else:
            found.append(LookAhead(router, block, layer.layer, layer.num_experts, failure))
    return [*found, None]
