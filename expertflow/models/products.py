"""Matrix products with few rows, as a decode step has them: with AMX the weight goes first.

`F.linear(x, W)` makes the weight the right-hand operand, which oneDNN packs anew at every call: with one to 64
rows that costs more than the arithmetic. As the left operand of `W @ x.T` it is streamed as it lies, and a
single row is a matrix-vector product. bf16, 1408 x 2048 and 2048 x 2048, two cores with AMX, torch 2.13,
2026-11, GB of weights per second, F.linear / here: one row 9.3 / 14.0, four rows 11.7 / 14.0, 16 rows 9.4 / 13.6,
64 rows 4.1 / 6.4; a plain sum over the same bytes 18.7. float32 and float16 gain nothing and are left alone.
Without AMX it is the other way round (EPYC with AVX512-BF16, two cores: 12.9 / 7.0, 14.1 / 7.6, 9.1 / 7.3, 4.6 / 5.3),
so there, and on processors that nobody measured, F.linear does it.
The choice depends on shapes and the processor alone, so results never depend on what is cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MAX_ROWS = 64
# Below, the second call costs more than the packing (128 x 128: 0.92 against 0.75 GB/s).
_MIN_WEIGHT_BYTES = 1 << 20


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


def linear(rows_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """What F.linear computes, up to rounding: [N, D] times [O, D] transposed, plus bias. Returns [N, O].

    The result may be the transposed view of an [O, N] tensor.
    """
    num_rows = rows_ND.shape[0]
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
        if input.dtype == self.weight.dtype and weight_first(num_rows, self.weight):
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
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.nbytes < _MIN_WEIGHT_BYTES:
            continue
        # Of other types torch copies no weight, and `linear` is F.linear.
        if module.weight.device.type == "cpu" and module.weight.dtype == torch.bfloat16:
            module.__class__ = FlatLinear
            changed += 1
    return changed
