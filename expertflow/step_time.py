"""Step time: how long one forward pass takes, from plain numbers about a model and a machine.

Pure arithmetic: it imports no thread, file, clock or device, so it can be checked by hand.
Loads and products overlap as they do in the expert cache: one loader, ready experts first.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from expertflow.config import Settings

# How often per-layer LRU finds an expert of the next token, as a power of the share of experts it holds.
# "Same experts as the previous token" is right for .29 of chat, .25 of translation and .37 of mathematics
# (6 M-parameter Qwen2-MoE, 32 experts, top-4: a share of 1/8; 2026-11), and (1/8) ** 0.6 is .29.
TYPICAL_EXPONENT = 0.6
# A decode step reads the KV cache, and transformers' growing cache is read and written once more to grow.
_KV_PASSES = 3


@dataclass(frozen=True, slots=True)
class Multiplication:
    """What a matrix product costs on weights that come from memory: seconds per byte of weight, by rows.

    rows ascends; between two measured points the time goes linearly, past the last one in proportion.
    """

    rows: tuple[int, ...]
    seconds_per_byte: tuple[float, ...]

    def seconds(self, weight_bytes: float, rows: float) -> float:
        """Time to multiply `rows` rows by that many bytes of weights."""
        if rows <= self.rows[0]:
            return weight_bytes * self.seconds_per_byte[0]
        if rows >= self.rows[-1]:
            return weight_bytes * self.seconds_per_byte[-1] * rows / self.rows[-1]
        above = bisect_left(self.rows, rows)
        low, high = self.rows[above - 1], self.rows[above]
        share = (rows - low) / (high - low)
        before, after = self.seconds_per_byte[above - 1], self.seconds_per_byte[above]
        return weight_bytes * (before + share * (after - before))

    @property
    def memory_bytes_per_s(self) -> float:
        """Weights streamed per second at one row."""
        return 1 / self.seconds_per_byte[0]


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine does per second, for one model's shapes and dtype."""

    expert: Multiplication  # matrices of the experts' shape
    dense: Multiplication  # matrices of the dense layers' shape
    load_bytes_per_s: float  # from the slow tier: disk, or a copy when experts are kept in RAM
    load_latency_s: float  # from asking for an expert to computing with it, beside its bytes
    layer_overhead_s: float  # a decoder layer with experts, matrices too small to matter
    expert_overhead_s: float  # one more expert in it
    row_s: float  # one more token in it: rows gathered by expert, weighed and added
    threads: int

    def __post_init__(self) -> None:
        assert self.load_bytes_per_s > 0, self.load_bytes_per_s


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass computes, whatever the number of tokens. Bytes are of weights as multiplied."""

    layers: int
    experts_per_layer: tuple[int, ...]  # of the MoE layers among them
    dense_bytes: int  # every matrix but embeddings, routed experts and the head
    head_bytes: int  # runs on the last token of each sequence only


@dataclass(frozen=True, slots=True)
class Work:
    """A model's decode step and its prompt pass: the same pass, or decoder and encoder."""

    decode: Pass
    prefill: Pass
    top_k: int
    expert_bytes: int  # of one expert, as multiplied
    expert_read_bytes: int  # of one expert, as read
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class PassTime:
    """Seconds of one pass. The parts overlap, so they add up to `seconds` or more."""

    seconds: float
    load_seconds: float
    dense_seconds: float
    expert_seconds: float
    overhead_seconds: float

    @property
    def bound(self) -> str:
        """What to improve first: "loading", "arithmetic" or "overhead"."""
        parts = {
            "loading": self.load_seconds,
            "arithmetic": self.dense_seconds + self.expert_seconds,
            "overhead": self.overhead_seconds,
        }
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True, slots=True)
class Speed:
    """Decode and prefill when `hit_ratio` of the experts needed are there (decode; prefill has its own)."""

    label: str
    hit_ratio: float
    prefill_hit_ratio: float
    bytes_per_token: float  # read from the slow tier per decoded token
    decode: PassTime
    prefill: PassTime
    decode_tokens_per_s: float
    prefill_tokens_per_s: float


