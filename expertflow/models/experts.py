"""The registered experts function: group tokens by expert, fetch, multiply, reduce in fixed order.

transformers' MoE classes call it in place of their own loop (`ALL_EXPERTS_FUNCTIONS`). It reads the
layout from the module's flags, never from model names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertflow.cache.expert_cache import ExpertCache, Weights


@dataclass(slots=True)
class Attachment:
    """What an experts module of a loaded model hangs on to: its cache and its number there."""

    cache: ExpertCache
    layer: int
    num_experts: int
    stored_transposed: frozenset[str] = frozenset()


Multiply = Callable[[Tensor, Weights], Tensor]


def run_experts(
    attachment: Attachment, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, multiply: Multiply
) -> Tensor:
    """Sum over each token's experts of weight times multiply(token, expert), [T, D].

    index_TK: expert ids; num_experts means "nowhere" and adds zero. multiply(rows_ND, weights) -> [N, D]
    is one expert on the tokens routed to it. Products land in a [T, K, D] buffer by position and are
    summed over K: summing in order of arrival would make the last bits depend on what was cached.
    """
    num_tokens, top_k = index_TK.shape
    if num_tokens == 0:
        return hidden_TD.clone()
    expert_S, order_S = index_TK.reshape(-1).sort(stable=True)
    token_S = order_S // top_k if top_k > 1 else order_S
    experts, counts = torch.unique_consecutive(expert_S, return_counts=True)
    ends = counts.cumsum(0).tolist()
    rows_of = {
        expert: (begin, end)
        for expert, begin, end in zip(experts.tolist(), [0, *ends[:-1]], ends, strict=True)
    }
    out_SD = hidden_TD.new_empty(num_tokens * top_k, hidden_TD.shape[-1])
    nowhere = rows_of.pop(attachment.num_experts, None)
    if nowhere is not None:
        out_SD[order_S[nowhere[0] : nowhere[1]]] = 0
    for expert, weights in attachment.cache.open_layer(attachment.layer, list(rows_of)):
        begin, end = rows_of[expert]
        rows_ND = hidden_TD[token_S[begin:end]] if num_tokens > 1 else hidden_TD
        out_ND = multiply(pad_rows(rows_ND), weights)[: end - begin]
        out_SD[order_S[begin:end]] = out_ND.to(out_SD.dtype)
    weighted_SD = out_SD * weight_TK.reshape(-1, 1)
    if nowhere is not None:
        # A dropped token's weight may be anything; zero times infinity would not be zero.
        weighted_SD[order_S[nowhere[0] : nowhere[1]]] = 0
    return weighted_SD.view(num_tokens, top_k, -1).sum(dim=1).to(hidden_TD.dtype)


def pad_rows(rows_ND: Tensor) -> Tensor:
    """Zero rows added up to the next of four sizes per octave, for half-precision products on the CPU.

    oneDNN compiles a kernel for each number of rows it meets and keeps it: 0.66 MiB and some milliseconds
    each (AMX, torch 2.13, 2026-11). Routing meets every number up to T; 256 of them on two projections
    took 338 MiB outside the budget. Padding adds 8 % to the arithmetic on average and nothing to the reading.
    """
    num_rows = rows_ND.shape[0]
    if rows_ND.device.type != "cpu" or rows_ND.dtype not in (torch.bfloat16, torch.float16):
        return rows_ND
    step = max(1, 1 << max(0, (num_rows - 1).bit_length() - 3))
    padded = -(-num_rows // step) * step if num_rows > 8 else 1 << (num_rows - 1).bit_length()
    return F.pad(rows_ND, (0, 0, 0, padded - num_rows)) if padded > num_rows else rows_ND


def expertflow_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function registered with transformers: hidden_states [T, D], top_k_index and weights [T, K]."""
    attachment: Attachment | None = getattr(module, "expertflow", None)
    if attachment is None:
        raise RuntimeError(
            f"{type(module).__name__} has no expert cache: load the model with "
            f"from_pretrained(..., quantization_config=ExpertFlowConfig(...))"
        )
    if hidden_states.is_meta:
        return torch.empty_like(hidden_states)

    def multiply(rows_ND: Tensor, weights: Weights) -> Tensor:
        return _multiply(module, attachment, rows_ND, weights)

    return run_experts(attachment, hidden_states, top_k_index, top_k_weights, multiply)


def _multiply(module: nn.Module, attachment: Attachment, rows_ND: Tensor, weights: Weights) -> Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    up = _project(module, attachment, rows_ND, weights, first)
    inner_NI = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    out_ND = _project(module, attachment, inner_NI, weights, "down_proj")
    return module.post_expert_norm(out_ND) if module.has_post_expert_norm else out_ND


def _project(module: nn.Module, attachment: Attachment, rows: Tensor, weights: Weights, role: str) -> Tensor:
    parts = weights[role]
    transposed = module.is_transposed != (role in attachment.stored_transposed)
    bias = weights[f"{role}_bias"][0] if module.has_bias else None
    if transposed:
        (matrix,) = parts  # [in, out]; spans.py never splits these
        out = rows @ matrix
        return out.add_(bias) if bias is not None else out
    if len(parts) == 1:
        return F.linear(rows, parts[0], bias)
    out = torch.cat([F.linear(rows, part) for part in parts], dim=-1)
    return out.add_(bias) if bias is not None else out
