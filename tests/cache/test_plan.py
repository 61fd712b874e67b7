from __future__ import annotations

import pytest
from fakes import serve
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertflow.cache.plan import Action, CachePlan, Cancel, Load, Promote
from expertflow.cache.policies import POLICIES, SIMULATED, Forecast
from expertflow.cache.policies.plec import NextUse
from expertflow.cache.slots import SlotTable
from expertflow.core import ExpertId, MoEShape

ALL = {**POLICIES, **SIMULATED}
SHAPE = MoEShape((4, 4, 4))
EXPERTS = [ExpertId(layer, expert) for layer in range(3) for expert in range(4)]


def new_plan(num_slots: int, policy: str = "lru") -> CachePlan:
    return CachePlan(SlotTable(num_slots), ALL[policy](SHAPE, num_slots))


class PlanMachine(RuleBasedStateMachine):
    """Anything a loader and two kinds of callers may do, in any order, beside plain books of our own.

    jobs: what a loader would have queued, and whether it has begun (then it refuses to cancel).
    waiting: experts of the open layer not handed out yet. None: no layer is open.
    """

    @initialize(num_slots=st.integers(2, 7), policy=st.sampled_from(sorted(ALL)))
    def start(self, num_slots: int, policy: str) -> None:
        self.plan = new_plan(num_slots, policy)
        self.slots: dict[int, ExpertId] = {}
        self.ready: set[ExpertId] = set()
        self.urgent: dict[ExpertId, bool] = {}  # job -> begun
        self.prefetches: dict[ExpertId, bool] = {}
        self.expected: set[ExpertId] = set()
        self.layer: int | None = None
        self.waiting: set[ExpertId] = set()

    def execute(self, actions: list[Action]) -> None:
        # Decisions of one call are made before any is carried out.
        todo = list(actions)
        while todo:
            action = todo.pop(0)
            if isinstance(action, Load):
                self.load(action)
            elif isinstance(action, Promote):
                self.urgent[action.expert] = self.prefetches.pop(action.expert)
            elif self.prefetches[action.expert]:
                todo += self.plan.cancel_refused(action.expert)
            else:
                del self.prefetches[action.expert]
                self.drop(action.expert)
                todo += self.plan.load_abandoned(action.expert)

    def load(self, load: Load) -> None:
        if load.evicted is None:
            assert load.slot not in self.slots, "a load into a slot that is in use"
        else:
            assert self.slots[load.slot] == load.evicted
            assert load.evicted in self.ready, "evicted an expert that was not ready"
            assert load.evicted not in self.pinned(), "evicted an expert that a layer needs"
            self.ready.remove(load.evicted)
            if not load.urgent:
                assert load.evicted not in self.expected, "a hint pushed out an expected expert"
        self.slots[load.slot] = load.expert
        if load.urgent:
            assert load.expert in self.waiting, "a demand load that no open layer needs"
            self.urgent[load.expert] = False
        else:
            own_idea = self.plan.policy.looks_ahead
            assert own_idea or load.expert in self.expected, "a prefetch of an expert whose layer has opened"
            self.prefetches[load.expert] = False

    def drop(self, expert: ExpertId) -> None:
        self.slots = {slot: other for slot, other in self.slots.items() if other != expert}

    def pinned(self) -> set[ExpertId]:
        return self.waiting & set(self.slots.values())

    @rule(experts=st.lists(st.sampled_from(EXPERTS), max_size=12))
    def hint(self, experts: list[ExpertId]) -> None:
        self.expected.update(experts)
        self.execute(self.plan.prefetch(experts))

    @precondition(lambda self: self.layer is None)
    @rule(p=st.lists(st.sampled_from([0.05, 0.4, 0.6, 0.95]), min_size=12, max_size=12), far=st.booleans())
    def begin_pass(self, p: list[float], far: bool) -> None:
        p_LE = [p[:4], p[4:8], p[8:]]
        later_LE = [[1 + 9 * one for one in p_E] for p_E in p_LE]
        self.execute(self.plan.begin_pass(Forecast(p_LE, later_LE if far else None)))

    @rule(layer=st.integers(0, 2), p=st.lists(st.sampled_from([0.1, 0.8]), min_size=4, max_size=4))
    def refine(self, layer: int, p: list[float]) -> None:
        self.execute(self.plan.refine(layer, p))

    @rule(p=st.lists(st.sampled_from([0.0, 0.4, 0.6, 1.0]), min_size=12, max_size=12))
    def expect_next(self, p: list[float]) -> None:
        self.execute(self.plan.expect_next([p[:4], p[4:8], p[8:]]))

    @precondition(lambda self: self.layer is None)
    @rule(layer=st.integers(0, 2), experts=st.sets(st.integers(0, 3), min_size=1))
    def open_layer(self, layer: int, experts: set[int]) -> None:
        needed = [ExpertId(layer, expert) for expert in experts]
        residents = set(self.slots.values())
        unbegun = {e for e, begun in self.prefetches.items() if e.layer == layer and not begun}
        self.layer, self.waiting = layer, set(needed)
        self.expected = {expert for expert in self.expected if expert.layer != layer}
        opened = self.plan.open_layer(layer, needed)
        assert sorted([*opened.ready, *opened.in_flight, *opened.missing]) == sorted(needed)
        assert set(opened.ready) == self.waiting & self.ready
        assert set(opened.missing) == self.waiting - residents
        assert {a.expert for a in opened.actions if isinstance(a, Cancel)} >= unbegun - self.waiting
        self.execute(list(opened.actions))
        assert not self.waiting & self.prefetches.keys(), "a demand was left among the prefetches"

    @precondition(lambda self: self.urgent or self.prefetches)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        jobs = self.urgent or self.prefetches
        jobs[next(iter(jobs))] = True

    @precondition(lambda self: self.urgent or self.prefetches)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.finish_one(data.draw(st.sampled_from(sorted({*self.urgent, *self.prefetches}))))

    def finish_one(self, expert: ExpertId) -> None:
        self.urgent.pop(expert, None)
        self.prefetches.pop(expert, None)
        self.ready.add(expert)
        self.execute(self.plan.load_finished(expert))

    @precondition(lambda self: self.urgent or self.prefetches)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        expert = data.draw(st.sampled_from(sorted({*self.urgent, *self.prefetches})))
        self.urgent.pop(expert, None)
        self.prefetches.pop(expert, None)
        if expert in self.waiting:
            self.give_up()
        self.drop(expert)
        self.execute(self.plan.load_abandoned(expert))

    @precondition(lambda self: self.waiting & self.ready)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.release_one(data.draw(st.sampled_from(sorted(self.waiting & self.ready))))

    def release_one(self, expert: ExpertId) -> None:
        self.waiting.remove(expert)
        self.execute(self.plan.release(expert))
        if not self.waiting:
            self.layer = None

    @precondition(lambda self: self.layer is not None)
    @rule()
    def give_up(self) -> None:
        pinned = self.pinned()
        self.waiting = set(pinned)
        self.execute(self.plan.withdraw(EXPERTS))
        for expert in sorted(pinned):
            self.waiting.remove(expert)
            self.execute(self.plan.release(expert))
        self.layer = None

    @invariant()
    def books_agree(self) -> None:
        table = self.plan.table
        table.check()
        assert {expert: slot for slot, expert in self.slots.items()} == {
            e: table.lookup(e) for e in table.residents
        }
        assert {e for e in table.residents if table.is_ready(e)} == self.ready
        assert {e for e in EXPERTS if table.is_pinned(e)} == self.pinned()
        assert self.ready | self.urgent.keys() | self.prefetches.keys() == set(self.slots.values())

    @invariant()
    def a_demand_waits_only_when_it_must(self) -> None:
        if self.waiting - set(self.slots.values()):
            num_slots = self.plan.table.num_slots
            assert len(self.slots) == num_slots, "a demand waits beside a free slot"
            if self.plan.policy.binds_late and len(self.urgent) >= 2:
                return  # the link has demands to go on with
            own = {expert for expert in self.slots.values() if expert.layer == self.layer}
            shares = [0] * SHAPE.num_layers
            for slot in range(num_slots):  # slot s is of the layer whose part of the line ends after s
                shares[next(n for n in range(len(shares)) if (n + 1) * num_slots // len(shares) > slot)] += 1
            if len(own) >= max(2, shares[self.layer]):
                # It keeps to its share, where something is in use or on its way and will come free.
                assert own - (self.ready - self.waiting), "a layer waits for itself and holds nothing in use"
                assert not own & (self.ready - self.waiting), (
                    "a demand waits beside its layer's unused expert"
                )
                return
            assert self.ready <= self.waiting, "a demand waits beside an expert nobody needs"
            assert all(self.prefetches.values()), "a demand waits for a prefetch that could be dropped"

    @invariant()
    def a_hint_waits_only_when_it_must(self) -> None:
        hinted = {e for e in self.plan._hints if e not in self.slots.values()}
        if hinted and not self.waiting - set(self.slots.values()):
            assert len(self.slots) == self.plan.table.num_slots
            assert self.ready <= self.waiting | self.expected

    def teardown(self) -> None:
        """Whatever happened, the loads in hand finish and then every demand has been served."""
        if not hasattr(self, "plan"):
            return
        while self.waiting or self.urgent or self.prefetches:
            # A prefetch goes on only when no demand is queued: so does loader.py.
            if jobs := self.urgent or self.prefetches:
                self.finish_one(next(iter(jobs)))
            else:
                assert self.waiting & self.ready, f"{self.waiting} are never served"
            for expert in sorted(self.waiting & self.ready):
                self.release_one(expert)
            self.books_agree()


TestPlanMachine = PlanMachine.TestCase
TestPlanMachine.settings = settings(max_examples=70, stateful_step_count=35, deadline=None)


def at(layer: int, *experts: int) -> list[ExpertId]:
    return [ExpertId(layer, expert) for expert in experts]


def loads(actions: object) -> list[ExpertId]:
    return [action.expert for action in actions if isinstance(action, Load)]


def cancels(actions: object) -> list[ExpertId]:
    return [action.expert for action in actions if isinstance(action, Cancel)]


def test_prefetches_are_loaded_soonest_first_while_there_is_room():
    plan = new_plan(3)
    hinted = [*at(1, 3), *at(0, 2), *at(2, 0, 1)]
    assert loads(plan.prefetch(hinted)) == hinted[:3]
    for expert in hinted[:3]:
        assert plan.load_finished(expert) == [], "a hint pushed out an expected expert"
    assert loads(plan.open_layer(1, at(1, 3)).actions) == []
    assert loads(plan.release(ExpertId(1, 3))) == hinted[3:], "the next hint takes the place of what was used"


def test_a_prefetch_on_its_way_becomes_a_demand():
    plan = new_plan(4)
    plan.prefetch(at(0, 0, 1))
    opened = plan.open_layer(0, at(0, 1, 2))
    assert opened.in_flight == (ExpertId(0, 1),)
    assert opened.missing == (ExpertId(0, 2),)
    assert Promote(ExpertId(0, 1)) in opened.actions
    assert cancels(opened.actions) == at(0, 0), "nobody wants it and it was not begun"


def test_a_refused_cancel_does_not_keep_a_later_demand_from_being_promoted():
    """A prefetch that the loader would not drop was once forgotten by the plan. When its layer opened
    again it stayed in the loader's queue of prefetches, behind every demand, with a layer waiting."""
    plan = new_plan(2)
    plan.prefetch(at(0, 0))
    opened = plan.open_layer(0, at(0, 1))
    assert cancels(opened.actions) == at(0, 0)
    plan.cancel_refused(ExpertId(0, 0))
    plan.load_finished(ExpertId(0, 1))
    plan.release(ExpertId(0, 1))
    again = plan.open_layer(0, at(0, 0))
    assert again.in_flight == (ExpertId(0, 0),)
    assert again.actions == (Promote(ExpertId(0, 0)),)


def test_a_demand_takes_the_prefetch_that_is_needed_last():
    plan = new_plan(3)
    plan.prefetch([*at(0, 0), *at(1, 0), *at(2, 0)])
    opened = plan.open_layer(0, at(0, 0, 1))
    assert cancels(opened.actions) == at(2, 0)
    assert loads(plan.load_abandoned(ExpertId(2, 0))) == at(0, 1)


def test_no_more_prefetches_are_cancelled_than_demands_lack():
    """Dropping this layer's unwanted prefetch makes room enough. The next layer's was once dropped too."""
    plan = new_plan(2)
    plan.prefetch([*at(0, 0), *at(1, 0)])
    opened = plan.open_layer(0, at(0, 1))
    assert cancels(opened.actions) == at(0, 0)
    assert loads(plan.load_abandoned(ExpertId(0, 0))) == at(0, 1)
    assert plan.table.lookup(ExpertId(1, 0)) is not None


def test_a_slot_about_to_be_free_is_taken_before_anyone_is_evicted():
    """The unwanted prefetch of the layer that opens was dropped, but a resident had gone for it already."""
    plan = new_plan(2)
    serve(plan, 1, [0])
    plan.prefetch(at(0, 0))
    opened = plan.open_layer(0, at(0, 1))
    assert opened.actions == (Cancel(ExpertId(0, 0)),)
    (load,) = plan.load_abandoned(ExpertId(0, 0))
    assert load == Load(ExpertId(0, 1), load.slot, evicted=None, urgent=True)


def test_when_a_cancel_is_refused_the_next_prefetch_is_asked_for():
    plan = new_plan(2)
    plan.prefetch([*at(0, 0), *at(1, 0)])
    plan.open_layer(0, at(0, 1))
    assert cancels(plan.cancel_refused(ExpertId(0, 0))) == at(1, 0)


def test_a_hint_brings_back_what_a_demand_pushed_out():
    """Such a hint was once ignored until the layer had opened: the expert counted as expected already."""
    plan = new_plan(2)
    plan.prefetch(at(1, 0))
    plan.load_finished(ExpertId(1, 0))
    serve(plan, 0, [0, 1, 2])
    assert plan.table.lookup(ExpertId(1, 0)) is None
    assert loads(plan.prefetch(at(1, 0))) == at(1, 0)


def test_repeating_a_hint_loads_nothing_twice():
    plan = new_plan(4)
    assert loads(plan.prefetch(at(0, 0, 0, 1))) == at(0, 0, 1)
    assert plan.prefetch(at(0, 0, 1)) == []


def test_a_hint_lapses_when_its_layer_opens():
    plan = new_plan(2)
    plan.prefetch([*at(0, 0), *at(1, 0), *at(0, 1)])  # the third finds no room
    serve(plan, 0, [0])
    assert plan.table.lookup(ExpertId(0, 1)) is None
    assert plan.table.residents == {ExpertId(0, 0), ExpertId(1, 0)}


def test_policy_hears_of_every_use():
    """A missing expert was once loaded without `used`: a policy that counts uses would take a demanded
    expert for a prefetch that nobody needed."""
    plan = new_plan(3)
    heard: list[tuple[str, ExpertId]] = []
    for name in ("loaded", "used", "evicted"):
        inner = getattr(plan.policy, name)
        setattr(plan.policy, name, lambda e, name=name, inner=inner: (heard.append((name, e)), inner(e)))
    plan.prefetch(at(0, 0))
    plan.load_finished(ExpertId(0, 0))
    serve(plan, 0, [0, 1])
    zero, one = at(0, 0, 1)
    assert heard == [("loaded", zero), ("used", zero), ("loaded", one), ("used", one)]


def test_misuse_is_an_assertion():
    plan = new_plan(2)
    with pytest.raises(AssertionError, match="twice"):
        plan.open_layer(0, at(0, 1, 1))
    plan.open_layer(0, at(0, 0, 1, 2))
    with pytest.raises(AssertionError, match="layer 1 opens while another waits"):
        plan.open_layer(1, at(1, 0))


def test_a_policy_that_binds_late_evicts_only_when_the_link_is_ready_for_the_next_demand():
    """Three demands once evicted three experts at once, while two of them only waited in the link's queue: by
    the time they came up, experts of the open layer had been computed that were better to lose."""
    plan = new_plan(4, "plec")
    serve(plan, 1, [0, 1])
    serve(plan, 2, [0, 1])
    opened = plan.open_layer(0, at(0, 0, 1, 2))
    assert opened.missing == tuple(at(0, 0, 1, 2))
    first, second = loads(opened.actions)
    assert loads(plan.load_finished(first)) == at(0, 2)
    assert loads(plan.load_finished(second)) == []


def test_no_more_than_two_loads_are_under_way_for_a_prefetch():
    plan = new_plan(8, "plec")
    forecast = Forecast([[0.9] * 4, [0.9] * 4, [0.1] * 4])
    actions = plan.begin_pass(forecast)
    assert loads(actions) == at(0, 0, 1)
    assert loads(plan.load_finished(ExpertId(0, 0))) == at(0, 2)


def test_an_unlikely_expert_is_not_fetched_and_refining_brings_it():
    plan = new_plan(8, "plec")
    assert plan.begin_pass(Forecast([[0.1] * 4, [0.1] * 4, [0.1] * 4])) == []
    assert loads(plan.refine(1, [0.1, 0.9, 0.1, 0.1])) == at(1, 1)


def test_prefetches_go_two_layers_ahead():
    plan = new_plan(8, "plec")
    (load,) = plan.begin_pass(Forecast([[0.1] * 4, [0.9, 0.1, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]]))
    assert load.expert == ExpertId(1, 0)
    assert plan.load_finished(load.expert) == []
    assert loads(plan.open_layer(0, at(0, 0)).actions) == at(0, 0) + at(2, 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=12, max_size=12), st.integers(2, 11), st.data())
def test_prefetches_do_not_push_each_other_out_for_ever(p, num_slots, data):
    """Whom to evict goes by the expected use, what to fetch by layers: an expert of the next layer that is not so
    sure was evicted for a sure one of the layer after, fetched again for a third, and so on while the link was idle."""
    plan = new_plan(num_slots, "plec")
    later = [[data.draw(st.floats(1, 20)) for _ in range(4)] for _ in range(3)]
    todo = plan.begin_pass(Forecast([p[0:4], p[4:8], p[8:12]], later))
    fetched: list[ExpertId] = []
    while todo:
        load = todo.pop(0)
        fetched.append(load.expert)
        assert len(fetched) <= 12, f"{fetched} went round in circles"
        todo += plan.load_finished(load.expert)
    assert len(set(fetched)) == len(fetched)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=12, max_size=12),
    st.lists(st.floats(0, 1), min_size=12, max_size=12),
    st.integers(2, 11),
    st.integers(0, 2),
    st.data(),
)
def test_nor_do_those_for_the_next_pass(p, next_p, num_slots, opened, data):
    plan = new_plan(num_slots, "plec")
    later = [[data.draw(st.floats(1, 20)) for _ in range(4)] for _ in range(3)]
    todo = plan.begin_pass(Forecast([p[0:4], p[4:8], p[8:12]], later))
    for layer in range(opened + 1):
        todo += plan.open_layer(layer, at(layer, 0)).actions
        while todo:
            action = todo.pop(0)
            if isinstance(action, Load):
                todo += plan.load_finished(action.expert)
        todo += plan.release(ExpertId(layer, 0))
    todo += plan.expect_next([next_p[0:4], next_p[4:8], next_p[8:12]])
    fetched: list[ExpertId] = []
    while todo:
        action = todo.pop(0)
        assert isinstance(action, Load)
        fetched.append(action.expert)
        assert len(fetched) <= 12, f"{fetched} went round in circles"
        todo += plan.load_finished(action.expert)
    assert len(set(fetched)) == len(fetched)


