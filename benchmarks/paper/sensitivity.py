"""Sensitivity: when prediction helps, and when it does not, by link, expert size, experts, batch and predictor.

One thing is varied at a time, around conditions in the middle of the paper's: the recorded routes of
Qwen1.5-MoE, a quarter of its experts cached, batches of 8, an A40. What was not recorded (8 to 512 experts, batches
beyond the recording) is drawn by synthetic.py, as skewed and correlated as that recording, and labelled so; there the
predictor is an oracle degraded to the recall that ours has on the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from benchmarks.paper import recordings
from benchmarks.paper.degraded import degraded, recall
from benchmarks.paper.gains import (
    AXES,
    BATCHES,
    BOUND,
    CACHE_MOE,
    DRAWN,
    DRAWN_BATCHES,
    FAST_LINK,
    LRU,
    ORACLE,
    OURS,
    RECORDED,
    figure,
    of_predictor,
    rule_of_thumb,
    rule_sentences,
    sentences,
)
from benchmarks.paper.item import Item, Part, Result, Row, Say, Section, Settings
from benchmarks.paper.simulated import A40, slots
from benchmarks.paper.synthetic import FAR, Knobs, as_trace, calibrate, draw, measure
from expertflow.sim.clock import Outcome, Simulation
from expertflow.sim.compare import KNOWN
from expertflow.sim.hardware import Hardware, ModelSize, costs, hardware, model_size
from expertflow.sim.workload import Foretold, Workload, foretell, make_workload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORDING, TASK, SIZE = "qwen1.5-moe", "chat", "qwen1.5-moe-a2.7b"
BATCH, SHARE = 8, 0.25  # of the experts that fit
STEPS, QUICK_STEPS, SETTLE = 16, 8, 4  # passes; the first ones fill the cache and do not count
DRAWN_LAYERS = 8


@dataclass(frozen=True)
class Condition:
    """Everything but the routes. expert_bytes scales what a product reads, too."""

    machine: Hardware
    size: ModelSize

    @staticmethod
    def usual() -> Condition:
        return Condition(hardware(A40), model_size(SIZE))


@dataclass(frozen=True)
class Routes:
    """The recorded routes with what ours predicts of them, and the knobs of synthetic ones like them; made once."""

    told: Callable[[], Foretold]
    oracle: Callable[[], Foretold]
    knobs: Callable[[], Knobs]


def routes_of(settings: Settings, say: Say = lambda text: None) -> Routes:
    @cache
    def told() -> Foretold:
        return recordings.told(settings, RECORDING, TASK, say)["ours"]

    @cache
    def oracle() -> Foretold:
        read = recordings.recording(settings, RECORDING, TASK)
        return foretell(read.trace.meta, read.test, "oracle", seed=settings.seed)

    @cache
    def knobs() -> Knobs:
        routes = [s.target_routes_TLK[s.num_prefill :] for s in told().sequences]
        experts = max(told().meta.experts_per_layer)
        long_enough = [routes_TLK for routes_TLK in routes if len(routes_TLK) > FAR]
        return calibrate(measure(long_enough, experts), experts, told().top_k, settings.seed)

    return Routes(told, oracle, knobs)


def parts(settings: Settings) -> list[Part]:
    recordings.recording(settings, RECORDING, TASK)
    routes = routes_of(settings)
    return [
        Part(
            f"{axis.name} {value:g}, {source}",
            partial(_simulate, settings, routes, axis.name, value, source),
        )
        for axis in AXES.values()
        for value in axis.chosen(settings.quick)
        for source in sources(axis.name, value)
    ]


def sources(axis: str, value: float) -> list[str]:
    if axis == "experts":
        return [DRAWN]
    if axis == "batch":
        return [*([RECORDED] if value in BATCHES else []), *([DRAWN] if value in DRAWN_BATCHES else [])]
    return [RECORDED]


def _simulate(
    settings: Settings, routes: Routes, axis: str, value: float, source: str, say: Say
) -> list[Row]:
    batch = int(value) if axis == "batch" else BATCH
    steps = QUICK_STEPS if settings.quick else STEPS
    condition = Condition.usual()
    if axis in ("link", "predictor-fast"):
        link = value if axis == "link" else FAST_LINK
        condition = replace(condition, machine=replace(condition.machine, link_bytes_per_s=link * 1e9))
    if axis == "expert":
        condition = replace(condition, size=replace(condition.size, expert_bytes=round(value * 1e6)))
    if of_predictor(axis):
        told = degraded(routes.oracle(), value, settings.seed)
    else:
        told = routes.told()
    if source == DRAWN:
        experts = int(value) if axis == "experts" else condition.size.experts
        told = drawn(
            routes.knobs(), experts, min(told.top_k, experts // 4), batch, steps, recall(told), settings.seed
        )
    known = {"axis": axis, "value": value, "source": source, "recall": round(recall(told), 4)}
    return [known | row for row in compared(told, batch, condition, steps)]


def drawn(
    knobs: Knobs, experts: int, top_k: int, batch: int, steps: int, recalled: float, seed: int
) -> Foretold:
    """Synthetic routes of one batch, and a predictor of this recall."""
    trace = as_trace(draw(knobs, experts, top_k, DRAWN_LAYERS, batch, steps, seed), experts)
    return degraded(foretell(trace.meta, trace.sequences, "oracle"), 1 - recalled, seed)


def compared(told: Foretold, batch: int, condition: Condition, steps: int) -> list[Row]:
    """LRU, Cache-MoE, PLEC with this predictor, with an oracle, and the bound, on the same steps."""
    predicted = make_workload(told, batch, steps)
    oracle = make_workload(replace(told, prediction="oracle"), batch, steps)
    runs: dict[str, tuple[str, Workload]] = {
        LRU: ("lru", oracle),
        CACHE_MOE: ("cache-moe", oracle),
        OURS: ("plec", predicted),
        ORACLE: ("plec", oracle),
        BOUND: ("belady-prefetch", oracle),
    }
    cost = costs(condition.machine, condition.size.expert_bytes, condition.size.dense_bytes)
    num_slots = slots(oracle, SHARE * max(oracle.shape.experts_per_layer))
    found: dict[str, Outcome] = {}
    for name, (policy, workload) in runs.items():
        chosen = KNOWN[policy](workload.shape, num_slots)
        found[name] = Simulation(chosen, cost).run(workload.passes, min(SETTLE, len(workload.passes) // 2))
    return [
        {
            "system": name,
            "step_seconds": outcome.seconds / outcome.passes,
            "stall_seconds": outcome.stall_seconds / outcome.passes,
            "bytes_per_step": round(outcome.loads * condition.size.expert_bytes / outcome.passes),
            "hit_ratio": round(outcome.hit_ratio, 4),
            "ratio": round(found[LRU].link_seconds / found[LRU].compute_seconds, 3),
            "gain": round(found[LRU].seconds / outcome.seconds, 4),
        }
        for name, outcome in found.items()
    ]


def section(result: Result) -> Section:
    notes = ["[When ExpertFlow helps](when.md) has a figure for each, and how they were made."]
    notes += rule_sentences(result.rows)
    notes += [f"{axis.title}: " + " ".join(sentences(result.rows, axis)) for axis in AXES.values()]
    return Section(
        "cache and batch sizes (Fig. 6) and three numbers of experts (Table 2).",
        notes,
        [rule_of_thumb(result.rows)],
    )


def figures(result: Result) -> dict[str, Figure]:
    return {f"when-{axis.name}": figure(result.rows, axis) for axis in AXES.values()}


def conditions(settings: Settings) -> dict[str, Any]:
    return {
        "hardware": A40,
        "batch": BATCH,
        "share": SHARE,
        "steps": QUICK_STEPS if settings.quick else STEPS,
        **recordings.conditions(settings, [(RECORDING, TASK)]),
    }


ITEM = Item("sensitivity", "simulated", "Sensitivity: when it helps", conditions, parts, section, figures)
