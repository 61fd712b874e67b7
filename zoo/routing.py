"""What the routers did: load per expert, and the loss that keeps every expert in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Router class -> position of its logits in what it returns.
_LOGITS_AT = {
    "Qwen2MoeTopKRouter": 0,
    "MixtralTopKRouter": 0,
    "DeepseekRouter": 0,
    "SwitchTransformersTop1Router": 2,
}


class RouterLog:
    """Router logits of the last forward pass, one entry per MoE layer."""

    def __init__(self, routers: list[Any], top_k: int) -> None:
        self.top_k = top_k
        self._routers = routers

    def take(self) -> list[Tensor]:
        """Logits [N, E] per MoE layer in module order; forgets them. Empty before the first pass."""
        taken = [router.zoo_logits for router in self._routers if router.zoo_logits is not None]
        self.forget()
        return [logits.reshape(-1, logits.shape[-1]) for logits in taken]

    def forget(self) -> None:
        for router in self._routers:
            router.zoo_logits = None


def _note(module: Any, args: Any, output: Any) -> None:
    # On the module and not in a list: torch.compile guards on the length of a list that a hook appends to, and
    # compiled every layer anew until it gave up.
    module.zoo_logits = output[_LOGITS_AT[type(module).__name__]]


@contextmanager
def watch_routers(model: nn.Module, top_k: int) -> Iterator[RouterLog]:
    """Record the logits of every router of a known class while the context is open."""
    routers = [module for module in model.modules() if type(module).__name__ in _LOGITS_AT]
    assert routers, f"{type(model).__name__} has no router class that zoo.routing knows"
    log = RouterLog(routers, top_k)
    log.forget()
    hooks = [router.register_forward_hook(_note) for router in routers]
    try:
        yield log
    finally:
        for hook in hooks:
            hook.remove()
        for router in routers:
            del router.zoo_logits


def load_of(logits_NE: Tensor, top_k: int) -> Tensor:
    """Share of the N x K choices that each expert got: float [E], sums to 1."""
    chosen_NK = logits_NE.detach().topk(top_k, dim=-1).indices
    return torch.bincount(chosen_NK.flatten(), minlength=logits_NE.shape[1]).float() / chosen_NK.numel()


def balance_loss(layers: list[Tensor], top_k: int) -> tuple[Tensor, Tensor]:
    """Switch Transformer's auxiliary loss (its equation 4), averaged over layers; 1 when balanced.

    Per layer and not over all layers at once: a sum over layers would let one layer's favourite make up for
    another's idle expert. Returns the loss and load_LE, the share of choices per expert.
    """
    losses, loads = [], []
    for logits_NE in layers:
        load_E = load_of(logits_NE, top_k)
        losses.append(len(load_E) * (load_E * logits_NE.float().softmax(dim=-1).mean(dim=0)).sum())
        loads.append(load_E)
    return torch.stack(losses).mean(), torch.stack(loads)
