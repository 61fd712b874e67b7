"""Record what the routers of a loaded model choose, on any forward pass, whoever calls it.

`run_experts` sees the routes of every supported family; this file listens there and knows which call of
which stack (encoder, decoder) they belong to. It computes nothing and keeps references, no copies.
Recording and writing took 1.4 to 1.9 % of the CPU seconds of a run (models/tiny-moe, 8 sequences, one core, 2026-11).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertflow.models.experts import Attachment

Side = Literal["source", "target"]


class SequenceRoutes(NamedTuple):
    """What one sequence brought to one pass, without padding."""

    ids_T: np.ndarray  # int32
    routes_TLK: np.ndarray  # int32; the number of experts means "nowhere"
    weights_TLK: np.ndarray  # float32; 0 where the route is "nowhere"


@dataclass
class RoutedPass:
    """One call of one stack: the encoder's (side "source") or the decoder's ("target").

    The lists are by MoE layer of that stack, in order; T counts B sequences times their new positions,
    padding included, row by row. A decoder-only model has passes of side "target" alone.
    """

    side: Side
    ids_BT: Tensor
    mask_BT: Tensor  # bool: no padding
    num_experts_L: list[int]
    routes_L: list[Tensor] = field(default_factory=list)  # each [T, K]
    weights_L: list[Tensor] = field(default_factory=list)  # each [T, K]

    def sequences(self) -> list[SequenceRoutes]:
        """One entry for each of the B rows, its padding dropped; all of a row may be padding."""
        sequences, positions = self.ids_BT.shape
        shape = (sequences, positions, len(self.routes_L), -1)
        if self.routes_L:
            routes_BTLK = torch.stack(self.routes_L, dim=1).view(shape).to("cpu", torch.int32)
            weights_BTLK = torch.stack(self.weights_L, dim=1).view(shape).to("cpu", torch.float32)
            experts_L1 = torch.tensor(self.num_experts_L).view(-1, 1)
            weights_BTLK = weights_BTLK.masked_fill(routes_BTLK == experts_L1, 0.0)
        else:  # an encoder without sparse layers
            routes_BTLK = torch.zeros(sequences, positions, 0, 1, dtype=torch.int32)
            weights_BTLK = routes_BTLK.float()
        ids_BT, mask_BT = self.ids_BT.to("cpu", torch.int32), self.mask_BT.cpu()
        return [
            SequenceRoutes(ids_T[keep].numpy(), routes[keep].numpy(), weights[keep].numpy())
            for ids_T, keep, routes, weights in zip(ids_BT, mask_BT, routes_BTLK, weights_BTLK, strict=True)
        ]


class Capture:
    """The passes recorded so far. A pass that an exception ended is left out."""

    def __init__(self, num_experts: dict[Side, list[int]]):
        self.num_experts = num_experts  # by layer, of each stack
        self.passes: list[RoutedPass] = []
        self._open: dict[greenlet, RoutedPass] = {}  # passes that run together are several at once

    def take(self) -> list[RoutedPass]:
        """The passes since the last call."""
        passes, self.passes = self.passes, []
        return passes

    def _begin(self, side: Side, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        if ids_BT is None:
            raise ValueError(
                "routes are recorded with their tokens: call the model with input_ids, not embeddings"
            )
        mask = kwargs.get("attention_mask")
        if (
            mask is None or mask.dim() != 2
        ):  # a decoder with an encoder before it: padding only follows the end
            mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        else:  # it covers the positions in the KV cache too
            mask_BT = mask[:, mask.shape[1] - ids_BT.shape[1] :].bool()
        self._open[getcurrent()] = RoutedPass(side, ids_BT, mask_BT, self.num_experts[side])

    def _record(self, index_TK: Tensor, weight_TK: Tensor) -> None:
        routed = self._open.get(getcurrent())
        if routed is None:
            raise ValueError("an experts layer ran outside of the model's forward pass; call the whole model")
        assert index_TK.shape[0] == routed.ids_BT.numel(), "the experts saw other tokens than the model"
        routed.routes_L.append(index_TK.detach())
        routed.weights_L.append(weight_TK.detach())

    def _end(self) -> None:
        routed = self._open.pop(getcurrent(), None)
        assert routed is not None, "a forward pass that never began"
        assert len(routed.routes_L) == len(routed.num_experts_L), "an experts layer did not run"
        self.passes.append(routed)


@contextmanager
def capture_routes(model: PreTrainedModel) -> Iterator[Capture]:
    """Record every forward pass of a model that expertflow has loaded, until the block ends.

    Raises ValueError when the model is being recorded already.
    """
    loaded: Any = model.expertflow
    experts: list[Any] = [model.get_submodule(layer.name) for layer in loaded.moe_layers]
    attachments: list[Attachment] = [module.expertflow for module in experts]
    if any(attachment.recorder is not None for attachment in attachments):
        raise ValueError("this model is being recorded already; leave that capture_routes block first")
    source_layers = count_source_layers(model)
    num_experts = [attachment.num_experts for attachment in attachments]
    capture = Capture({"source": num_experts[:source_layers], "target": num_experts[source_layers:]})
    hooks: list[Any] = []
    try:
        for side, stack in _stacks(model):
            hooks += _listen(stack, side, capture)
        for attachment in attachments:
            attachment.recorder = lambda layer, index_TK, weight_TK: capture._record(index_TK, weight_TK)
        yield capture
    finally:
        for attachment in attachments:
            attachment.recorder = None
        for hook in hooks:
            hook.remove()


def count_source_layers(model: PreTrainedModel) -> int:
    """How many of the model's MoE layers are its encoder's; they come first."""
    if not model.config.is_encoder_decoder:
        return 0
    of_encoder = {id(module) for module in model.get_encoder().modules()}
    loaded: Any = model.expertflow
    inside = [id(model.get_submodule(layer.name)) in of_encoder for layer in loaded.moe_layers]
    assert inside == sorted(inside, reverse=True), "MoE layers of encoder and decoder are interleaved"
    return sum(inside)


@torch.no_grad()
def routed_experts_per_token(model: PreTrainedModel) -> int:
    """K, found by running one token: each family has its own name for it in config.json."""
    one = torch.zeros(1, 1, dtype=torch.long)
    with capture_routes(model) as capture:
        if model.config.is_encoder_decoder:
            model(input_ids=one, decoder_input_ids=one)
        else:
            model(input_ids=one)
    found = {routes.shape[1] for routed in capture.passes for routes in routed.routes_L}
    if len(found) != 1:
        raise ValueError(
            f"the layers of this model route a token to {sorted(found)} experts; traces need one number"
        )
    return found.pop()


def _stacks(model: PreTrainedModel) -> list[tuple[Side, nn.Module]]:
    if not model.config.is_encoder_decoder:
        return [("target", model)]
    return [("source", model.get_encoder()), ("target", model.get_decoder())]


def _listen(stack: nn.Module, side: Side, capture: Capture) -> list[Any]:
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        capture._begin(side, args, kwargs)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        capture._end()

    return [stack.register_forward_pre_hook(begin, with_kwargs=True), stack.register_forward_hook(end)]
