"""Calibrating the virtual clock: costs that are known come back, and a run of the engine is what it says it is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import link_bound, on_the_clock, simulator_accuracy
from benchmarks.on_the_clock import (
    SETTLE,
    TINY,
    Case,
    Run,
    arithmetic,
    bandwidth_for,
    least_loads,
    over_link,
    run,
    run_joint,
    simulate,
    texts,
    waiting,
)
from benchmarks.pace import BLOCK, Gauge, at_pace
from expertflow.cache.policies import Forecast
from expertflow.core import MoEShape
from expertflow.sim.clock import Pass
from expertflow.sim.hardware import Costs
from tests import families

SHAPE = MoEShape((8, 8, 8))
TRUE = Costs(3e-4, 2e-3, math.inf, chunks=2, pass_s=5e-3, ahead_s=7e-4, miss_s=1e-4, call_s=2e-4, wake_s=6e-4)


def synthetic(
    predictor: str,
    link: int | None = None,
    policy: str = "lru",
    pace_of: Callable[[int], float] = lambda _: 1.0,
) -> Run:
    """Steps that take exactly what TRUE says times the machine's pace, but for two that a neighbour held up."""
    draw = random.Random(1)
    made = Run(Case(policy, 1, 4.0, predictor, link), SHAPE, 12, expert_bytes=8000, chunks=2)
    said = Forecast([[0.2] * 8] * 3) if predictor != "none" else None
    ahead_L = [None, [0.3] * 8, [0.3] * 8] if predictor != "none" else []
    for number in range(5 + 40):
        made.passes.append(Pass([draw.sample(range(8), draw.randint(2, 5)) for _ in range(3)], said, ahead_L))
        if number < 5:
            continue
        uses = sum(map(len, made.passes[-1].experts_L))
        missing = draw.randint(0, uses)
        busy = uses * TRUE.expert_s + missing * TRUE.miss_s + (2 * TRUE.ahead_s if said else 0.0)
        stalled = draw.random() * 1e-3
        held_up = 1.0 if number in (9, 20) else 0.0
        pace = pace_of(number)
        made.uses.append(uses)
        made.missing.append(missing)
        made.open_s.append((busy + stalled + held_up) * pace)
        made.stall_s.append(stalled * pace)
        made.between_s.append(TRUE.dense_s * pace)
        made.step_s.append(made.open_s[-1] + (3 * TRUE.dense_s + TRUE.pass_s) * pace)
        made.pace_s.append(pace)
    return made


