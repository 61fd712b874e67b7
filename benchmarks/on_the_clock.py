"""Runs of the engine on the clock over a throttled link, and what the simulator needs to predict them.

A run decodes known text (teacher-forced, so that every run of a batch takes the same routes) with experts in RAM
behind a link. Recorded beside the time of each step: what the routers chose, what the predictor said, and where the
time went. `calibrate` makes the costs of the virtual clock from runs that are not predicted. With a `Gauge` the
machine's own pace is noted between steps, and costs are per pace (`pace.py`); without one they are seconds.
"""

from __future__ import annotations

import json
import lzma
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.pace import BLOCK, Gauge, at_pace
from expertflow.cache.gate import AlwaysOpen
from expertflow.cache.policies import POLICIES, SIMULATED, Forecast
from expertflow.core import ExpertId, MoEShape
from expertflow.disturbance import Disturbance, Watch
from expertflow.engine.llm import LLM
from expertflow.kv_name import KV_CACHE, kv_cache_of
from expertflow.models.capture import capture_routes, count_source_layers
from expertflow.models.meeting import run_together
from expertflow.sim.clock import Outcome, Pass, Simulation
from expertflow.sim.hardware import Costs

ROOT = Path(__file__).parents[1]
TINY = ROOT / "models" / "tiny-moe"
TEXTS = ROOT / "zoo" / "sample" / "chat.jsonl.xz"
_HALVINGS = 8  # to 0.4 %
PROMPT, SETTLE = 32, 16  # tokens before the first step; steps before the first that counts


@dataclass(frozen=True)
class Case:
    """One way to run the engine. bytes_per_s: of the link; None: RAM as it is.

    batches: that share the texts; `run` decodes the first of them, `run_joint` all.
    """

    policy: str
    batch: int
    cache_size: float
    predictor: str = "none"
    bytes_per_s: int | None = None
    batches: int = 1

    @property
    def family(self) -> str:
        """Cases of one family take as long to decide: they share their calibration."""
        return self.predictor if self.predictor != "none" else "on demand"


@dataclass
class Run:
    """What came of a case. Lists are of the steps that count; passes has the prompt and the settling too."""

    case: Case
    shape: MoEShape
    num_slots: int
    expert_bytes: int  # that cross the link for one expert
    chunks: int
    passes: list[Pass] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    open_s: list[float] = field(default_factory=list)  # in layers, from the router's word on
    stall_s: list[float] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)  # asked for when their layer opened
    between_s: list[float] = field(
        default_factory=list
    )  # from the end of one layer's experts to the next's begin
    turnaround_s: list[float] = field(
        default_factory=list
    )  # of the loader, between two loads that both waited
    pace_s: list[float] = field(default_factory=list)  # of the gauge around each step; empty without one
    bytes_read: int = 0
    hits: int = 0
    disturbance: Disturbance = field(default_factory=lambda: Disturbance(None, None))

    @property
    def layers(self) -> int:
        """That a step runs: an encoder's are not among them."""
        return self.shape.num_layers - self.passes[-1].first_layer

    @property
    def settle(self) -> int:
        return len(self.passes) - len(self.step_s)

    @property
    def seconds(self) -> float:
        return sum(self.step_s)

    @property
    def pace(self) -> float:
        return mean(self.pace_s) if self.pace_s else 1.0

    def per_pace(self, seconds: Sequence[float]) -> list[float]:
        """What was noted of each step, in paces."""
        return [s / p for s, p in zip(seconds, self.pace_s or [1.0] * len(seconds), strict=True)]

    @property
    def hit_ratio(self) -> float:
        return self.hits / sum(self.uses)

    def measures(self) -> dict[str, Any]:
        return _measures(
            self.case,
            len(self.step_s),
            self.seconds,
            self.hit_ratio,
            self.bytes_read,
            sum(self.stall_s),
            self.disturbance,
        )


