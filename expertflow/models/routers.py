"""The routers of a loaded model as plain products, for the predictors that ask them (look-ahead)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from expertflow.models.spans import MoELayer


def decoder_layers(model: PreTrainedModel, moe_layers: Sequence[MoELayer]) -> list[MoELayer]:
    """The MoE layers that decode: all of a decoder-only model."""
    if not model.config.is_encoder_decoder:
        return list(moe_layers)
    encoder = {id(module) for module in model.get_encoder().modules()}
    return [layer for layer in moe_layers if id(model.get_submodule(layer.name)) not in encoder]


def router_products(model: PreTrainedModel, layers: Sequence[MoELayer]) -> list[tuple[Tensor, Tensor | None]]:
    """Weight (E x D) and bias of each layer's router, the model's own tensors. ValueError where it is no product."""
    found = []
    for layer in layers:
        router = _router(model, layer)
        router = getattr(router, "classifier", router)  # Switch and NLLB keep the product inside
        weight = getattr(router, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] != layer.num_experts:
            raise ValueError(
                f"the router of {layer.name} is no product with one weight per expert, so look-ahead cannot "
                f"ask it"
            )
        bias = getattr(router, "bias", None)
        found.append((weight.detach(), bias.detach() if isinstance(bias, Tensor) else None))
    return found


def _router(model: PreTrainedModel, layer: MoELayer) -> torch.nn.Module | None:
    block = model.get_submodule(layer.name.rpartition(".")[0])
    return next((child for name, child in block.named_children() if name in ("gate", "router")), None)