def pass_of(plan: CachePlan, upto: int, needed: int = 0) -> None:
    """Layers 0 to `upto` need one expert each, and are done."""
    for layer in range(upto + 1):
        for load in plan.open_layer(layer, at(layer, needed)).actions:
            assert isinstance(load, Load)
            plan.load_finished(load.expert)
        plan.release(ExpertId(layer, needed))


def test_the_next_pass_is_fetched_for_when_its_first_layers_are_near():
    plan = new_plan(8, "plec")
    plan.begin_pass(Forecast([[0.1] * 4] * 3))
    pass_of(plan, 0)
    assert plan.expect_next([[0.2, 0.6, 0.9, 0.0], [0.0, 0.0, 0.0, 0.9], [0.0, 0.8, 0.0, 0.0]]) == []
    actions = plan.open_layer(1, at(1, 0)).actions  # layer 2, and then layer 0 of the next pass
    assert loads(actions) == [*at(1, 0), *at(0, 2)]
    (load,) = [action for action in actions if action.expert.layer == 1]
    assert loads(plan.load_finished(load.expert)) == at(0, 1)
    plan.load_finished(ExpertId(0, 2))
    plan.load_finished(ExpertId(0, 1))
    plan.release(ExpertId(1, 0))
    actions = plan.open_layer(2, at(2, 0)).actions
    assert loads(actions) == [*at(2, 0), *at(1, 3)], "and of its layer 1, when the last one is open"