def texts(llm: LLM, batch: int, length: int, part: int, of: Sequence[str] = ("prompt", "response")) -> Tensor:
    """[batch, length] token ids of real conversations, one behind the other; parts share no conversation.

    of: only what one side said.
    """
    rows: list[list[int]] = [[] for _ in range(batch)]
    with lzma.open(TEXTS, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number % 2 != part:
                continue
            row = min(rows, key=len)
            if len(row) >= length:
                break
            said = json.loads(line)
            encoded: Any = llm.tokenizer(" ".join(said.get(side, "") for side in of) + "\n")
            row += encoded.input_ids
    if min(map(len, rows)) < length:
        raise SystemExit(
            f"{TEXTS} holds too little text for {batch} rows of {length} tokens; give fewer --steps"
        )
    return torch.tensor([row[:length] for row in rows])


class _Listening:
    """The cache as a predictor sees it, noting what it is told."""

    def __init__(self, cache: Any):
        self.cache, self.shape, self.timeline = cache, cache.shape, None
        self.said: list[tuple[Forecast | None, list[Sequence[float] | None]]] = []

    def begin_pass(self, forecast: Forecast | None) -> None:
        self.said.append((forecast, [None] * self.shape.num_layers))
        self.cache.begin_pass(forecast)

    def refine(self, layer: int, p_E: Sequence[float]) -> None:
        self.said[-1][1][layer] = p_E
        self.cache.refine(layer, p_E)


class _Tap:
    """A store that notes when each read began and ended; all else is the store's."""

    def __init__(self, store: Any):
        self._store = store
        self._layer_of = {c: e.layer for e in store.experts for c in store.chunks(e)}
        self.reads: list[tuple[int, float, float]] = []  # layer, began, ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_chunk(self, chunk: Any, buffer: Tensor) -> int:
        began = time.perf_counter()
        count = self._store.read_chunk(chunk, buffer)
        self.reads.append((self._layer_of[chunk], began, time.perf_counter()))
        return count


class _Stopwatch:
    """When each layer's experts began and ended."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self, *_: Any) -> None:
        self.marks.append(time.perf_counter())


@contextmanager
def _timed_layers(llm: LLM) -> Iterator[_Stopwatch]:
    watch, hooks = _Stopwatch(), []
    for layer in llm.experts.moe_layers:
        module = llm.model.get_submodule(layer.name)
        hooks += [module.register_forward_pre_hook(watch.mark), module.register_forward_hook(watch.mark)]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def run(folder: Path, case: Case, steps: int, part: int, gauge: Gauge | None = None) -> Run:
    """Load the model, decode `steps` tokens of each row, close it. part: which half of the texts.

    gauge: looked at before every BLOCK steps that count, and at the end.
    """
    with LLM(folder, **_settings(case, steps)) as llm:
        model: Any = llm.model
        cache, predicting = llm.experts.cache, llm.experts.predicting
        store, some = cache.store, ExpertId(0, 0)
        done = Run(
            case,
            cache.shape,
            cache.num_slots,
            sum(c.nbytes for c in store.chunks(some)),
            len(store.chunks(some)),
        )
        heard = None
        if predicting is not None:
            heard = _Listening(cache)
            predicting.cache, predicting.gate = heard, AlwaysOpen()  # type: ignore[assignment]
        tap: Any = _Tap(store)
        cache.memory.store = tap
        prompt_BT, steps_BT = _prompts_and_steps(llm, case, SETTLE + steps, part)[0]
        with capture_routes(model) as capture, _timed_layers(llm) as layers:
            decode = _read_prompt(model, prompt_BT)
            watch, looks = Watch(), []
            for number in range(SETTLE + steps):
                if number == SETTLE:
                    cache.reset_stats()
                    tap.reads.clear()
                    watch = Watch()
                if gauge is not None and number >= SETTLE and (number - SETTLE) % BLOCK == 0:
                    looks.append(gauge.seconds())
                before = _counts(cache.stats)
                layers.marks.clear()
                began = time.perf_counter()
                decode(steps_BT[:, number : number + 1])
                after = _counts(cache.stats)
                if number >= SETTLE:
                    done.step_s.append(time.perf_counter() - began)
                    _note(done, layers.marks, before, after)
            if gauge is not None:
                looks.append(gauge.seconds())
                around = [(first + second) / 2 for first, second in pairwise(looks)]
                done.pace_s = [around[number // BLOCK] for number in range(steps)]
            done.disturbance = watch.so_far()
            stats = cache.stats
            done.bytes_read, done.hits = stats.bytes_read, stats.hits
        if predicting is not None and predicting.stats.failed is not None:
            raise SystemExit(f"the predictor {case.predictor} failed: {predicting.stats.failed}")
        decoded = [routed for routed in capture.passes if routed.side == "target"]
        source_layers = count_source_layers(model)
        said = heard.said if heard is not None else [(None, [])] * len(decoded)
        for routed, (forecast, ahead_L) in zip(decoded, said, strict=True):
            experts_L: list[list[int]] = [[] for _ in range(source_layers)]
            for experts, routes_TK in zip(routed.num_experts_L, routed.routes_L, strict=True):
                chosen = dict.fromkeys(routes_TK.flatten().tolist())
                experts_L.append([expert for expert in chosen if expert < experts])  # or nowhere
            done.passes.append(Pass(experts_L, forecast, ahead_L, first_layer=source_layers))
        # Two demands of one layer: the second was waiting when the first was there.
        pairs = zip(tap.reads, tap.reads[1:], strict=False)
        done.turnaround_s = [next_[1] - last[2] for last, next_ in pairs if last[0] == next_[0]]
    return done


@torch.no_grad()
def run_joint(folder: Path, case: Case, steps: int, part: int) -> dict[str, Any]:
    """As `run`, of all batches of the case, which meet at every MoE layer; a step is of all. As `Run.measures`."""
    with LLM(folder, **_settings(case, steps), sequences=case.batch * case.batches) as llm:
        model: Any = llm.model
        cache, predicting = llm.experts.cache, llm.experts.predicting
        if predicting is not None:
            predicting.gate = AlwaysOpen()
        batches = [
            (_read_prompt(model, prompt_BT), steps_BT)
            for prompt_BT, steps_BT in _prompts_and_steps(llm, case, SETTLE + steps, part)
        ]
        watch, began = Watch(), 0.0
        for number in range(SETTLE + steps):
            if number == SETTLE:
                cache.reset_stats()
                watch, began = Watch(), time.perf_counter()
            run_together([partial(decode, ids_BT[:, number : number + 1]) for decode, ids_BT in batches])
        seconds, stats = time.perf_counter() - began, cache.stats
        if predicting is not None and predicting.stats.failed is not None:
            raise SystemExit(f"the predictor {case.predictor} failed: {predicting.stats.failed}")
        return _measures(
            case, steps, seconds, stats.hit_ratio, stats.bytes_read, stats.stall_seconds, watch.so_far()
        )


def _settings(case: Case, steps: int) -> dict[str, Any]:
    return {
        "store": "ram",
        "cache_size": case.cache_size,
        "policy": case.policy,
        "predictor": case.predictor,
        "link": case.bytes_per_s,
        "batch": case.batch,
        "context": PROMPT + SETTLE + steps,
    }


def _measures(
    case: Case,
    steps: int,
    seconds: float,
    hit_ratio: float,
    bytes_read: int,
    stall_seconds: float,
    disturbance: Disturbance,
) -> dict[str, Any]:
    link = case.bytes_per_s
    return {
        "step_seconds": seconds / steps,
        "hit_ratio": round(hit_ratio, 4),
        "bytes_per_step": round(bytes_read / steps),
        "stall_seconds": stall_seconds / steps,
        "link_busy": None if link is None else round(bytes_read / link / seconds, 4),
        **disturbance.to_dict(),
    }


def _prompts_and_steps(llm: LLM, case: Case, steps: int, part: int) -> list[tuple[Tensor, Tensor]]:
    """Of each batch [batch, PROMPT] and [batch, steps] token ids. An encoder reads what was asked, its decoder what was
    answered."""
    rows = case.batch * case.batches
    if getattr(llm.model.config, "is_encoder_decoder", False):
        prompt_BT = texts(llm, rows, PROMPT, part, ["prompt"])
        steps_BT = texts(llm, rows, steps, part, ["response"])
    else:
        prompt_BT, steps_BT = texts(llm, rows, PROMPT + steps, part).split([PROMPT, steps], dim=1)
    return list(zip(prompt_BT.split(case.batch), steps_BT.split(case.batch), strict=True))


def _read_prompt(model: Any, ids_BT: Tensor) -> Callable[[Tensor], None]:
    """Run it; what comes back runs the next token of each row. An encoder reads it, and its decoder begins anew."""
    if not model.config.is_encoder_decoder:
        past = kv_cache_of(model(ids_BT, use_cache=True))
        return lambda next_B1: model(next_B1, use_cache=True, **{KV_CACHE: past})
    start_B1 = torch.full_like(ids_BT[:, :1], model.config.decoder_start_token_id)
    encoded = model.get_encoder()(input_ids=ids_BT)
    past = kv_cache_of(model(encoder_outputs=encoded, decoder_input_ids=start_B1, use_cache=True))
    kept: dict[str, Any] = {KV_CACHE: past, "encoder_outputs": encoded}
    return lambda next_B1: model(decoder_input_ids=next_B1, use_cache=True, **kept)


def _counts(stats: Any) -> tuple[float, int, int]:
    """Stalled seconds, uses and experts asked for on opening so far."""
    return stats.stall_seconds, stats.hits + stats.misses, sum(layer.misses for layer in stats.layers)


def _note(
    done: Run, marks: list[float], before: tuple[float, int, int], after: tuple[float, int, int]
) -> None:
    begins, ends = marks[::2], marks[1::2]
    done.open_s.append(sum(ends) - sum(begins))
    done.between_s.append(median(b - e for b, e in zip(begins[1:], ends, strict=False)))
    done.stall_s.append(after[0] - before[0])
    done.uses.append(after[1] - before[1])
    done.missing.append(after[2] - before[2])


def arithmetic(free: Run, demand: Costs | None = None) -> Costs:
    """Costs of everything but the link, from a run without one. demand: those of a run that predicts nothing, for
    one that does: an expert costs the same there, and what is left is look-ahead's.

    Steps that took much longer than most were somebody else's, and are left out.
    """
    step_s, open_s = free.per_pace(free.step_s), free.per_pace(free.open_s)
    stall_s, between_s = free.per_pace(free.stall_s), free.per_pace(free.between_s)
    limit = 1.5 * median(step_s)
    kept = [n for n, seconds in enumerate(step_s) if seconds <= limit]
    layers = free.layers
    busy = [open_s[n] - stall_s[n] for n in kept]
    dense_s = median(between_s[n] for n in kept)
    pass_s = mean(step_s[n] - open_s[n] for n in kept) - layers * dense_s
    expert_s = miss_s = ahead_s = 0.0
    if demand is None:
        uses_NF = torch.tensor([[float(free.uses[n]), float(free.missing[n])] for n in kept])
        expert_s, miss_s = (
            torch.linalg.lstsq(uses_NF, torch.tensor(busy)[:, None]).solution.flatten().tolist()
        )
        if miss_s < 0 or expert_s < 0:  # lost in the noise
            expert_s, miss_s = sum(busy) / sum(free.uses[n] for n in kept), 0.0
    else:
        expert_s, miss_s = demand.expert_s, demand.miss_s
        known = sum(expert_s * free.uses[n] + miss_s * free.missing[n] for n in kept)
        asked = sum(p_E is not None for n in kept for p_E in free.passes[free.settle + n].ahead_L)
        ahead_s = max(0.0, sum(busy) - known) / asked if asked else 0.0
    # chunk_s is of no link at all yet.
    return Costs(expert_s, dense_s, math.inf, free.chunks, max(0.0, pass_s), ahead_s, miss_s)


def over_link(costs: Costs, run: Run) -> Costs:
    """The same over the run's link."""
    assert run.case.bytes_per_s is not None
    return replace(costs, chunk_s=run.expert_bytes / run.case.bytes_per_s / run.chunks)


def waiting(costs: Costs, bound: Run) -> Costs:
    """Adds what a load costs beside its bytes, from a run that a link holds up. All costs are per pace.

    call_s is the loader's turnaround as seen; wake_s the one with which the simulator stalls as long as that run did.
    """
    turnaround_s = median(bound.turnaround_s) / bound.pace if bound.turnaround_s else 0.0
    costs = replace(over_link(costs, bound), call_s=turnaround_s)
    stalled_s = sum(bound.stall_s)

    def simulated(wake_s: float) -> Outcome:
        return simulate(bound, at_pace(replace(costs, wake_s=wake_s), bound.pace))

    without = simulated(0.0)
    if without.stall_seconds >= stalled_s or not without.waits:
        return costs
    # The link goes on while arithmetic wakes, so a second of waking costs less than a second: found by halving.
    least, most = 0.0, (stalled_s - without.stall_seconds) / without.waits / bound.pace
    while simulated(most).stall_seconds < stalled_s and most * bound.pace < stalled_s:
        least, most = most, 2 * most
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        least, most = (middle, most) if simulated(middle).stall_seconds < stalled_s else (least, middle)
    return replace(costs, wake_s=most)


def simulate(
    run: Run, costs: Costs, policy: str | None = None, passes: Sequence[Pass] | None = None
) -> Outcome:
    """The steps of a run that count, on the virtual clock; with another policy or other forecasts where given."""
    known = {**POLICIES, **SIMULATED}
    chosen = known[policy or run.case.policy](run.shape, run.num_slots)
    return Simulation(chosen, costs).run(run.passes if passes is None else passes, run.settle)


def least_loads(run: Run, num_slots: int) -> float:
    """That a cache of so many slots makes in a step of this run, knowing all that comes (Belady)."""
    free = Costs(0.0, 0.0, 0.0, run.chunks)
    counted = Simulation(SIMULATED["belady"](run.shape, num_slots), free).run(run.passes, run.settle)
    return counted.loads / len(run.step_s)


def bandwidth_for(ratio: float, run: Run, costs: Costs, num_slots: int) -> int:
    """Bytes per second at which the loads of lru take `ratio` times its arithmetic, on a run's routes."""
    lru = Simulation(POLICIES["lru"](run.shape, num_slots), replace(costs, chunk_s=1e-9)).run(
        run.passes, run.settle
    )
    return max(1, round(lru.loads * run.expert_bytes / (ratio * lru.compute_seconds)))


def calibrate(
    folder: Path,
    batch: int,
    predictors: Sequence[str],
    steps: int,
    cache_size: float,
    gauge: Gauge | None = None,
) -> tuple[dict[str, Costs], list[Run]]:
    """Costs by family, and the runs they are from: on the first half of the texts, with this cache size; each
    family once without a link (arithmetic) and once over one on which lru's loads take twice its arithmetic.
    Costs are per pace where there is a gauge."""
    found: dict[str, Costs] = {}
    runs: list[Run] = []
    demand: Costs | None = None
    link = 0
    for predictor in ("none", *predictors):
        policy = "lru" if predictor == "none" else "plec"
        free = run(folder, Case(policy, batch, cache_size, predictor), steps, 0, gauge)
        costs = arithmetic(free, demand)
        if demand is None:
            demand = costs
            link = bandwidth_for(2, free, at_pace(costs, free.pace), free.num_slots)
        bound = run(folder, Case(policy, batch, cache_size, predictor, link), steps, 0, gauge)
        runs += [free, bound]
        found[bound.case.family] = waiting(costs, bound)
    return found, runs
