"""Matrix products on processors as they are: with AMX the weight goes first, with AVX2 alone it goes in float32.

`F.linear(x, W)` makes the weight the right-hand operand, which oneDNN packs anew at every call: with one to 64
rows that costs more than the arithmetic. As the left operand of `W @ x.T` it is streamed as it lies, and a
single row is a matrix-vector product. bf16, 1408 x 2048 and 2048 x 2048, two cores with AMX, torch 2.13,
2026-11, GB of weights per second, F.linear / here: one row 9.3 / 14.0, four rows 11.7 / 14.0, 16 rows 9.4 / 13.6,
64 rows 4.1 / 6.4; a plain sum over the same bytes 18.7. float32 and float16 gain nothing and are left alone.
Without AMX it is the other way round (EPYC with AVX512-BF16, two cores: 12.9 / 7.0, 14.1 / 7.6, 9.1 / 7.3, 4.6 / 5.3),
so there, and on processors that nobody measured, F.linear does it.

A processor that has AVX2 and nothing newer (many laptops) has no instructions for half precision at all, and torch's
own product of many rows is a plain loop. There the weight is made float32 block by block, each multiplied while it is
in the cache: 2816 x 2048, one core of such an EPYC, ms for 4 / 8 / 16 / 64 / 256 rows: bf16 4.8 / 9.2 / 18 / 72 / 297,
in blocks 4.9 / 5.5 / 7.6 / 14 / 50; float16 alike. Sums are float32 either way.
The choice depends on shapes, the processor and whether a gradient is wanted (which blocks do not give), so
results never depend on what is cached.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MAX_ROWS = 64
# Below, the second call costs more than the packing (128 x 128: 0.92 against 0.75 GB/s).
_MIN_WEIGHT_BYTES = 1 << 20
_HALVES = (torch.bfloat16, torch.float16)
_MIN_WIDENED_ROWS = 4  # of fewer, torch's own product takes less time
_MIN_WIDENED_BYTES = 1 << 16  # of dense projections: those below are not worth a subclass
BLOCK_BYTES = 2 << 20  # of float32, by thread: from 128 KiB on larger ones are faster, up to this

_scratch = threading.local()


def weight_first(num_rows: int, weight: Tensor) -> bool:
    """Whether `linear` takes the weight as the left operand."""
    return (
        num_rows <= _MAX_ROWS
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.nbytes >= _MIN_WEIGHT_BYTES
        and has_amx()
    )


@cache
def has_amx() -> bool:
    """Whether this processor has tiles for bf16; False where torch is too old to tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_tile")) and bool(capabilities.get("amx_bf16"))


def widens(num_rows: int, weight: Tensor) -> bool:
    """Whether `linear` multiplies in float32, block by block of the weight."""
    return (
        num_rows >= _MIN_WIDENED_ROWS
        and weight.dtype in _HALVES
        and weight.device.type == "cpu"
        and halves_are_slow()
    )


