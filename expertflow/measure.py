"""Measuring this machine: how fast weights are multiplied, copied and read, and what a layer costs besides.

Each figure takes a fraction of a second and is taken on the shapes of the model at hand, since small
matrices are slower per byte. It measures; what follows from the figures is forecast.py's business.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from expertflow.cache.expert_cache import Weights
from expertflow.kv_name import KV_CACHE, kv_cache_of
from expertflow.models.attach import METHOD, register
from expertflow.models.experts import Attachment, run_experts
from expertflow.models.products import linear
from expertflow.step_time import Machine, Multiplication
from expertflow.store.disk import CHUNK_BYTES, measure_read_bandwidth

# More than the last-level caches of the machines we know, so that every multiplication reads memory.
_WORKING_SET_BYTES = 256 << 20
# More than the caches of one core. Python and its objects have to come back after every product: 0.4 ms per
# expert where tiny matrices alone show 0.09 (2 cores with AMX, 2026-11).
_EVICTED_BYTES = 16 << 20
_PROBE_FILE_BYTES = 256 << 20
_PROBE_NAME = "expertflow-disk-probe-"


def measure_multiplication(
    out_features: int, in_features: int, dtype: torch.dtype, rows: Sequence[int], seconds: float = 0.25
) -> Multiplication:
    """Time products.linear and what follows a product: [out_features, in_features] weights, others at each
    call, `seconds` for a point."""
    nbytes = out_features * in_features * dtype.itemsize
    count = max(2, _WORKING_SET_BYTES // nbytes)
    weights = torch.empty(count, out_features, in_features, dtype=dtype)
    weights[0].normal_(std=0.02)
    weights[1:] = weights[0]  # zeros would do for time on most machines, denormals on none
    costs = []
    for num_rows in rows:
        x = torch.randn(num_rows, in_features).to(dtype)

        out = torch.empty(num_rows, out_features, dtype=dtype)

        def multiply(index: int, x: Tensor = x, out: Tensor = out) -> Tensor:
            # As a layer uses a product: something elementwise, then into a buffer.
            return out.copy_(F.silu(linear(x, weights[index % count])))

        costs.append(_seconds_per_call(multiply, seconds) / nbytes)
    return Multiplication(tuple(rows), tuple(costs))


@torch.inference_mode()
def _seconds_per_call(
    call: Callable[[int], Tensor], seconds: float, eviction: _Eviction | None = None
) -> float:
    """Median over calls: a neighbour's burst must not become the machine's speed. Eviction is not counted."""
    call(0)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begun < seconds and len(times) < 1000):
        evicting = eviction.seconds if eviction else 0.0
        started = time.perf_counter()
        call(len(times) + 1)
        taken = time.perf_counter() - started
        times.append(taken - (eviction.seconds - evicting if eviction else 0.0))
    return statistics.median(times)


class _Eviction:
    """Streams memory through the processor's caches, as a product with real weights does."""

    def __init__(self) -> None:
        self._memory = torch.ones(_EVICTED_BYTES // 8, dtype=torch.int64)
        self.seconds = 0.0  # spent here so far

    def __call__(self, *_: object) -> None:
        started = time.perf_counter()
        self._memory.sum()
        self.seconds += time.perf_counter() - started


def measure_copy_bandwidth(seconds: float = 0.25) -> float:
    """Bytes per second from RAM to RAM, in pieces of a chunk, beside arithmetic."""
    source = torch.ones(_WORKING_SET_BYTES // CHUNK_BYTES, CHUNK_BYTES, dtype=torch.uint8)
    target = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    with _products_meanwhile():
        return CHUNK_BYTES / _seconds_per_call(
            lambda index: target.copy_(source[index % len(source)]), seconds
        )


def measure_disk(folder: Path, files: Sequence[Path] = (), block_bytes: int = CHUNK_BYTES) -> float:
    """Bytes per second of direct reads beside arithmetic, from `files` or, when there are none, from a file made in
    `folder`.

    block_bytes: size of one read. The probe file is removed. OSError when it cannot be written.
    """
    block_bytes = max(4096, min(CHUNK_BYTES, block_bytes))
    if files:
        with _products_meanwhile():
            return measure_read_bandwidth(files, chunk_bytes=block_bytes)
    with _probe_file(folder) as probe, _products_meanwhile():
        return measure_read_bandwidth([probe], chunk_bytes=block_bytes)


@contextlib.contextmanager
def _products_meanwhile() -> Iterator[None]:
    """Keep the processor at what it does while experts are loaded: one that is idle reads 10 to 20 % faster, and a
    plan made with that was 28 to 48 % too fast (2 cores, 2026-11)."""
    weights = torch.full((max(1, _WORKING_SET_BYTES >> 24), 2048, 2048), 0.5, dtype=torch.bfloat16)
    row = torch.ones(2048, dtype=torch.bfloat16)
    over = threading.Event()
    # The number of threads is the caller's, not the default of a new thread.
    threads = torch.get_num_threads()

    def multiply() -> None:
        torch.set_num_threads(threads)
        while not over.is_set():
            for weight in weights:
                torch.mv(weight, row)

    thread = threading.Thread(target=multiply, name="expertflow-measure", daemon=True)
    try:
        thread.start()
        yield
    finally:
        over.set()
        if thread.is_alive():  # Ctrl-C may have come while it was about to start
            thread.join()


@contextlib.contextmanager
def _probe_file(folder: Path) -> Iterator[Path]:
    place = nearest_existing(folder)
    free = shutil.disk_usage(place).free
    if free < 2 * _PROBE_FILE_BYTES:
        raise OSError(
            f"{place} has {free} bytes free; measuring its disk takes {_PROBE_FILE_BYTES} for a moment"
        )
    handle, name = tempfile.mkstemp(prefix=_PROBE_NAME, dir=place)
    try:
        with os.fdopen(handle, "wb") as file:
            # Random bytes: some disks and file systems store zeros as nothing.
            piece = os.urandom(CHUNK_BYTES)
            for _ in range(_PROBE_FILE_BYTES // CHUNK_BYTES):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        os.unlink(name)


def nearest_existing(folder: Path) -> Path:
    """The folder itself or the first of its parents that exists: it is on the same disk, or will be."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def measure_load_latency(rounds: int = 200) -> float:
    """Seconds from asking another thread for something to hearing that it is there."""
    condition = threading.Condition()
    asked = answered = 0

    def answer() -> None:
        nonlocal answered
        with condition:
            while answered < rounds:
                while answered == asked:
                    condition.wait()
                answered += 1
                condition.notify_all()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        with condition:
            asked += 1
            condition.notify_all()
            while answered < asked:
                condition.wait()
        times.append(time.perf_counter() - started)
    thread.join()
    return statistics.median(times)


class _ReadyExperts:
    """A cache in which every expert is always there: what remains is the work around the products."""

    def __init__(self, weights: Weights, eviction: _Eviction | None):
        self._weights = weights
        self._eviction = eviction

    def open_ready(self, layer: int, experts: Sequence[int]) -> None:
        """Not this way: under a budget most layers of a step miss something."""

    def close_ready(self) -> None:
        pass

    def open_layer(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> Iterator[tuple[int, Weights]]:
        if meanwhile is not None:
            meanwhile()
        for expert in experts:
            if self._eviction:
                self._eviction()
            yield expert, self._weights


def measure_layer_overhead(top_k: int, dtype: torch.dtype, seconds: float = 0.6) -> tuple[float, float]:
    """(seconds per decoder layer, seconds per expert) of a decode step whose matrices are tiny.

    A small Qwen2-MoE of our own stands for every family: norms, attention, router and grouping differ little.
    """
    few, many = 1, max(2, top_k)
    with_few, with_many = (_step_seconds(k, dtype, seconds / 2) for k in (few, many))
    per_expert = max(0.0, (with_many - with_few) / (many - few))
    return max(0.0, with_many - many * per_expert), per_expert


def _step_seconds(top_k: int, dtype: torch.dtype, seconds: float, layers: int = 4) -> float:
    """Decode time per layer of the small stand-in."""
    register()
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, num_experts=2 * top_k, num_experts_per_tok=top_k,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=METHOD).eval()
    eviction = _Eviction()
    for layer, decoder in enumerate(model.model.layers):
        decoder.self_attn.register_forward_pre_hook(eviction)
        decoder.mlp.register_forward_pre_hook(eviction)
        experts = decoder.mlp.experts
        weights: Weights = {role: (parameter.detach()[0],) for role, parameter in experts.named_parameters()}
        experts.expertflow = Attachment(_ReadyExperts(weights, eviction), layer, config.num_experts)  # type: ignore[arg-type]
    token = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        cache = kv_cache_of(model(token.expand(1, 64), use_cache=True))
        step = _seconds_per_call(lambda _: model(token, **{KV_CACHE: cache}).logits, seconds, eviction)
        return step / layers


def measure_row_seconds(
    hidden: int, top_k: int, tokens: int, dtype: torch.dtype, seconds: float = 0.2
) -> float:
    """Per token of a prompt in one layer: gathering its rows by expert, weighing and adding what comes back."""
    attachment = Attachment(_ReadyExperts({}, None), 0, 8 * top_k)  # type: ignore[arg-type]
    hidden_TD = torch.randn(tokens, hidden).to(dtype)
    index_TK = torch.rand(tokens, 8 * top_k).topk(top_k).indices
    weight_TK = torch.rand(tokens, top_k).to(dtype)

    def route(_: int) -> Tensor:
        return run_experts(attachment, hidden_TD, index_TK, weight_TK, lambda rows_ND, _: rows_ND)

    return _seconds_per_call(route, seconds) / tokens


def measure_machine(
    *,
    dtype: torch.dtype,
    expert_matrix: tuple[int, int],
    dense_matrix: tuple[int, int],
    top_k: int,
    expert_rows: Sequence[int],
    dense_rows: Sequence[int],
    hidden: int,
    load_bytes_per_s: float,
) -> Machine:
    """Everything but the slow tier, which is measured where its files are. About three seconds."""
    expert = measure_multiplication(*expert_matrix, dtype, _points(expert_rows))
    dense = measure_multiplication(*dense_matrix, dtype, _points(dense_rows))
    layer_overhead, expert_overhead = measure_layer_overhead(top_k, dtype)
    return Machine(
        expert,
        dense,
        load_bytes_per_s,
        measure_load_latency(),
        layer_overhead,
        expert_overhead,
        measure_row_seconds(hidden, top_k, max(dense_rows), dtype),
        torch.get_num_threads(),
    )


def _points(rows: Sequence[int]) -> list[int]:
    """One row, those asked for, and one between: memory-bound to compute-bound is not a straight line."""
    points = {1, *rows}
    return sorted(points | {max(1, math.isqrt(max(points)))})
