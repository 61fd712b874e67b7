"""One fast experts function for every gated architecture of the zoo.

Not a kernel: rows are sorted by expert, each expert multiplies its own contiguous slice, and nothing is
padded or dropped. The routing weight is applied to the inner activations (I wide) and not to the outputs
(D wide), which is the same product and several times less memory traffic at these sizes.
It is registered under EXPERTS_NAME into transformers, so a model trains through its published class.
Switch lies outside transformers' experts interface and has a function of its own at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, silu

EXPERTS_NAME = "zoo_sorted"


# oneDNN compiles a kernel per matrix shape, so free row counts cost a compilation for nearly every call:
# 33 GFLOP/s against 250 with counts rounded up to 64 (one core with AMX, bf16, 2026-11).
ROW_MULTIPLE = 64


def _layout(experts_NK: Tensor, num_experts: int) -> tuple[list[int], Tensor, Tensor]:
    """Where each (token, choice) pair goes: expert by expert, each block padded to ROW_MULTIPLE rows.

    Returns rows per block, slot_NK (row of each pair) and pair_S (pair of each row; padding points at pair 0).
    """
    flat_P = experts_NK.reshape(-1)
    order_P = torch.argsort(flat_P, stable=True)
    counts_E = torch.bincount(flat_P, minlength=num_experts)
    padded_E = (counts_E + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    row_P = torch.arange(len(flat_P), device=flat_P.device) + shift_E[flat_P[order_P]]
    rows = padded_E.tolist()
    pair_S = flat_P.new_zeros(sum(rows))
    pair_S[row_P] = order_P
    slot_P = torch.empty_like(order_P)
    slot_P[order_P] = row_P
    return rows, slot_P, pair_S


def _row_weights(weights_NK: Tensor, slot_P: Tensor, num_rows: int) -> Tensor:
    """Routing weight per row; zero in padding, which makes every gradient of a padded row zero too."""
    weight_S1 = weights_NK.new_zeros(num_rows, 1)
    weight_S1[slot_P] = weights_NK.reshape(-1, 1)
    return weight_S1


def _blocks(rows: list[int]) -> list[tuple[int, slice]]:
    start, blocks = 0, []
    for expert, count in enumerate(rows):
        if count:
            blocks.append((expert, slice(start, start + count)))
            start += count
    return blocks


def _inner(hidden_SH: Tensor, weight_S1: Tensor) -> Tensor:
    inner = hidden_SH.shape[1] // 2
    return silu(hidden_SH[:, :inner]) * hidden_SH[:, inner:] * weight_S1


def _inner_backward(hidden_SH: Tensor, weight_S1: Tensor, grad_SI: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of _inner for its hidden rows and its weights."""
    inner = hidden_SH.shape[1] // 2
    gate_SI, up_SI, grad_SI = hidden_SH[:, :inner].float(), hidden_SH[:, inner:].float(), grad_SI.float()
    sigmoid_SI = gate_SI.sigmoid()
    silu_SI = sigmoid_SI * gate_SI
    grad_weight_S = (grad_SI * silu_SI * up_SI).sum(dim=1)
    grad_act_SI = grad_SI * weight_S1
    # d silu(g) / dg = s + silu(g) * (1 - s) with s = sigmoid(g)
    grad_gate_SI = grad_act_SI * up_SI * (sigmoid_SI + silu_SI * (1 - sigmoid_SI))
    grad_hidden_SH = torch.cat((grad_gate_SI, grad_act_SI * silu_SI), dim=1).to(hidden_SH.dtype)
    return grad_hidden_SH, grad_weight_S.to(hidden_SH.dtype)


_elementwise: dict[str, Callable[..., Any]] = {"inner": _inner, "inner_backward": _inner_backward}


def compile_elementwise() -> None:
    """Fuse the elementwise parts with torch.compile (needs a C++ compiler): 14 ms to 2 ms per call at S = 18k."""
    _elementwise["inner"] = torch.compile(_inner, dynamic=True)
    _elementwise["inner_backward"] = torch.compile(_inner_backward, dynamic=True)


