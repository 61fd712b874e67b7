"""The virtual clock, against sums done by hand and against the plan."""

from __future__ import annotations

import random

import pytest

from expertflow.cache.plan import Action, CachePlan
from expertflow.cache.policies import POLICIES, SIMULATED, Forecast
from expertflow.cache.policies.belady import Belady
from expertflow.cache.slots import SlotTable
from expertflow.core import MoEShape
from expertflow.sim.clock import Outcome, Pass, Simulation
from expertflow.sim.hardware import Costs

ALL = {**POLICIES, **SIMULATED}
COSTS = Costs(expert_s=2.0, dense_s=0.0, chunk_s=1.0, chunks=4)


def simulate(name: str, shape: MoEShape, num_slots: int, passes: list[Pass], costs: Costs = COSTS) -> Outcome:
    return Simulation(ALL[name](shape, num_slots), costs).run(passes)


def surely(*experts_L: list[int], num_experts: int = 4) -> Forecast:
    p_LE = [[1.0 if e in experts else 0.0 for e in range(num_experts)] for experts in experts_L]
    return Forecast(p_LE, [[30.0] * num_experts for _ in experts_L])


def test_on_demand_by_hand():
    """Two experts are loaded in 4 s each; the first is computed (2 s) while the second arrives."""
    outcome = simulate("lru", MoEShape((4,)), 4, [Pass([[0, 1]], None), Pass([[0, 1]], None)])
    assert (outcome.seconds, outcome.compute_seconds, outcome.stall_seconds) == (4 + 4 + 2 + 4, 8, 6)
    assert (outcome.uses, outcome.hits, outcome.chunks, outcome.loads) == (4, 2, 8, 2)
    assert outcome.link_seconds == 8


def test_ready_experts_are_computed_first():
    passes = [Pass([[1]], None), Pass([[0, 1]], None)]
    # Expert 1 is there and computes for 2 of the 4 s that expert 0 takes.
    assert simulate("lru", MoEShape((4,)), 4, passes).seconds == (4 + 2) + (4 + 2)


def test_blocking_waits_for_all_loads_of_the_layer():
    passes = [Pass([[0, 1]], None)]
    assert simulate("lru", MoEShape((4,)), 4, passes).seconds == 4 + 4 + 2
    assert simulate("cache-moe", MoEShape((4,)), 4, passes).seconds == 4 + 4 + 2 + 2


def test_a_right_prediction_hides_the_load_behind_arithmetic():
    costs = Costs(expert_s=6.0, dense_s=0.0, chunk_s=1.0, chunks=4)
    needed = [[0], [2]]
    unpredicted = simulate("plec", MoEShape((4, 4)), 4, [Pass(needed, None)], costs)
    predicted = simulate("plec", MoEShape((4, 4)), 4, [Pass(needed, surely(*needed))], costs)
    assert unpredicted.seconds == (4 + 6) + (4 + 6)
    assert predicted.seconds == 4 + 6 + 6
    assert (predicted.hits, predicted.in_flight) == (1, 1), "the first was on its way when its layer opened"


def test_a_demand_waits_for_one_chunk_of_a_prefetch_and_no_more():
    """Expert 2 of layer 1 is foretold and on its way when layer 0 turns out to need expert 1 as well. It has
    begun its second chunk of four: the demand comes after that chunk, at 6 s instead of 5.5 or 8."""
    costs = Costs(expert_s=1.5, dense_s=5.5, chunk_s=1.0, chunks=4)
    passes = [Pass([[0, 1], [2]], surely([0], [2]))]
    outcome = simulate("plec", MoEShape((4, 4)), 4, passes, costs)
    # 0 to 4: expert 0. 4 to 6: half of expert 2. 6 to 10: expert 1. 10 to 12: the rest of expert 2.
    # Layer 0 opens at 5.5 and computes expert 0 until 7, expert 1 from 10 to 11.5; layer 1 opens at 17.
    assert outcome.seconds == 11.5 + 5.5 + 1.5
    assert outcome.stall_seconds == 3.0
    assert outcome.hits == 2


