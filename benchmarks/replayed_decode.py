"""Decode steps on replayed routes, timed and counted: what benchmarks.full_size does in each process it starts."""

from __future__ import annotations

import time
from itertools import chain, count
from pathlib import Path
from typing import Any

from benchmarks.route_replay import RouteReplay, calls, experts_modules, first_layers
from expertflow.disturbance import Watch
from expertflow.predictor.serving import ServingPredictor
from expertflow.trace import Trace, read_trace

WARM_UP = 8  # decode steps before the first that counts


def decode(model: Any, trace: Trace, batch: int, tokens: int) -> dict[str, Any]:
    """Decode steps of a recording, prompts between them not counted: seconds, and what our cache has to say."""
    experts: Any = getattr(model, "expertflow", None)
    seconds: list[float] = []
    counted = [0.0] * len(_counts(experts))
    decoded, watch = 0, Watch()
    with RouteReplay(model).replaying() as replay:
        for call in chain.from_iterable(calls(trace, batch) for _ in count()):
            before, began = _counts(experts), time.perf_counter()
            replay.run(call)
            took = time.perf_counter() - began
            decoded += not call.begins_text
            if decoded == WARM_UP:
                watch = Watch()
            if call.begins_text or decoded <= WARM_UP:
                continue
            seconds.append(took)
            after = _counts(experts)
            counted = [sum_ + new - old for sum_, new, old in zip(counted, after, before, strict=True)]
            if len(seconds) == tokens:
                break
    step_s = sorted(seconds)[len(seconds) // 2]
    result = {
        "tokens_per_s": batch / step_s,
        "step_s_median": step_s,
        "step_s_all": [round(value, 4) for value in seconds],
        **watch.so_far().to_dict(),
    }
    if experts is not None:
        hits, uses, nbytes, stalled_s = counted
        result |= {
            "hit_ratio": hits / uses,
            "experts_per_step": uses / tokens,
            "bytes_per_step": nbytes / tokens,
            "stall_s_per_step": stalled_s / tokens,
        }
    return result


def _counts(experts: Any) -> list[float]:
    """Hits, uses, bytes read and seconds stalled so far."""
    if experts is None:
        return []
    stats = experts.cache.stats
    return [stats.hits, stats.hits + stats.misses, stats.bytes_read, stats.stall_seconds]


def held_out(model: Any, recording: Path) -> Trace:
    """A recording's held-out sequences, cut to the layers that this model has."""
    trace = read_trace(recording, weights=False).split("test")
    source, experts = 0, experts_modules(model)
    if model.config.is_encoder_decoder:
        inside = {id(module) for module in model.get_encoder().modules()}
        source = sum(id(module) in inside for module in experts)
    return first_layers(trace, source, len(experts) - source)


def ask_no_routers(experts: Any) -> None:
    """Leave look-ahead out of the online predictor: the routers' weights are random, and what they would choose has
    nothing to do with the routes that are replayed."""
    predicting = experts.predicting
    experts_L = experts.cache.shape.experts_per_layer[predicting.source_layers :]
    predicting.make = lambda top_k: ServingPredictor(len(experts_L), max(experts_L), top_k)