@torch.library.custom_op("zoo::gated_experts", mutates_args=())
def _gated_experts(
    x_ND: Tensor, gate_up_EHD: Tensor, down_EDI: Tensor, experts_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    N, K = experts_NK.shape
    rows, slot_P, pair_S = _layout(experts_NK, len(gate_up_EHD))
    x_SD = x_ND.index_select(0, pair_S // K)
    hidden_SH = x_SD.new_empty(len(pair_S), gate_up_EHD.shape[1])
    blocks = _blocks(rows)
    for expert, block in blocks:
        torch.mm(x_SD[block], gate_up_EHD[expert].t(), out=hidden_SH[block])
    inner_SI = _elementwise["inner"](hidden_SH, _row_weights(weights_NK, slot_P, len(pair_S)))
    y_SD = x_SD
    for expert, block in blocks:
        torch.mm(inner_SI[block], down_EDI[expert].t(), out=y_SD[block])
    return embedding_bag(slot_P.view(N, K), y_SD, mode="sum")  # a sum of K gathered rows, without the gather


@_gated_experts.register_fake
def _(x_ND, gate_up_EHD, down_EDI, experts_NK, weights_NK):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_ND)


@torch.library.custom_op("zoo::gated_experts_backward", mutates_args=())
def _gated_experts_backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_EHD: Tensor,
    down_EDI: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The hidden rows are computed again rather than kept: one more product, but none of the S x 2I
    # activations of six layers wait in memory.
    N, K = experts_NK.shape
    rows, slot_P, pair_S = _layout(experts_NK, len(gate_up_EHD))
    blocks = _blocks(rows)
    token_S = pair_S // K
    x_SD, grad_SD = x_ND.index_select(0, token_S), grad_ND.index_select(0, token_S)
    hidden_SH = x_SD.new_empty(len(pair_S), gate_up_EHD.shape[1])
    for expert, block in blocks:
        torch.mm(x_SD[block], gate_up_EHD[expert].t(), out=hidden_SH[block])
    weight_S1 = _row_weights(weights_NK, slot_P, len(pair_S))
    weighted_SI = _elementwise["inner"](hidden_SH, weight_S1)
    grad_weighted_SI = torch.empty_like(weighted_SI)
    grad_down_EDI = torch.zeros_like(down_EDI)
    for expert, block in blocks:
        torch.mm(grad_SD[block], down_EDI[expert], out=grad_weighted_SI[block])
        torch.mm(grad_SD[block].t(), weighted_SI[block], out=grad_down_EDI[expert])
    grad_hidden_SH, grad_weight_S = _elementwise["inner_backward"](hidden_SH, weight_S1, grad_weighted_SI)
    grad_gate_up_EHD = torch.zeros_like(gate_up_EHD)
    grad_x_SD = grad_SD
    for expert, block in blocks:
        torch.mm(grad_hidden_SH[block], gate_up_EHD[expert], out=grad_x_SD[block])
        torch.mm(grad_hidden_SH[block].t(), x_SD[block], out=grad_gate_up_EHD[expert])
    grad_x_ND = embedding_bag(slot_P.view(N, K), grad_x_SD, mode="sum")
    return grad_x_ND, grad_gate_up_EHD, grad_down_EDI, grad_weight_S.index_select(0, slot_P).view(N, K)


@_gated_experts_backward.register_fake
def _(grad_ND, x_ND, gate_up_EHD, down_EDI, experts_NK, weights_NK):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (x_ND, gate_up_EHD, down_EDI, weights_NK))


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
    grad_x, grad_gate_up, grad_down, grad_weights = _gated_experts_backward(
        grad_ND.contiguous(), *ctx.saved_tensors
    )
    return grad_x, grad_gate_up, grad_down, None, grad_weights


_gated_experts.register_autograd(_backward, setup_context=_remember)


def sorted_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts interface: [N, D], [N, K] int64, [N, K] to [N, D]; SiLU-gated experts only."""
    return _gated_experts(
        hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights.to(hidden_states.dtype)
    )


def switch_experts_forward(
    self: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    """SwitchTransformersExperts.forward as two batched products: [N, D], one-hot [N, 1, E], [N, 1] to [N, D].

    Tokens over the expert's capacity have an all-zero row in selected_experts and get zero.
    """
    mask_NE = selected_experts.squeeze(1)
    E, D = mask_NE.shape[1], hidden_states.shape[1]
    wi_EFD = torch.stack([self[f"expert_{expert}"].wi.weight for expert in range(E)])
    wo_EDF = torch.stack([self[f"expert_{expert}"].wo.weight for expert in range(E)])
    place_N = ((mask_NE.cumsum(dim=0) - 1) * mask_NE).sum(dim=1)
    rows = -(-int(mask_NE.sum(dim=0).max()) // ROW_MULTIPLE) * ROW_MULTIPLE
    kept_N = mask_NE.sum(dim=1) > 0
    slot_N = torch.where(
        kept_N, mask_NE.argmax(dim=1) * rows + place_N, E * rows
    )  # the last row is for dropped
    x_SD = hidden_states.new_zeros(E * rows + 1, D).index_put((slot_N,), hidden_states)
    hidden_ESF = torch.relu(torch.bmm(x_SD[:-1].view(E, rows, D), wi_EFD.transpose(1, 2)))
    y_SD = torch.bmm(hidden_ESF, wo_EDF.transpose(1, 2)).view(E * rows, D)
    y_SD = torch.cat((y_SD, y_SD.new_zeros(1, D)))
    return y_SD[slot_N] * routing_weights.to(y_SD.dtype)


def speed_up_switch(model: nn.Module) -> None:
    """Give the expert containers of a Switch model the batched forward; only this instance is changed."""
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

    for module in model.modules():
        if isinstance(module, SwitchTransformersExperts):
            setattr(module, "forward", MethodType(switch_experts_forward, module))  # noqa: B010 - mypy guards methods


def register_experts() -> None:
    """Make EXPERTS_NAME a valid `experts_implementation` of transformers models in this process."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, sorted_experts_forward)
