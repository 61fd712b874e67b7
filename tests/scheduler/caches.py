"""Caches filled with random numbers through transformers' own layers: every kind, without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from expertflow.scheduler.batch_state import BatchState

HEADS, HEAD, VALUE = 2, 3, 5
KINDS = ("full", "sliding", "mixed", "encoder_decoder")


def cache_of(layers: Sequence) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = list(layers)
    return cache


def filled_cache(kind: str, window: int, rows: int, length: int, source: int = 0) -> Cache:
    if kind == "encoder_decoder":
        own, cross = (cache_of([DynamicLayer() for _ in range(2)]) for _ in range(2))
        for cache, columns in ((own, length), (cross, source)):
            for layer in cache.layers:
                layer.update(
                    torch.randn(rows, HEADS, columns, HEAD), torch.randn(rows, HEADS, columns, VALUE)
                )
        return EncoderDecoderCache(own, cross)
    layers = {
        "full": [DynamicLayer(), DynamicLayer()],
        "sliding": [DynamicSlidingWindowLayer(window)],
        "mixed": [
            LinearAttentionLayer(number_of_states=2),
            DynamicSlidingWindowLayer(window),
            DynamicLayer(),
            DummyLayer(),
            LinearAttentionAndFullAttentionLayer(),
            LinearAttentionAndSlidingWindowAttentionLayer(window),
            DynamicLayer(),  # never used: stays without tensors
        ],
    }[kind]
    for layer in layers[:-1] if kind == "mixed" else layers:
        if isinstance(layer, LinearAttentionLayer):
            layer.update_conv_state(torch.randn(rows, 3, 4))
            layer.update_recurrent_state(torch.randn(rows, HEADS, 2, 2))
        if isinstance(layer, DynamicLayer):
            layer.update(torch.randn(rows, HEADS, length, HEAD), torch.randn(rows, HEADS, length, VALUE))
    return cache_of(layers)


def mask(lengths: Sequence[int], width: int, *, left: bool) -> Tensor:
    column_T = torch.arange(width)
    length_B1 = torch.tensor(lengths)[:, None]
    return ((column_T >= width - length_B1) if left else (column_T < length_B1)).long()


def random_state(kind: str, window: int, rng: random.Random, rows: int | None = None) -> BatchState:
    rows = rows or rng.randrange(1, 5)
    length, source = rng.randrange(1, 10), rng.randrange(1, 7)
    mask_BT = mask([rng.randrange(1, length + 1) for _ in range(rows)], length, left=True)
    cache = filled_cache(kind, window, rows, length, source)
    if kind != "encoder_decoder":
        return BatchState(cache, mask_BT)
    source_mask_BS = mask([rng.randrange(1, source + 1) for _ in range(rows)], source, left=False)
    return BatchState(cache, mask_BT, torch.randn(rows, source, 4), source_mask_BS)


class CountCopies(TorchDispatchMode):
    """Adds up the bytes of every floating point number that is written from another one."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self.num_bytes += args[0].nbytes if args[0].is_floating_point() else 0
        elif isinstance(result, Tensor) and result.is_floating_point() and not _is_bare(func, result, args):
            self.num_bytes += result.nbytes
        return result


def _is_bare(func, result: Tensor, args: Sequence) -> bool:
    """Whether the operation allocates, zeroes or views, and copies nothing."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
    return result.untyped_storage().data_ptr() in memory or func is torch.ops.aten.new_empty.default