def test_arithmetic_is_found_in_the_time_of_steps():
    demand = arithmetic(synthetic("none"))
    for name in ("expert_s", "dense_s", "pass_s", "miss_s"):
        assert getattr(demand, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name
    assert demand.ahead_s == 0.0
    predicting = arithmetic(synthetic("online", policy="plec"), demand)
    assert predicting.ahead_s == pytest.approx(TRUE.ahead_s, rel=1e-3)


def test_a_machine_that_changes_its_pace_does_not_change_the_costs():
    """Half of the steps at half the speed: costs are per pace, and come back in seconds at any."""
    uneven = synthetic("none", pace_of=lambda number: 0.08 if number % 16 < 8 else 0.04)
    per_pace = arithmetic(uneven)
    for name in ("expert_s", "dense_s", "pass_s", "miss_s"):
        assert getattr(per_pace, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name
    slow = at_pace(replace(TRUE, chunk_s=1e-3), 2.0)
    assert slow.chunk_s == 1e-3, "a throttled link keeps to the clock"
    assert [getattr(slow, n) / getattr(TRUE, n) for n in ("expert_s", "pass_s", "wake_s", "call_s")] == [
        2.0
    ] * 4


def test_a_gauge_is_looked_at_between_blocks_and_times_the_same_steps_each_time():
    with Gauge(TINY, 1, 12.0, 16) as gauge:
        with pytest.raises(RuntimeError, match="wants a text"):
            gauge.seconds()
        gauge.read(texts(gauge.llm, 1, 16, part=0))
        before = gauge.llm.experts.cache.stats.to_dict()
        gauge.seconds()
        between = gauge.llm.experts.cache.stats.to_dict()
        done = run(TINY, Case("lru", 1, 8.0), 2 * BLOCK, 1, gauge)
        after = gauge.llm.experts.cache.stats.to_dict()
    uses = [stats["hits"] + stats["misses"] for stats in (before, between, after)]
    loads = [stats["misses"] for stats in (before, between, after)]
    assert uses[2] - uses[1] == 3 * (uses[1] - uses[0]), "before each of two blocks, and at the end"
    assert loads[2] - loads[1] == 3 * (loads[1] - loads[0]), "the same experts are there when it begins"
    assert len(done.pace_s) == len(done.step_s) == 2 * BLOCK
    assert len(set(done.pace_s)) == 2
    assert done.per_pace(done.step_s)[-1] == done.step_s[-1] / done.pace_s[-1]


@pytest.mark.parametrize("pace", [1.0, 2.0])
def test_waiting_is_what_a_run_over_a_link_stalled_longer(pace):
    bound = synthetic("none", link=4_000_000, pace_of=lambda _: pace)
    true = at_pace(over_link(TRUE, bound), pace)
    assert true.load_s == pytest.approx(2e-3)
    stalled_s = simulate(bound, true).stall_seconds
    bound.stall_s = [stalled_s / len(bound.step_s)] * len(bound.step_s)
    bound.turnaround_s = [TRUE.call_s * pace] * 9 + [1.0]
    found = waiting(replace(TRUE, call_s=0.0, wake_s=0.0), bound)
    assert found.call_s == TRUE.call_s
    assert found.wake_s == pytest.approx(TRUE.wake_s, rel=0.05)
    bound.stall_s = [0.0] * len(bound.step_s)
    assert waiting(TRUE, bound).wake_s == TRUE.wake_s, "less than none cannot be found"


def test_a_ratio_gives_the_link_on_which_lru_has_it():
    free = synthetic("none")
    for ratio in (0.5, 4.0):
        case = replace(free.case, bytes_per_s=bandwidth_for(ratio, free, TRUE, 6))
        outcome = simulate(replace(free, case=case, num_slots=6), over_link(TRUE, replace(free, case=case)))
        assert outcome.link_seconds / outcome.compute_seconds == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("predictor", ["none", "online"])
def test_a_run_of_the_engine_is_recorded_as_it_was(predictor):
    """What the simulator replays has the needs that the engine counted; on demand its hits and bytes as well."""
    policy = "lru" if predictor == "none" else "plec"
    done = run(TINY, Case(policy, 1, 28.0, predictor, 2_000_000_000), steps=24, part=0)
    assert done.settle == 1 + SETTLE
    counted = [sum(map(len, step.experts_L)) for step in done.passes[done.settle :]]
    assert counted == done.uses
    assert len(done.step_s) == len(done.between_s) == 24
    assert all(o >= s >= 0 for o, s in zip(done.open_s, done.stall_s, strict=True))
    assert (done.passes[-1].forecast is not None) == (predictor == "online")
    assert any(p_E is not None for p_E in done.passes[-1].ahead_L) == (predictor == "online")
    if predictor == "none":
        quick = over_link(replace(TRUE, chunks=done.chunks), done)
        # Else a layer would run in waves, and whom a wave evicts depends on what has been computed by then.
        assert max(len(needed) for step in done.passes for needed in step.experts_L) <= 28
        outcome = simulate(done, quick)
        assert done.bytes_read > 0
        assert (outcome.uses, outcome.hits) == (sum(done.uses), done.hits)
        assert outcome.loads * done.expert_bytes == done.bytes_read


def test_two_batches_that_meet_load_what_both_as_one_would() -> None:
    """And the first of them, alone, needs no more than both."""
    one = Case("lru", 2, 20.0, "none", 2_000_000_000)
    two = replace(one, batch=1, batches=2)
    both, joint, first = run(TINY, one, 24, part=0), run_joint(TINY, two, 24, 0), run(TINY, two, 24, 0)
    wanted = both.measures()
    assert both.bytes_read > 0
    assert (joint["bytes_per_step"], joint["hit_ratio"]) == (wanted["bytes_per_step"], wanted["hit_ratio"])
    assert joint.keys() == wanted.keys()
    for alone, together in zip(first.passes, both.passes, strict=True):
        for some, every in zip(alone.experts_L, together.experts_L, strict=True):
            assert set(some) <= set(every)


def test_no_policy_loads_less_than_belady() -> None:
    made = synthetic("none")
    loads = {slots: least_loads(made, slots) for slots in (12, 18, 24)}
    assert loads[12] > loads[18] > loads[24] == 0.0
    for policy in ("lru", "lfu", "plec"):
        assert simulate(made, replace(TRUE, chunk_s=1e-4), policy).loads / len(made.step_s) >= loads[12]


@pytest.mark.parametrize("predictor", ["none", "online"])
def test_a_decoder_behind_an_encoder_is_run_and_recorded_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predictor: str
) -> None:
    """Its encoder reads the prompt once; steps and what is counted are the decoder's, and two runs take one path."""
    folder = families.write_checkpoint("switch_safetensors", tmp_path / "switch")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (2, 8), generator=draw), torch.randint(5, 60, (2, SETTLE + 6), generator=draw)
    monkeypatch.setattr(on_the_clock, "_prompts_and_steps", lambda *_: [ids])
    policy = "lru" if predictor == "none" else "plec"
    done, again = (run(folder, Case(policy, 2, 2.0, predictor, 10**9), steps=6, part=0) for _ in range(2))
    encoder = done.passes[0].first_layer
    assert 0 < encoder < done.shape.num_layers
    assert done.layers == done.shape.num_layers - encoder
    assert done.settle == 1 + SETTLE
    assert [step.experts_L for step in done.passes] == [step.experts_L for step in again.passes]
    for step in done.passes:
        assert not any(step.experts_L[:encoder])
        assert all(step.experts_L[encoder:])
    assert [sum(map(len, step.experts_L)) for step in done.passes[done.settle :]] == done.uses
    assert (done.passes[-1].forecast is not None) == (predictor == "online")