def test_layers_that_do_not_run_take_no_time():
    """An encoder's, in the cache before its decoder's."""
    plan = new_plan(8, "plec")
    nothing = [0.0] * 4
    assert loads(plan.begin_pass(Forecast([nothing, nothing, [0.9, 0.0, 0.0, 0.0]]))) == at(2, 0)
    plan.load_finished(ExpertId(2, 0))
    plan.open_layer(2, at(2, 0))
    plan.release(ExpertId(2, 0))
    assert loads(plan.expect_next([nothing, nothing, [0.0, 0.9, 0.0, 0.0]])) == at(2, 1)


def test_what_is_fetched_for_this_pass_makes_no_room_for_the_next():
    plan = new_plan(2, "plec")
    plan.begin_pass(Forecast([[0.0] * 4, [0.0] * 4, [0.5, 0.0, 0.0, 0.0]], [[20.0] * 4] * 3))
    pass_of(plan, 0)
    for load in plan.open_layer(1, at(1, 0)).actions:
        plan.load_finished(load.expert)
    for load in plan.release(ExpertId(1, 0)):  # which makes room for an expert of layer 2 that is not so sure
        plan.load_finished(load.expert)
    assert ExpertId(2, 0) in plan.table.residents
    todo = plan.expect_next([[0.0, 1.0, 1.0, 0.0], [0.0] * 4, [0.0] * 4])
    assert loads(todo) == at(0, 1)
    assert plan.load_finished(ExpertId(0, 1)) == [], (
        "expert 0 of layer 2 may be needed later, but comes first"
    )
    assert plan.table.residents == {ExpertId(2, 0), ExpertId(0, 1)}