def test_an_unwanted_prefetch_that_has_not_begun_costs_nothing():
    """Foretold for layer 1: experts 1 and 2, and the router wants 3. Expert 1 had begun and is carried to its end
    after the demand; expert 2 is dropped. The later passes give the link time for both."""
    passes = [Pass([[0], [3]], surely([0], [1, 2]))] + [Pass([[0], [3]], None)] * 20
    outcome = simulate("plec", MoEShape((4, 4)), 8, passes, Costs(0.5, 0.0, 1.0, 4))
    assert outcome.loads == 3


def test_what_python_and_threads_add_by_hand():
    """One expert, loaded in 4 s and computed in 2: beside that, 10 s before the pass and 1 s to ask; 0.5 s to enter
    what came, 0.25 s to wake. The second pass finds it, and waits for nothing."""
    costs = Costs(2.0, 0.0, 1.0, 4, pass_s=10.0, miss_s=1.0, call_s=0.5, wake_s=0.25)
    passes = [Pass([[0]], None)] * 2
    outcome = simulate("lru", MoEShape((4,)), 4, passes, costs)
    assert outcome.seconds == (10 + 1 + 4 + 0.5 + 0.25 + 2) + (10 + 2)
    assert (outcome.stall_seconds, outcome.link_seconds, outcome.waits) == (4.75, 4, 1)


def test_the_link_idles_while_a_load_is_entered():
    costs = Costs(0.0, 0.0, 1.0, 4, call_s=0.5)
    assert simulate("lru", MoEShape((4,)), 4, [Pass([[0, 1, 2]], None)], costs).seconds == 3 * 4.5


def test_a_prefetch_that_makes_way_is_entered_once():
    """As above, where the demand waits for one chunk: what is interrupted is not entered, only what is whole."""
    costs = Costs(expert_s=1.5, dense_s=5.5, chunk_s=1.0, chunks=4, call_s=0.25)
    simulation = Simulation(POLICIES["plec"](MoEShape((4, 4)), 4), costs)
    simulation.run([Pass([[0, 1], [2]], surely([0], [2]))])
    # 0 to 4.25: expert 0. 4.25 to 6.25: half of expert 2. 6.25 to 10.5: expert 1. 10.5 to 12.75: the rest of 2.
    assert simulation.outcome.stall_seconds == 10.5 - 7
    assert simulation.outcome.seconds == 10.5 + 1.5 + 5.5 + 1.5


def test_look_ahead_speaks_while_the_first_expert_is_waited_for():
    """Nobody foretells the pass; of layer 1, look-ahead says 2 at 1 s, which it takes to look. So expert 2 crosses from
    4 to 8, behind expert 0, which computes from 4 to 6; and looking has cost no time."""
    costs = Costs(expert_s=2.0, dense_s=0.0, chunk_s=1.0, chunks=4, ahead_s=1.0)
    ahead = [None, [0.0, 0.0, 1.0, 0.0]]
    nothing = Forecast([[0.0] * 4] * 2, [[30.0] * 4] * 2)
    simulation = Simulation(POLICIES["plec"](MoEShape((4, 4)), 6), costs, record_events=True)
    outcome = simulation.run([Pass([[0], [2]], nothing, ahead)])
    assert outcome.seconds == 8 + 2
    assert (outcome.in_flight, outcome.compute_seconds, outcome.stall_seconds) == (1, 2 * 2 + 1, 3 + 2)
    assert simulation.events is not None
    assert [event[1:] for event in simulation.events if event[0] == "refine"] == [(1, ahead[1])]
    unasked = simulate("plec", MoEShape((4, 4)), 6, [Pass([[0], [2]], nothing)], costs)
    assert unasked.seconds == 4 + 2 + 4 + 2


def test_layers_of_an_encoder_that_rests_take_no_time_and_are_not_opened():
    costs = Costs(expert_s=2.0, dense_s=5.0, chunk_s=1.0, chunks=4)
    for policy in ("lru", "belady"):
        simulation = Simulation(ALL[policy](MoEShape((4, 4)), 8), costs, record_events=True)
        outcome = simulation.run([Pass([[], [1]], None, first_layer=1)] * 2)
        assert outcome.seconds == 5 + 4 + 2 + 5 + 2
        assert simulation.events is not None
        assert [event[1] for event in simulation.events if event[0] == "open_layer"] == [1, 1]


