"""PLEC's worked example, the bounds, and rivals against what others say of them."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
from fakes import serve
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.cache.plan import CachePlan, Cancel, Load
from expertflow.cache.policies import POLICIES, SIMULATED, Forecast, Visit
from expertflow.cache.policies.belady import Belady
from expertflow.cache.slots import SlotTable
from expertflow.core import ExpertId, MoEShape

ALL = {**POLICIES, **SIMULATED}


def plan_of(name: str, shape: MoEShape, num_slots: int, visits: list[Visit]) -> CachePlan:
    policy = ALL[name](shape, num_slots)
    if isinstance(policy, Belady):
        policy.foresee(visits)
    return CachePlan(SlotTable(num_slots), policy)


def first_loads(actions: list) -> list[ExpertId]:
    assert all(isinstance(action, Load) for action in actions)
    return [action.expert for action in actions]


@pytest.mark.parametrize("name", ["plec-paper", "plec"])
def test_the_worked_example_of_figure_5(name):
    """Two layers of four experts, four slots. Predicted: e12, e13, e14 of layer 1, e22 and e23 of layer 2; the
    routers want e22 and e24 of layer 2. (The paper counts from 1, we from 0.)"""
    e12, e13, e14 = (ExpertId(0, number) for number in (1, 2, 3))
    e22, e23, e24 = (ExpertId(1, number) for number in (1, 2, 3))
    plan = plan_of(name, MoEShape((4, 4)), 4, [])
    actions = plan.begin_pass(Forecast([[0.1, 0.9, 0.85, 0.8], [0.1, 0.75, 0.7, 0.2]], [[20.0] * 4] * 2))
    # Step 1 and 2: three slots to layer 1 and one to layer 2, the four most probable in order of execution.
    order = []
    while actions:
        load = actions.pop(0)
        assert isinstance(load, Load)
        assert load.evicted is None
        order.append(load.expert)
        actions += plan.load_finished(load.expert)
    assert order == [e12, e13, e14, e22]
    slot_of_e12 = plan.table.lookup(e12)
    opened = plan.open_layer(0, [e12, e13, e14])
    assert opened.ready == (e12, e13, e14)
    assert opened.actions == ()
    # e12 is done: its slot takes e23, while e13 and e14 are computed.
    assert plan.release(e12) == [Load(e23, slot_of_e12, e12, urgent=False)]
    assert plan.release(e13) == []
    plan.load_finished(e23)
    plan.release(e14)
    # e23 is not wanted and e24 was missed: it is loaded first, and never at the cost of e22, which computes.
    opened = plan.open_layer(1, [e22, e24])
    assert opened.ready == (e22,)
    (load,) = opened.actions
    assert load == Load(e24, plan.table.lookup(e24), load.evicted, urgent=True)
    assert load.evicted == e23


def misses(name: str, shape: MoEShape, num_slots: int, visits: list[Visit]) -> int:
    plan = plan_of(name, shape, num_slots, visits)
    return sum(len(serve(plan, layer, experts).missing) for layer, experts in visits)


def loads(name: str, shape: MoEShape, num_slots: int, visits: list[Visit], seed: int = 0) -> int:
    """Bytes, in experts: with a forecast before each pass, and loads that arrive at once."""
    plan = plan_of(name, shape, num_slots, visits)
    draw = random.Random(seed)
    count = 0
    begin_load = plan.table.begin_load

    def counting(expert: ExpertId, slot: int) -> None:
        nonlocal count
        count += 1
        begin_load(expert, slot)

    plan.table.begin_load = counting  # type: ignore[method-assign]
    for layer, experts in visits:
        if layer == 0:
            p_LE = [[draw.random() for _ in range(n)] for n in shape.experts_per_layer]
            actions = plan.begin_pass(Forecast(p_LE))
            while actions:
                action = actions.pop(0)
                assert not isinstance(action, Cancel)
                actions += plan.load_finished(action.expert)
        serve(plan, layer, experts)
    return count


def fewest_loads(visits: list[Visit], num_slots: int) -> int:
    """By trying everything: any order within a layer, any victim."""

    @functools.cache
    def best(number: int, to_serve: frozenset[ExpertId], residents: frozenset[ExpertId]) -> int:
        if not to_serve:
            if number + 1 == len(visits):
                return 0
            layer, experts = visits[number + 1]
            return best(number + 1, frozenset(ExpertId(layer, e) for e in experts), residents)
        costs = []
        for expert in to_serve:
            rest = to_serve - {expert}
            if expert in residents:
                costs.append(best(number, rest, residents))
            elif len(residents) < num_slots:
                costs.append(1 + best(number, rest, residents | {expert}))
            else:
                costs += [1 + best(number, rest, residents - {victim} | {expert}) for victim in residents]
        return min(costs)

    return best(-1, frozenset(), frozenset())


@pytest.mark.parametrize("seed", range(40))
def test_belady_loads_as_few_as_trying_everything(seed):
    draw = random.Random(seed)
    shape, num_slots = MoEShape((3, 3)), draw.choice([2, 3])
    visits = [(step % 2, sorted(draw.sample(range(3), draw.choice([1, 1, 2, 3])))) for step in range(9)]
    assert misses("belady", shape, num_slots, visits) == fewest_loads(visits, num_slots)


VISITS = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True).map(sorted), min_size=3, max_size=30
).map(lambda experts: [(number % 3, chosen) for number, chosen in enumerate(experts)])


@pytest.mark.parametrize("name", sorted(ALL))
@settings(max_examples=25, deadline=None)
@given(visits=VISITS, num_slots=st.integers(2, 9), seed=st.integers(0, 3))
def test_nobody_moves_fewer_bytes_than_belady(name, visits, num_slots, seed):
    shape = MoEShape((4, 4, 4))
    assert loads(name, shape, num_slots, visits, seed) >= loads("belady", shape, num_slots, visits)


@settings(max_examples=60, deadline=None)
@given(visits=VISITS, num_slots=st.integers(2, 9))
def test_belady_needs_no_more_slots_than_it_has(visits, num_slots):
    """More slots never cost bytes: true of Belady, and of no policy that forgets."""
    shape = MoEShape((4, 4, 4))
    assert misses("belady", shape, num_slots + 1, visits) <= misses("belady", shape, num_slots, visits)


REQUESTS = [int(number) for number in (Path(__file__).parent / "requests.txt").read_text().split()]
SIZES = (4, 8, 16)
# Layer 0 of models/tiny-moe, 500 tokens of chat: hits of libCacheSim 0.3.5 by cache size.
LIBCACHESIM = {"lru": (287, 625, 1236), "lfu": (424, 752, 1197), "belady": (747, 1183, 1642)}


def flat_hits(name: str, num_slots: int) -> list[bool]:
    """Each request is a layer of its own: one expert at a time, as a cache of web pages sees them."""
    visits: list[Visit] = [(0, [number]) for number in REQUESTS]
    plan = plan_of(name, MoEShape((32,)), num_slots, visits)
    return [bool(serve(plan, layer, experts).ready) for layer, experts in visits]


@pytest.mark.parametrize("name", LIBCACHESIM)
def test_hits_are_those_that_libcachesim_counted(name):
    assert tuple(sum(flat_hits(name, size)) for size in SIZES) == LIBCACHESIM[name]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LIBCACHESIM)
def test_agrees_with_libcachesim_hit_for_hit(name, size):
    libcachesim = pytest.importorskip("libcachesim", reason="libcachesim is not installed (extra: test)")
    cache = {"lru": libcachesim.LRU, "lfu": libcachesim.LFU, "belady": libcachesim.Belady}[name](size)
    next_use: dict[int, int] = {}
    requests = []
    for time in range(len(REQUESTS) - 1, -1, -1):
        request = libcachesim.Request()
        request.obj_id, request.obj_size, request.clock_time = REQUESTS[time], 1, time
        request.next_access_vtime = next_use.get(REQUESTS[time], 1 << 62)
        next_use[REQUESTS[time]] = time
        requests.append(request)
    assert flat_hits(name, size) == [cache.get(request) for request in reversed(requests)]