def distinct_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """Expected experts of a layer that at least one of `tokens` needs, under uniform routing."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def layer_seconds(hits: int, misses: int, load_s: float, multiply_s: float, overlap: bool) -> float:
    """One MoE layer: experts arrive one by one, each is multiplied once it is there, ready ones first."""
    if not overlap:
        return misses * load_s + (hits + misses) * multiply_s
    if not misses:
        return hits * multiply_s
    # The processor never waits; or it waits for the first arrival only; or for every arrival.
    return max((hits + misses) * multiply_s, load_s + misses * multiply_s, misses * load_s + multiply_s)


def expected_layer_seconds(
    needed: float, hit_ratio: float, load_s: float, multiply_s: float, overlap: bool
) -> float:
    """Mean of layer_seconds when each of `needed` experts is there with probability hit_ratio."""
    whole = max(1, round(needed))
    mean = sum(
        math.comb(whole, misses)
        * (1 - hit_ratio) ** misses
        * hit_ratio ** (whole - misses)
        * layer_seconds(whole - misses, misses, load_s, multiply_s, overlap)
        for misses in range(whole + 1)
    )
    return mean * needed / whole


def pass_time(
    work: Work,
    one: Pass,
    machine: Machine,
    *,
    tokens: int,
    sequences: int,
    past: int,
    hit_ratio: float,
    overlap: bool,
) -> PassTime:
    """One forward pass of `tokens` tokens in all, of `sequences` sequences with `past` tokens each before."""
    load_s = work.expert_read_bytes / machine.load_bytes_per_s + machine.load_latency_s
    dense = machine.dense.seconds(one.dense_bytes, tokens) + machine.dense.seconds(one.head_bytes, sequences)
    dense += _KV_PASSES * past * sequences * work.kv_bytes_per_token / machine.dense.memory_bytes_per_s
    in_layers = loads = experts = overhead = 0.0
    for num_experts in one.experts_per_layer:
        needed = distinct_experts(num_experts, work.top_k, tokens)
        rows = tokens * work.top_k / needed
        product_s = machine.expert.seconds(work.expert_bytes, rows)
        multiply_s = product_s + machine.expert_overhead_s
        in_layers += expected_layer_seconds(needed, hit_ratio, load_s, multiply_s, overlap)
        loads += needed * (1 - hit_ratio) * load_s
        experts += needed * product_s
        overhead += needed * machine.expert_overhead_s
    layer_overhead = one.layers * machine.layer_overhead_s
    layer_overhead += len(one.experts_per_layer) * tokens * machine.row_s
    return PassTime(dense + layer_overhead + in_layers, loads, dense, experts, overhead + layer_overhead)


def forecast_speed(
    label: str,
    work: Work,
    machine: Machine,
    settings: Settings,
    hit_ratio: float,
    prefill_hit_ratio: float | None = None,
    past: int = 0,
) -> Speed:
    """Tokens per second with these hit ratios; prefill_hit_ratio None: the same for prompts.

    past: tokens before each decoded one.
    """
    in_prefill = hit_ratio if prefill_hit_ratio is None else prefill_hit_ratio
    check_hit_ratio(hit_ratio)
    check_hit_ratio(in_prefill)
    batch, chunk = settings.batch, prompt_tokens(settings)
    decode = pass_time(
        work, work.decode, machine, tokens=batch, sequences=batch, past=past, hit_ratio=hit_ratio,
        overlap=settings.overlap,
    )  # fmt: skip
    prefill = pass_time(
        work, work.prefill, machine, tokens=chunk, sequences=batch, past=0, hit_ratio=in_prefill,
        overlap=settings.overlap,
    )  # fmt: skip
    needed = sum(distinct_experts(experts, work.top_k, batch) for experts in work.decode.experts_per_layer)
    return Speed(
        label, hit_ratio, in_prefill, needed * (1 - hit_ratio) * work.expert_read_bytes / batch,
        decode, prefill, batch / decode.seconds, chunk / prefill.seconds,
    )  # fmt: skip


def check_hit_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"hit_ratio={ratio} must lie between 0 (every expert is read) and 1 (none is)")


def prompt_tokens(settings: Settings) -> int:
    """Tokens of the largest prompt chunk, over all sequences."""
    return min(settings.prefill_chunk, settings.context) * settings.batch


def prompt_hit_ratio(num_slots: int, num_layers: int, needed: float) -> float:
    """What per-layer LRU reaches on prompt chunks that need `needed` experts of every layer, the steady state:
    each layer finds its share of the slots, since no layer takes another's while it has its own in use."""
    return min(1.0, num_slots / num_layers / needed)


def typical_hit_ratio(resident_share: float) -> float:
    """What per-layer LRU can be expected to reach on text, between the uniform bound and 1."""
    return resident_share**TYPICAL_EXPONENT