def test_passes_that_settle_do_not_count():
    passes = [Pass([[0, 1]], None), Pass([[0, 1]], None), Pass([[0, 2]], None)]
    simulation = Simulation(POLICIES["lru"](MoEShape((4,)), 4), COSTS)
    outcome = simulation.run(passes, settle=2)
    assert (outcome.passes, outcome.seconds, outcome.loads, outcome.hits, outcome.uses) == (1, 4 + 2, 1, 1, 2)


def random_passes(shape: MoEShape, seed: int, count: int = 30, predict: bool = True) -> list[Pass]:
    draw = random.Random(seed)
    passes = []
    for _ in range(count):
        experts_L = [sorted(draw.sample(range(n), draw.randint(1, n))) for n in shape.experts_per_layer]
        p_LE = [
            [min(1.0, max(0.0, (e in experts) * 0.7 + draw.random() * 0.3)) for e in range(n)]
            for experts, n in zip(experts_L, shape.experts_per_layer, strict=True)
        ]
        ahead_L = [p_E if p_E[0] < 0.5 else None for p_E in p_LE] if predict else ()
        passes.append(Pass(experts_L, Forecast(p_LE) if predict else None, ahead_L))
    return passes


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("num_slots", [2, 5, 9, 18])
def test_every_second_is_arithmetic_or_stall_and_every_need_is_served(name, num_slots):
    shape = MoEShape((6, 5, 7))
    passes = random_passes(shape, num_slots)
    simulation = Simulation(ALL[name](shape, num_slots), Costs(0.3, 0.1, 0.25, 3))
    outcome = simulation.run(passes)
    simulation.table.check()
    uses = sum(len(experts) for step in passes for experts in step.experts_L)
    assert outcome.uses == uses
    assert outcome.compute_seconds == pytest.approx(uses * 0.3 + len(passes) * 3 * 0.1)
    assert outcome.seconds == pytest.approx(outcome.compute_seconds + outcome.stall_seconds)
    assert outcome.link_seconds <= outcome.seconds + 1e-6, "the link carried more than there was time for"
    assert not simulation._pending


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_events_replay_through_a_plan_of_their_own(name):
    """What tests of the threaded engine do with its events: a fresh plan, told the same, decides the same."""
    shape = MoEShape((6, 5, 7))
    passes = random_passes(shape, seed=5)
    simulation = Simulation(ALL[name](shape, 9), Costs(0.3, 0.1, 0.25, 3), record_events=True)
    simulation.run(passes)
    policy = ALL[name](shape, 9)
    if isinstance(policy, Belady):
        policy.foresee([visit for step in passes for visit in enumerate(step.experts_L)])
    plan = CachePlan(SlotTable(9), policy)
    done: list[Action] = []
    decided: list[Action] = []
    assert simulation.events
    for kind, *told in simulation.events:
        if kind == "action":
            done.append(told[0])
        elif kind == "open_layer":
            decided += plan.open_layer(*told).actions
        else:
            decided += getattr(plan, kind)(*told)
    assert sorted(map(repr, done)) == sorted(map(repr, decided))


@pytest.mark.parametrize("seed", range(6))
def test_nobody_moves_fewer_bytes_than_belady_on_the_clock_too(seed):
    shape = MoEShape((6, 5, 7))
    passes = random_passes(shape, seed)
    fewest = simulate("belady", shape, 7, passes).loads
    for name in ALL:
        if name != "se-moe-ring":
            assert simulate(name, shape, 7, passes).loads >= fewest, name


def test_a_noisy_prediction_changes_time_and_nothing_else():
    shape = MoEShape((6, 5, 7))
    silent = simulate("plec", shape, 7, random_passes(shape, 3, predict=False))
    noisy = simulate("plec", shape, 7, random_passes(shape, 3))
    assert (noisy.uses, noisy.passes, noisy.compute_seconds) == (
        silent.uses,
        silent.passes,
        silent.compute_seconds,
    )
    assert noisy.chunks != silent.chunks
