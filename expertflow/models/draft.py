"""Draft: the model without its routed experts runs each decode step once before, and its routers say whom they want.

An expert adds to a residual stream that carries on without it, so routers further up choose much the same: every
layer is foreseen before the first one runs, and nothing is trained. It costs a pass over the dense weights, which lie
in fast memory anyway, and the KV cache once more while it lasts; its first layers' experts are fetched meanwhile.
What it writes into the cache is taken back: the step itself finds what it would have found, to the bit.

Only passes of one token for each sequence, and caches that give new tensors for old ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from expertflow.kv_name import kv_cache_in
from expertflow.models.running_pass import Call
from expertflow.predictor.baselines import said_by_routes

# Others write new states over old ones, which could not be taken back without a copy of all.
_LAYERS_THAT_GROW = (DynamicLayer, DynamicSlidingWindowLayer)
_NOT_OF_THE_STACK = ("logits_to_keep", "labels")
Say = Callable[[int, Tensor], None]


def _nobody(layer: int, p_E: Tensor) -> None:
    return None


class Draft:
    """Runs a decoder's stack without its routed experts. One thread at a time: another one goes without."""

    def __init__(self, stack: nn.Module, experts_L: Sequence[int]):
        """stack: the decoder without a head; experts_L: how many each of its MoE layers has."""
        self.stack, self.experts_L = stack, list(experts_L)
        self._turn = threading.Lock()
        self._thread: int | None = None
        self._routes_L: list[Tensor] = []
        self._say: Say = _nobody
        self._absent_LE: list[Tensor] = []  # that no row of the calls so far needs it

    @property
    def running(self) -> bool:
        """Whether this thread is in a draft: threads that share a model go their own ways."""
        return self._thread == threading.get_ident()

    def routed(self, hidden_TD: Tensor, index_TK: Tensor) -> Tensor:
        """In the place of experts: what the router chose is noted, and nothing is added."""
        layer = len(self._routes_L)
        self._routes_L.append(index_TK.detach().to("cpu", torch.int64, copy=True))
        self._absent_LE[layer] = self._absent_LE[layer] * (
            1 - self._probabilities(self._routes_L[-1], layer)
        ).prod(0)
        self._say(layer, 1 - self._absent_LE[layer])
        return torch.zeros_like(hidden_TD)

    def p_N1LE(self, calls: Sequence[Call], inference: bool, say: Say = _nobody) -> Tensor | None:
        """The probability that each row of these calls needs each expert; None where a call cannot be drafted.

        inference: whether the passes run in inference mode. say: is told p_E of all rows so far as each layer's router
        speaks. Raises ValueError for a KV cache that cannot be put back.
        """
        if not self._turn.acquire(blocking=False):
            return None
        try:
            return self._drafted(calls, inference, say)
        finally:
            self._turn.release()

    def _drafted(self, calls: Sequence[Call], inference: bool, say: Say) -> Tensor | None:
        device = next(self.stack.parameters()).device
        self._say, self._absent_LE = say, [torch.ones(max(self.experts_L)) for _ in self.experts_L]
        if any(kv_cache_in(call.kwargs) is None for call in calls):
            return None
        routes = []
        for call in calls:
            self._routes_L = []
            # A caller's tensors may be elsewhere: who moves them is a hook of the pass itself.
            args = [_on(device, value) for value in call.args]
            kwargs = {
                name: _on(device, value)
                for name, value in call.kwargs.items()
                if name not in _NOT_OF_THE_STACK
            }
            put_back = _remember(kv_cache_in(kwargs))
            self._thread = threading.get_ident()
            try:
                # Some routers draw: the pass is to find the numbers that it would have found.
                with torch.inference_mode(inference), torch.no_grad(), torch.random.fork_rng(devices=[]):
                    self.stack.forward(*args, **kwargs)  # not called: its hooks are for the pass itself
            finally:
                self._thread = None
                put_back()
            routes.append(self._routes_L)
        of_layers = [torch.cat(parts) for parts in zip(*routes, strict=True)]
        return torch.stack([self._probabilities(each, layer) for layer, each in enumerate(of_layers)], dim=1)[
            :, None
        ]

    def _probabilities(self, routes_NK: Tensor, layer: int) -> Tensor:
        """p_NE of one layer."""
        return said_by_routes(routes_NK, self.experts_L[layer], max(self.experts_L))


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def can_draft(cache: Any) -> bool:
    """Whether what a pass adds to this KV cache can be taken back without a copy."""
    return all(type(layer) in _LAYERS_THAT_GROW for part in _parts(cache) for layer in part.layers)


def _parts(cache: Any) -> list[Any]:
    """Self- and cross-attention have caches of their own in an encoder-decoder.

    Raises ValueError for other kinds: a subclass may keep more than its layers (MiniMax's has states of its own).
    """
    two = type(cache) is EncoderDecoderCache
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if two else [cache]
    for part in parts:
        if type(part) is not DynamicCache:
            raise ValueError(
                f"a draft cannot put back what it adds to a KV cache of type {type(part).__name__}"
            )
    return parts


def _remember(cache: Any) -> Callable[[], None]:
    """What puts the cache back as it is now. Its layers make new tensors of old ones, so references are enough."""
    parts = _parts(cache)
    if not can_draft(cache):
        kinds = sorted({type(layer).__name__ for part in parts for layer in part.layers} - _NAMES)
        raise ValueError(f"a draft cannot put back what it adds to a KV cache with {', '.join(kinds)}")
    kept = [(part, list(part.layers), [dict(vars(layer)) for layer in part.layers]) for part in parts]
    updated = dict(cache.is_updated) if hasattr(cache, "is_updated") else None

    def put_back() -> None:
        for part, layers, states in kept:
            part.layers[:] = layers
            for layer, state in zip(layers, states, strict=True):
                vars(layer).clear()
                vars(layer).update(state)
        if updated is not None:
            cache.is_updated.clear()
            cache.is_updated.update(updated)

    return put_back


_NAMES = {kind.__name__ for kind in _LAYERS_THAT_GROW}
