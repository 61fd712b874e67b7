"""The registered experts function: group tokens by expert, fetch, multiply, reduce in fixed order.

transformers' MoE classes call it in place of their own loop (`ALL_EXPERTS_FUNCTIONS`). It reads the
layout from the module's flags, never from model names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expertflow.cache.expert_cache import ExpertCache, Weights
from expertflow.models.products import linear

if TYPE_CHECKING:
    from expertflow.models.lookahead import LookAhead


# (layer, index_TK, weight_TK), as run_experts gets them; to be read, not changed.
Recorder = Callable[[int, Tensor, Tensor], None]


@dataclass(slots=True)
class Attachment:
    """What an experts module of a loaded model hangs on to: its cache and its number there."""

    cache: ExpertCache | None  # None until the dense weights are loaded
    layer: int
    num_experts: int
    stored_transposed: frozenset[str] = frozenset()
    look_ahead: LookAhead | None = None  # what predicts the next layer
    recorder: Recorder | None = None  # is told every routing of this layer (capture.py)


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
    assert attachment.cache is not None, "a forward pass before the weights were loaded"
    if attachment.recorder is not None:
        attachment.recorder(attachment.layer, index_TK, weight_TK)
    if num_tokens == 0:
        return hidden_TD.clone()
    chosen = index_TK.reshape(-1).tolist()
    if num_tokens == 1 and len(set(chosen)) == top_k and attachment.num_experts not in chosen:
        return _one_token(attachment, hidden_TD, chosen, weight_TK, multiply)
    positions_of: dict[int, list[int]] = {}  # of T*K, by expert
    for position, expert in enumerate(chosen):
        positions_of.setdefault(expert, []).append(position)
    dropped = positions_of.pop(attachment.num_experts, [])
    if not positions_of:
        return torch.zeros_like(hidden_TD)

    # One gather of all rows in, expert by expert, and one out: a dozen small ones would cost more than the
    # arithmetic of a decode step with few tokens.
    pad = hidden_TD.device.type == "cpu" and hidden_TD.dtype in (torch.bfloat16, torch.float16)
    token_of_row: list[int] = []
    row_of_position = [0] * (num_tokens * top_k)
    begin_of: dict[int, int] = {}
    for expert, positions in positions_of.items():
        begin = begin_of[expert] = len(token_of_row)
        for row, position in enumerate(positions, begin):
            row_of_position[position] = row
            token_of_row.append(position // top_k)
        if pad:
            token_of_row += [token_of_row[begin]] * (padded_rows(len(positions)) - len(positions))
    rows_RD = hidden_TD[_index(token_of_row, hidden_TD)]
    out_RD = hidden_TD.new_empty(rows_RD.shape)
    for expert, weights in _arriving(attachment, hidden_TD, list(positions_of)):
        begin = begin_of[expert]
        end = begin + (padded_rows(len(positions_of[expert])) if pad else len(positions_of[expert]))
        out_RD[begin:end] = multiply(rows_RD[begin:end], weights)
    out_SD = out_RD[_index(row_of_position, hidden_TD)]
    weighted_SD = out_SD * weight_TK.reshape(-1, 1)
    if dropped:
        # A dropped token's weight may be anything; zero times infinity would not be zero.
        weighted_SD[dropped] = 0
    return weighted_SD.view(num_tokens, top_k, -1).sum(dim=1).to(hidden_TD.dtype)


def _one_token(
    attachment: Attachment, hidden_1D: Tensor, chosen: list[int], weight_1K: Tensor, multiply: Multiply
) -> Tensor:
    """run_experts of one token with distinct experts: no rows to gather, and the sum still in the router's order.

    Decode at batch 1 spends its time here: after each product has swept the caches, every line costs.
    """
    outs: list[Any] = [None] * len(chosen)
    for expert, weights in _arriving(attachment, hidden_1D, chosen):
        outs[chosen.index(expert)] = multiply(hidden_1D, weights)
    weighted_KD = torch.cat(outs) * weight_1K.reshape(-1, 1)
    return weighted_KD.sum(dim=0, keepdim=True).to(hidden_1D.dtype)


def _arriving(attachment: Attachment, hidden_TD: Tensor, experts: list[int]) -> Iterator[tuple[int, Weights]]:
    """The open layer's experts as they become ready; the next layer's are predicted meanwhile."""
    assert attachment.cache is not None
    arriving = attachment.cache.open_layer(attachment.layer, experts)
    if attachment.look_ahead is None:
        return arriving
    return _looking_ahead(attachment.cache, attachment.look_ahead, hidden_TD, arriving)


def _looking_ahead(
    cache: ExpertCache, look_ahead: LookAhead, hidden_TD: Tensor, arriving: Iterator[tuple[int, Weights]]
) -> Iterator[tuple[int, Weights]]:
    first = next(arriving)  # after this layer's demands went out, before anything is computed
    if predicted := look_ahead.predict(hidden_TD):
        cache.prefetch(predicted)
    yield first
    yield from arriving


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=like.device)


def padded_rows(num_rows: int) -> int:
    """The next of four sizes per octave, for half-precision products on the CPU.

    oneDNN compiles a kernel for each number of rows it meets and keeps it: 0.66 MiB and some milliseconds
    each (AMX, torch 2.13, 2026-11). Routing meets every number up to T; 256 of them on two projections
    took 338 MiB outside the budget. Padding adds 8 % to the arithmetic on average and nothing to the reading.
    """
    if num_rows <= 8:
        return 1 << (num_rows - 1).bit_length()
    step = 1 << ((num_rows - 1).bit_length() - 3)
    return -(-num_rows // step) * step


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


def _multiply(module: Any, attachment: Attachment, rows_ND: Tensor, weights: Weights) -> Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    up = _project(module, attachment, rows_ND, weights, first)
    inner_NI = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    out_ND = _project(module, attachment, inner_NI, weights, "down_proj")
    return module.post_expert_norm(out_ND) if module.has_post_expert_norm else out_ND


def _project(module: Any, attachment: Attachment, rows: Tensor, weights: Weights, role: str) -> Tensor:
    parts = weights[role]
    transposed = module.is_transposed != (role in attachment.stored_transposed)
    bias = weights[f"{role}_bias"][0] if module.has_bias else None
    if transposed:
        (matrix,) = parts  # [in, out]; spans.py never splits these
        out = rows @ matrix
        return out.add_(bias) if bias is not None else out
    if len(parts) == 1:
        return linear(rows, parts[0], bias)
    out = torch.cat([linear(rows, part) for part in parts], dim=-1)
    return out.add_(bias) if bias is not None else out