def test_the_oracle_is_told_what_comes():
    foretold = synthetic("online", policy="plec")
    for step, told in zip(foretold.passes, link_bound.oracle(foretold), strict=True):
        assert told.experts_L == step.experts_L
        assert told.forecast is not None
        for needed, p_E in zip(step.experts_L, told.forecast.p_LE, strict=True):
            assert [expert for expert, p in enumerate(p_E) if p == 1.0] == sorted(needed)
            assert sum(p_E) == len(needed)


def row(error: float, disturbed: bool = False) -> dict[str, Any]:
    return {"error": error, "disturbed": disturbed, "stolen": 0.0}


@pytest.mark.parametrize(
    ("rows", "met"),
    [
        ([row(0.1), row(-0.14)], True),
        ([row(0.1), row(-0.2)], False),
        ([row(0.1), row(0.01, disturbed=True)], None),
        ([row(0.9, disturbed=True)], None),
        ([row(0.2), row(0.01, disturbed=True)], False),
        ([{**row(0.1), "stolen": None}], None),
    ],
)
def test_a_disturbed_run_is_neither_a_failure_nor_a_success(rows, met):
    assert simulator_accuracy.targets(rows)["worst_error"]["met"] is met


def test_twelve_runs_meet_every_ratio_with_every_policy():
    cases = list(simulator_accuracy.cases())
    assert len(cases) == len(set(cases)) == 12
    for policy in ("lru", "lfu", "plec"):
        of_policy = [case for case in cases if case[0] == policy]
        assert {case[2] for case in of_policy} == {1, 4}
        assert {case[3] for case in of_policy} == {1 / 4, 1 / 2}
        assert {case[4] for case in of_policy} == {0.5, 1, 4}
    assert simulator_accuracy.CALIBRATED_AT not in {case[3] for case in cases}
