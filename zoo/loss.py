"""Next-token cross-entropy from hidden states, without keeping float32 logits of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 4096


def _loss_and_grad(
    hidden_ND: Tensor, weight_VD: Tensor, target_N1: Tensor, scale_N1: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of scale * cross-entropy, and its gradient with respect to the logits in hidden_ND's dtype."""
    logits_NV = (hidden_ND @ weight_VD.t()).float()
    top_N1 = logits_NV.amax(dim=1, keepdim=True)
    exp_NV = (logits_NV - top_N1).exp()
    norm_N1 = exp_NV.sum(dim=1, keepdim=True)
    loss = ((norm_N1.log() + top_N1 - logits_NV.gather(1, target_N1)) * scale_N1).sum()
    is_target_NV = torch.arange(len(weight_VD), device=target_N1.device) == target_N1
    grad_NV = exp_NV * (scale_N1 / norm_N1) - torch.where(is_target_NV, scale_N1, 0.0)
    return loss, grad_NV.to(hidden_ND.dtype)


_step: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"loss_and_grad": _loss_and_grad}


def compile_loss() -> None:
    """Fuse the softmax with torch.compile (needs a C++ compiler)."""
    _step["loss_and_grad"] = torch.compile(_loss_and_grad, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        keep_N1 = (target_N >= 0).unsqueeze(1)
        scale_N1 = keep_N1 / keep_N1.sum().clamp(min=1)
        target_N1 = target_N.clamp(min=0).unsqueeze(1)
        total, grads = torch.zeros((), device=hidden_ND.device), []
        for start in range(0, len(hidden_ND), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            loss, grad_NV = _step["loss_and_grad"](
                hidden_ND[rows], weight_VD, target_N1[rows], scale_N1[rows]
            )
            total = total + loss
            grads.append(grad_NV)
        grad_NV = grads[0] if len(grads) == 1 else torch.cat(grads)
        ctx.save_for_backward(hidden_ND, weight_VD, grad_NV)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        hidden_ND, weight_VD, grad_NV = ctx.saved_tensors
        return (grad_NV @ weight_VD) * grad, (grad_NV.t() @ hidden_ND) * grad, None


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Mean over targets >= 0 of cross_entropy(hidden_ND @ weight_VD.T, target_N); negative targets are skipped."""
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, target_N)
