"""The registered experts function: group tokens by expert, fetch, multiply, reduce in fixed order.

transformers' MoE classes call it in place of their own loop (`ALL_EXPERTS_FUNCTIONS`). It reads the
layout from the module's flags, never from model names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from expertflow.cache.expert_cache import ExpertCache, Weights
from expertflow.models.meeting import in_meeting, meet
from expertflow.models.products import linear, linear_into, widens

if TYPE_CHECKING:
    from expertflow.models.draft import Draft
    from expertflow.models.lookahead import LookAhead
    from expertflow.models.predicting import Predicting


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
    predicting: Predicting | None = None  # who asks a predictor, and wants to know of every layer
    draft: Draft | None = None  # runs the stack without experts before each decode step
    products: Products | None = None  # made at the first call


Multiply = Callable[[Tensor, Weights], Tensor]
# (row_1D, weights of K experts) -> [K, D]: the same bits as multiply of each.
Together = Callable[[Tensor, list[Weights]], Tensor]
_MOST_TOGETHER = 16  # experts per token beyond which it is not worth trying


def run_experts(
    attachment: Attachment,
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    multiply: Multiply,
    together: Together | None = None,
) -> Tensor:
    """Sum over each token's experts of weight times multiply(token, expert), [T, D].

    index_TK: expert ids; num_experts means "nowhere" and adds zero. multiply(rows_ND, weights) -> [N, D]
    is one expert on the tokens routed to it. Products land in a [T, K, D] buffer by position and are
    summed over K: summing in order of arrival would make the last bits depend on what was cached.
    Passes that run together meet here, and an expert is opened once for all of them.
    """
    if attachment.draft is not None and attachment.draft.running:
        return attachment.draft.routed(hidden_TD, index_TK)
    if attachment.recorder is not None:
        attachment.recorder(attachment.layer, index_TK, weight_TK)
    if in_meeting():
        call = _Call(attachment, hidden_TD, index_TK, weight_TK, multiply, together)
        return meet(attachment.layer, _run_all, call)
    return _run(attachment, hidden_TD, index_TK, weight_TK, multiply, together)


class _Call(NamedTuple):
    """One call of run_experts."""

    attachment: Attachment
    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    multiply: Multiply
    together: Together | None


def _run_all(calls: list[_Call]) -> Sequence[Tensor]:
    """The same layer of several passes, as one: their tokens one after the other."""
    first = calls[0]
    if len(calls) == 1:
        return [_run(*first)]
    assert all(call.attachment is first.attachment for call in calls), "passes of different models met"
    sum_TD = _run(
        first.attachment,
        torch.cat([call.hidden_TD for call in calls]),
        torch.cat([call.index_TK for call in calls]),
        torch.cat([call.weight_TK for call in calls]),
        first.multiply,
        first.together,
    )
    return sum_TD.split([len(call.hidden_TD) for call in calls])


def _run(
    attachment: Attachment,
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    multiply: Multiply,
    together: Together | None,
) -> Tensor:
    num_tokens, top_k = index_TK.shape
    assert attachment.cache is not None, "a forward pass before the weights were loaded"
    if attachment.predicting is not None:
        attachment.predicting.routed(attachment.layer, index_TK)
    if num_tokens == 0:
        return hidden_TD.clone()
    chosen = index_TK.reshape(-1).tolist()
    if num_tokens == 1 and len(set(chosen)) == top_k and attachment.num_experts not in chosen:
        return _one_token(attachment, hidden_TD, chosen, weight_TK, multiply, together)
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
    # Before the products: on an accelerator an index made afterwards would wait for all of them.
    row_of_position_S = _index(row_of_position, hidden_TD)
    dropped_N = _index(dropped, hidden_TD) if dropped else None
    rows_RD = hidden_TD[_index(token_of_row, hidden_TD)]
    out_RD = hidden_TD.new_empty(rows_RD.shape)
    for expert, weights in _arriving(attachment, hidden_TD, list(positions_of)):
        begin = begin_of[expert]
        end = begin + (padded_rows(len(positions_of[expert])) if pad else len(positions_of[expert]))
        out_RD[begin:end] = multiply(rows_RD[begin:end], weights)
    out_SD = out_RD[row_of_position_S]
    weighted_SD = out_SD * weight_TK.reshape(-1, 1)
    if dropped_N is not None:
        # A dropped token's weight may be anything; zero times infinity would not be zero.
        weighted_SD[dropped_N] = 0
    return weighted_SD.view(num_tokens, top_k, -1).sum(dim=1).to(hidden_TD.dtype)


def _one_token(
    attachment: Attachment,
    hidden_1D: Tensor,
    chosen: list[int],
    weight_1K: Tensor,
    multiply: Multiply,
    together: Together | None,
) -> Tensor:
    """run_experts of one token with distinct experts: no rows to gather, and the sum still in the router's order.

    Decode at batch 1 spends its time here: after each product has swept the caches, every line costs.
    """
    if together is not None and attachment.look_ahead is None:
        cache = attachment.cache
        assert cache is not None
        try:
            if ready := cache.open_ready(attachment.layer, chosen):
                return _weighted_sum(together(hidden_1D, ready), weight_1K)
        finally:
            cache.close_ready()
    outs: list[Any] = [None] * len(chosen)
    for expert, weights in _arriving(attachment, hidden_1D, chosen):
        outs[chosen.index(expert)] = multiply(hidden_1D, weights)
    return _weighted_sum(torch.cat(outs), weight_1K)


def _weighted_sum(out_KD: Tensor, weight_1K: Tensor) -> Tensor:
    return (out_KD * weight_1K.reshape(-1, 1)).sum(dim=0, keepdim=True).to(out_KD.dtype)


def _arriving(attachment: Attachment, hidden_TD: Tensor, experts: list[int]) -> Iterator[tuple[int, Weights]]:
    """The open layer's experts as they become ready; the next layer's are predicted meanwhile."""
    assert attachment.cache is not None
    asks = attachment.look_ahead is not None or attachment.predicting is not None
    meanwhile = partial(_look_ahead, attachment, hidden_TD) if asks else None
    return attachment.cache.open_layer(attachment.layer, experts, meanwhile)


def _look_ahead(attachment: Attachment, hidden_TD: Tensor) -> None:
    if attachment.predicting is not None:
        attachment.predicting.look_ahead(attachment.layer, hidden_TD)
    if attachment.look_ahead is not None and (predicted := attachment.look_ahead.predict(hidden_TD)):
        assert attachment.cache is not None
        attachment.cache.prefetch(predicted)


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

    products = attachment.products
    if products is None:
        products = attachment.products = Products(module, attachment.stored_transposed)
    together = products.together if top_k_index.shape[1] <= products.most_together else None
    if hidden_states.requires_grad or top_k_weights.requires_grad:
        together = None  # it writes into scratch, through which no gradient flows
    return run_experts(attachment, hidden_states, top_k_index, top_k_weights, products.multiply, together)


class Products:
    """The arithmetic of one module's experts. Its layout does not change, so what follows from it is found once."""

    def __init__(self, module: Any, stored_transposed: frozenset[str]):
        self.module = module
        self.stored_transposed = stored_transposed
        # One product [out, in] per projection and nothing but the activation between them.
        self.plain = not (
            module.is_transposed or module.has_bias or module.has_post_expert_norm or stored_transposed
        )
        self.first = "gate_up_proj" if module.has_gate else "up_proj"
        self.gate = module._apply_gate if module.has_gate else module.act_fn
        # So many experts may go through `together` at once: known from the first weights that `multiply` sees.
        self.most_together = 0
        self._together_is_known = not self.plain
        # Scratch of `together`, with its rows as views: to be used with the layer open, so by one thread at a time.
        self._up_KH, self._out_KD = torch.empty(0), torch.empty(0)
        self._ups: list[Tensor] = []
        self._outs: list[Tensor] = []

    def multiply(self, rows_ND: Tensor, weights: Weights) -> Tensor:
        """One expert on the rows routed to it: [N, D] to [N, D]."""
        if not self._together_is_known:
            self._together_is_known = True
            self.most_together = self._find_most_together(weights)
        first, down = weights[self.first], weights["down_proj"]
        if self.plain and len(first) == 1:  # the common layout, without a line too many
            return linear(self.gate(linear(rows_ND, first[0])), down[0])
        out_ND = self._project(self.gate(self._project(rows_ND, weights, self.first)), weights, "down_proj")
        return self.module.post_expert_norm(out_ND) if self.module.has_post_expert_norm else out_ND

    def _project(self, rows: Tensor, weights: Weights, role: str) -> Tensor:
        parts = weights[role]
        transposed = self.module.is_transposed != (role in self.stored_transposed)
        bias = weights[f"{role}_bias"][0] if self.module.has_bias else None
        if transposed:
            (matrix,) = parts  # [in, out]; spans.py never splits these
            if widens(len(rows), matrix):
                return linear(rows, matrix.t(), bias)
            out = rows @ matrix
            return out.add_(bias) if bias is not None else out
        if len(parts) == 1:
            return linear(rows, parts[0], bias)
        out = torch.cat([linear(rows, part) for part in parts], dim=-1)
        return out.add_(bias) if bias is not None else out

    def together(self, row_1D: Tensor, weights_K: list[Weights]) -> Tensor:
        """`multiply` of one row with each of K experts, [K, D]: products follow each other with few lines between.

        For K up to `most_together`. The result is valid until the next call.
        """
        if len(weights_K) != len(self._ups):
            first, down = weights_K[0][self.first][0], weights_K[0]["down_proj"][0]
            # Tensors made in inference mode could not be written outside of it later.
            with torch.inference_mode(False):
                self._up_KH = row_1D.new_empty(len(weights_K), first.shape[0])
                self._out_KD = row_1D.new_empty(len(weights_K), down.shape[0])
                self._ups, self._outs = list(self._up_KH), list(self._out_KD)
        role = self.first
        for weights, up_H in zip(weights_K, self._ups):  # noqa: B905 - same length, and a hot line
            linear_into(up_H, row_1D, weights[role][0])
        for weights, inner_1I, out_D in zip(weights_K, self.gate(self._up_KH).split(1), self._outs):  # noqa: B905
            linear_into(out_D, inner_1I, weights["down_proj"][0])
        return self._out_KD

    def _find_most_together(self, weights: Weights) -> int:
        """How many experts `together` may take and still give each the bits of `multiply`; 0 if not even one.

        The activation of K rows at once is each row's own only if rows are whole vectors: on the CPU torch
        computes the odd elements at the end by other code, whose last bits may differ (128 holds the longest,
        unrolled, in each half of a fused projection), and divides 32,768 elements among threads wherever that
        falls. Some functions take another way altogether for a single row (gelu in oneDNN), and a product
        might when it is told where to write: those are found by trying.
        """
        parts = weights[self.first]
        if len(parts) > 1 or parts[0].device.type != "cpu":
            return 0
        if not (_same_into(parts[0]) and _same_into(weights["down_proj"][0])):
            return 0
        width = parts[0].shape[0]
        most = 0 if width % 128 != 0 else min(_MOST_TOGETHER, 32767 // width)
        up_KH = torch.linspace(-8, 8, most * width).to(parts[0].dtype).view(most, width)
        alone_KI = [self.gate(up_1H) for up_1H in up_KH.split(1)] if most else []
        for count in range(1, most + 1):
            if not torch.equal(self.gate(up_KH[:count]), torch.cat(alone_KI[:count])):
                return count - 1
        return most


def _same_into(weight_OD: Tensor) -> bool:
    row_1D = torch.linspace(-1, 1, weight_OD.shape[1]).to(weight_OD.dtype)[None]
    out_O = row_1D.new_empty(len(weight_OD))
    linear_into(out_O, row_1D, weight_OD)
    return torch.equal(out_O, linear(row_1D, weight_OD)[0])
