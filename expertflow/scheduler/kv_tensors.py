"""Caches taken apart into tensors with known rows and columns, and rebuilt from them.

transformers has a cache layer class for each kind of attention. Here each is a few tensors with
sequences and perhaps positions along them; regroup.py then knows no kinds. A class that is not listed is refused:
a subclass may carry state of its own, which copying rows would leave behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from expertflow.scheduler.carried import Axis, Carried

# transformers types a cache's layers as a union of mixins without the attributes that matter here.
Layer = Any
# From the cache down to the attribute, such as ("cross", 3, "keys").
TensorName = tuple[Any, ...]


SELF_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
RECURRENT = (
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


def objection(cache: Cache) -> str | None:
    """Why the sequences of this cache cannot be moved, or None when they can."""
    if type(cache) is EncoderDecoderCache:
        for part in (cache.self_attention_cache, cache.cross_attention_cache):
            if (reason := objection(part)) is not None:
                return reason
        if any(type(layer) is not DynamicLayer for layer in cache.cross_attention_cache.layers):
            return "its cross-attention layers are not all of type DynamicLayer"
        return None
    if type(cache) is not DynamicCache:
        return f"it is a {type(cache).__name__}, not a DynamicCache or an EncoderDecoderCache of two"
    if cache.offloading:
        return "its layers are offloaded to the CPU in turn"
    for layer in cache.layers:
        if type(layer) not in (*SELF_ATTENTION, *RECURRENT, DummyLayer):
            return f"it has a layer of type {type(layer).__name__}, whose state we do not know"
        if getattr(layer, "record_past", False):
            return "it records the past for assisted decoding"
    return None


def carried_by(cache: Cache) -> dict[TensorName, Carried]:
    """The tensors of every layer under names that are the same for every batch of one model."""
    if isinstance(cache, EncoderDecoderCache):
        own, cross = carried_by(cache.self_attention_cache), carried_by(cache.cross_attention_cache)
        named = {("self", *name): part for name, part in own.items()}
        return named | {("cross", *name): Carried(part.tensor, Axis.SOURCE) for name, part in cross.items()}
    return {
        (index, *name): part for index, layer in enumerate(cache.layers) for name, part in _of_layer(layer)
    }


def lengths_seen(cache: Cache) -> set[int]:
    """How many positions its layers have read; a window may have let go of some."""
    if isinstance(cache, EncoderDecoderCache):
        return lengths_seen(cache.self_attention_cache)
    return {
        layer.get_seq_length()
        for layer in cache.layers
        if isinstance(layer, DynamicLayer) and layer.is_initialized
    }


def rebuilt(cache: Cache, tensors: Mapping[TensorName, Tensor], length: int) -> Cache:
    """A cache like `cache` that holds these tensors, `length` positions long. `cache` is not changed."""
    if isinstance(cache, EncoderDecoderCache):
        parts: dict[str, dict[TensorName, Tensor]] = {"self": {}, "cross": {}}
        for (part, *name), tensor in tensors.items():
            parts.setdefault(part, {})[tuple(name)] = tensor
        return EncoderDecoderCache(
            rebuilt(cache.self_attention_cache, parts["self"], length),
            rebuilt(cache.cross_attention_cache, parts["cross"], length),
        )
    result = copy.copy(cache)
    result.layers = [
        _layer_like(layer, {name: tensors[(index, *name)] for name, _ in _of_layer(layer)}, length)
        for index, layer in enumerate(cache.layers)
    ]
    return result


def _of_layer(layer: Layer) -> Iterator[tuple[TensorName, Carried]]:
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        # A window of W is the token being computed and W - 1 cached ones.
        limit = layer.sliding_window - 1 if isinstance(layer, DynamicSlidingWindowLayer) else None
        for field in ("keys", "values"):
            yield (field,), Carried(getattr(layer, field), Axis.TOKENS, limit=limit)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for field in ("conv_states", "recurrent_states"):
            for index, tensor in getattr(layer, field).items():
                if tensor is not None:
                    yield (field, index), Carried(tensor, Axis.NONE, columns=None)


def _layer_like(layer: Layer, tensors: Mapping[TensorName, Tensor], length: int) -> Layer:
    result = copy.copy(layer)
    for field, value in vars(layer).items():
        if isinstance(value, dict):  # states and flags by number, which a layer writes in place
            setattr(result, field, dict(value))
    for (field, *index), tensor in tensors.items():
        if index:
            getattr(result, field)[index[0]] = tensor
        else:
            setattr(result, field, tensor)
    if isinstance(layer, DynamicSlidingWindowLayer):
        result.cumulative_length = length
    return result