@cache
def halves_are_slow() -> bool:
    """Whether this processor has AVX2, and nothing that knows half precision; False where nobody can tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    newer = ("avx512_f", "avx_ne_convert", "amx_tile")
    return bool(capabilities.get("avx2")) and not any(capabilities.get(name) for name in newer)


def linear(rows_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """What F.linear computes, up to rounding: [N, D] times [O, D] transposed, plus bias. Returns [N, O].

    The result may be the transposed view of an [O, N] tensor.
    """
    num_rows = rows_ND.shape[0]
    if widens(num_rows, weight_OD) and not _wants_gradient(rows_ND, weight_OD, bias_O):
        return _widened(rows_ND, weight_OD, bias_O)
    if not weight_first(num_rows, weight_OD) or num_rows == 0:
        return F.linear(rows_ND, weight_OD, bias_O)
    if num_rows == 1:
        row_D = rows_ND[0]
        out_O = torch.mv(weight_OD, row_D) if bias_O is None else torch.addmv(bias_O, weight_OD, row_D)
        return out_O[None]
    rows_DN = rows_ND.t()
    if bias_O is None:
        return torch.mm(weight_OD, rows_DN).t()
    return torch.addmm(bias_O[:, None], weight_OD, rows_DN).t()


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


def _widened(rows_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """`linear` in float32, rounded once at the end. The weight may be the view of a transposed one."""
    out_features, in_features = weight_OD.shape
    wide_ND = rows_ND.float()
    wide_bias_O = None if bias_O is None else bias_O.float()
    out_NO = rows_ND.new_empty(len(rows_ND), out_features)
    per_block = min(out_features, max(1, BLOCK_BYTES // (4 * in_features)))
    flat = _block(per_block * in_features)
    for begin in range(0, out_features, per_block):
        part_PD = weight_OD[begin : begin + per_block]
        # As it lies, so that the copy reads and writes along rows.
        if part_PD.stride(0) == 1:
            block_PD = flat[: part_PD.numel()].view(in_features, -1).t()
        else:
            block_PD = flat[: part_PD.numel()].view(-1, in_features)
        block_PD.copy_(part_PD)
        if wide_bias_O is None:
            wide_NP = torch.mm(wide_ND, block_PD.t())
        else:
            wide_NP = torch.addmm(wide_bias_O[begin : begin + per_block], wide_ND, block_PD.t())
        out_NO[:, begin : begin + per_block] = wide_NP
    return out_NO


def _block(numbers: int) -> Tensor:
    """This thread's scratch: got once, since fresh pages would cost as much as the product."""
    flat: Tensor | None = getattr(_scratch, "flat", None)
    if flat is None or flat.numel() < numbers:
        with torch.inference_mode(False):  # else it could not be written outside of it later
            flat = _scratch.flat = torch.empty(max(numbers, BLOCK_BYTES // 4))
    return flat


def linear_into(out_O: Tensor, row_1D: Tensor, weight_OD: Tensor) -> None:
    """`linear` of one row, to the bit, written to out_O [O]."""
    if weight_first(1, weight_OD):
        torch.mv(weight_OD, row_1D[0], out=out_O)
    else:
        torch.mm(row_1D, weight_OD.t(), out=out_O[None])


class FlatLinear(nn.Linear):
    """nn.Linear by `linear`, on all rows as one matrix. Same parameters and names; made by `speed_up_dense` only.

    In bfloat16 torch multiplies a [B, T, D] that is a slice (the last token's states, for logits) by a copy of the
    whole weight, unless the weight requires a gradient: of 32,000 rows of 2048 that is 0.13 GB and a third of a
    second (EPYC, torch 2.13), outside the budget.
    """

    def forward(self, input: Tensor) -> Tensor:
        num_rows = input.numel() // max(1, self.in_features)
        rows_ND = input.reshape(num_rows, -1)
        if input.dtype == self.weight.dtype and (
            weight_first(num_rows, self.weight) or widens(num_rows, self.weight)
        ):
            # Contiguous, since models take views of what a projection returns.
            out_NO = linear(rows_ND, self.weight, self.bias).contiguous()
        else:
            out_NO = F.linear(rows_ND, self.weight, self.bias)
        return out_NO.view(*input.shape[:-1], -1)


def speed_up_dense(model: nn.Module) -> int:
    """Let the dense projections of a loaded model use `linear`, where it can matter. Returns how many do.

    Only plain nn.Linear: a subclass has its own reasons.
    """
    changed = 0
    slow = halves_are_slow()
    least, dtypes = (_MIN_WIDENED_BYTES, _HALVES) if slow else (_MIN_WEIGHT_BYTES, (torch.bfloat16,))
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.nbytes < least:
            continue
        # Of other types torch copies no weight, and `linear` is F.linear.
        if module.weight.device.type == "cpu" and module.weight.dtype in dtypes:
            module.__class__ = FlatLinear
            changed += 1
    return changed