def test_what_is_said_again_of_the_next_pass_takes_the_place_of_what_was_said():
    p_LE = [[0.1, 0.5, 0.7, 0.0]] * 3
    once, again = (NextUse(MoEShape((4, 4, 4)), 4) for _ in range(2))
    for policy in (once, again):
        policy.begin_pass(Forecast([[0.2, 0.9, 0.4, 0.0]] * 3, [[2.0, 5.0, 9.0, 30.0]] * 3))
    again.expect_next([[0.9, 0.0, 0.3, 1.0]] * 3)
    for policy in (once, again):
        policy.expect_next(p_LE)
    again.expect_next(p_LE)
    assert again._when == once._when


def test_what_was_expected_of_a_pass_is_forgotten_when_it_begins():
    plan = new_plan(8, "plec")
    plan.begin_pass(Forecast([[0.0] * 4] * 3))
    plan.expect_next([[0.9] * 4] * 3)
    plan.begin_pass(Forecast([[0.0] * 4] * 3))
    for layer in range(3):
        actions = plan.open_layer(layer, at(layer, 0)).actions
        assert loads(actions) == at(layer, 0)
        plan.load_finished(ExpertId(layer, 0))
        assert plan.release(ExpertId(layer, 0)) == []


def test_whoever_the_next_pass_needs_stays():
    for wanted, other in ((0, 1), (1, 0)):
        plan = new_plan(3, "plec")
        plan.begin_pass(Forecast([[0.0] * 4] * 3, [[3.0] * 4] * 3))
        for load in plan.open_layer(0, at(0, 0, 1)).actions:
            plan.load_finished(load.expert)
        for expert in at(0, 0, 1):
            plan.release(expert)
        p_E = [0.0] * 4
        p_E[wanted] = 0.45  # too unlikely to be fetched, likely enough to stay
        plan.expect_next([p_E, [0.0] * 4, [0.0] * 4])
        opened = plan.open_layer(1, at(1, 0, 1))
        evicted = [load.evicted for load in opened.actions if isinstance(load, Load) and load.evicted]
        assert evicted == at(0, other)


def test_a_prefetch_stops_when_whoever_must_go_is_needed_sooner():
    plan = new_plan(2, "plec")
    actions = plan.begin_pass(Forecast([[0.99, 0.98, 0, 0], [0.97, 0, 0, 0], [0] * 4], [[20.0] * 4] * 3))
    for load in actions:
        actions = plan.load_finished(load.expert)
    assert plan.table.residents == set(at(0, 0, 1))
    assert actions == [], "expert 0 of layer 1 is needed after both"
    serve_first = plan.open_layer(0, at(0, 0, 1))
    assert serve_first.missing == ()
    assert loads(plan.release(ExpertId(0, 0))) == at(1, 0), "now it is needed before expert 0 of layer 0"
