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

    def __init__(self, routers: dict[str, Any], top_k: int) -> None:
        self.top_k = top_k
        self._named = routers
        self._routers = list(routers.values())

    def take(self) -> list[Tensor]:
        """Logits [N, E] per MoE layer in module order; forgets them. Empty before the first pass."""
        taken = [router.zoo_logits for router in self._routers if router.zoo_logits is not None]
        self.forget()
        return [logits.reshape(-1, logits.shape[-1]) for logits in taken]

    def mean_inputs(self) -> dict[str, Tensor]:
        """Name of each Switch router's weight -> mean [D] of the real tokens that it saw last."""
        return {
            f"{name}.classifier.weight": router.zoo_mean_D
            for name, router in self._named.items()
            if hasattr(router, "zoo_mean_D")
        }

    def forget(self) -> None:
        for router in self._routers:
            router.zoo_logits = None


def _note(module: Any, args: Any, output: Any) -> None:
    # On the module and not in a list: torch.compile guards on the length of a list that a hook appends to, and
    # compiled every layer anew until it gave up.
    logits = output[_LOGITS_AT[type(module).__name__]]
    real_BT = getattr(module, "zoo_real_BT", None)
    module.zoo_logits = logits if real_BT is None else logits[real_BT]


@contextmanager
def only_real_tokens(stack: nn.Module, real_BT: Tensor) -> Iterator[None]:
    """Routers of `stack` send padding to no expert, and logs leave it out, while the context is open.

    Half the positions of a padded batch are padding. They all look alike, so they crowd into one or two experts:
    the load then tells about padding, and so does the gradient of the balance loss.
    """
    routers: list[Any] = [m for m in stack.modules() if type(m).__name__ == "SwitchTransformersTop1Router"]
    for router in routers:
        router.zoo_real_BT = real_BT
    hooks = [router.register_forward_hook(_drop_padding) for router in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for router in routers:
            del router.zoo_real_BT


def _drop_padding(module: Any, args: Any, output: Any) -> Any:
    chosen_BTE, probability_BT1, logits_BTE = output
    module.zoo_mean_D = args[0].detach()[module.zoo_real_BT].float().mean(dim=0)
    return chosen_BTE * module.zoo_real_BT.unsqueeze(-1), probability_BT1, logits_BTE


@contextmanager
def watch_routers(model: nn.Module, top_k: int) -> Iterator[RouterLog]:
    """Record the logits of every router of a known class while the context is open."""
    routers = {name: module for name, module in model.named_modules() if type(module).__name__ in _LOGITS_AT}
    assert routers, f"{type(model).__name__} has no router class that zoo.routing knows"
    log = RouterLog(routers, top_k)
    log.forget()
    hooks = [router.register_forward_hook(_note) for router in routers.values()]
    try:
        yield log
    finally:
        for hook in hooks:
            hook.remove()
        for router in routers.values():
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
