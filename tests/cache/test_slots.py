from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertflow.cache.slots import SlotTable
from expertflow.core import ExpertId

EXPERTS = [ExpertId(layer, expert) for layer in range(3) for expert in range(4)]
A, B, C = EXPERTS[:3]


class SlotMachine(RuleBasedStateMachine):
    """Any sequence of allowed calls, beside the obvious model: slot -> what is in it."""

    @initialize(num_slots=st.integers(2, 6))
    def start(self, num_slots: int) -> None:
        self.table = SlotTable(num_slots)
        self.model: dict[int, ExpertId] = {}
        self.ready: set[ExpertId] = set()
        self.pins: dict[ExpertId, int] = dict.fromkeys(EXPERTS, 0)

    @rule(expert=st.sampled_from(EXPERTS))
    def load(self, expert: ExpertId) -> None:
        if expert in self.model.values():
            return
        slot = self.table.take_free()
        assert (slot is None) == (len(self.model) == self.table.num_slots)
        if slot is not None:
            assert slot not in self.model, "a slot was given away twice"
            self.table.begin_load(expert, slot)
            self.model[slot] = expert

    def _some(self, data: st.DataObject, among: set[ExpertId]) -> ExpertId | None:
        return data.draw(st.sampled_from(sorted(among))) if among else None

    @rule(data=st.data(), succeed=st.booleans())
    def end_load(self, data: st.DataObject, succeed: bool) -> None:
        loading = set(self.model.values()) - self.ready
        if not succeed:
            loading = {expert for expert in loading if not self.pins[expert]}
        if (expert := self._some(data, loading)) is None:
            return
        if succeed:
            self.table.finish_load(expert)
            self.ready.add(expert)
        else:
            self.table.abandon_load(expert)
            self._empty_slot_of(expert)

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        if (expert := self._some(data, {e for e in self.ready if not self.pins[e]})) is not None:
            slot = self.table.evict(expert)
            assert self.model[slot] == expert
            self._empty_slot_of(expert)
            self.ready.remove(expert)
            self._reuse(slot, data)

    def _reuse(self, slot: int, data: st.DataObject) -> None:
        wanted = data.draw(st.sampled_from(sorted(set(EXPERTS) - set(self.model.values()))))
        self.table.begin_load(wanted, slot)  # as plan.py does: an evicted slot is never free in between
        self.model[slot] = wanted

    def _empty_slot_of(self, expert: ExpertId) -> None:
        self.model = {slot: other for slot, other in self.model.items() if other != expert}

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        if (expert := self._some(data, set(self.model.values()))) is not None:
            self.table.pin(expert)
            self.pins[expert] += 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        expert = data.draw(st.sampled_from([e for e in EXPERTS if self.pins[e]]))
        self.table.unpin(expert)
        self.pins[expert] -= 1

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.table.check()
        for expert in EXPERTS:
            slot = self.table.lookup(expert)
            assert slot is None if expert not in self.model.values() else self.model[slot] == expert
            assert self.table.is_ready(expert) == (expert in self.ready)
            assert self.table.is_pinned(expert) == (self.pins[expert] > 0)
        assert set(self.table.residents) == set(self.model.values())
        assert set(self.table.evictable) == {e for e in self.ready if not self.pins[e]}


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def table_with(loading: tuple[ExpertId, ...] = (), ready: tuple[ExpertId, ...] = ()) -> SlotTable:
    table = SlotTable(4)
    for expert in (*loading, *ready):
        slot = table.take_free()
        assert slot is not None
        table.begin_load(expert, slot)
    for expert in ready:
        table.finish_load(expert)
    return table


MISUSES: dict[str, Callable[[SlotTable], object]] = {
    "load a resident": lambda table: table.begin_load(A, 3),
    "finish an absent one": lambda table: table.finish_load(C),
    "finish twice": lambda table: table.finish_load(B),
    "abandon an absent one": lambda table: table.abandon_load(C),
    "abandon a ready one": lambda table: table.abandon_load(B),
    "abandon one that a layer waits for": lambda table: (table.pin(A), table.abandon_load(A)),
    "evict a loading one": lambda table: table.evict(A),
    "evict an absent one": lambda table: table.evict(C),
    "evict a pinned one": lambda table: (table.pin(B), table.evict(B)),
    "pin an absent one": lambda table: table.pin(C),
    "unpin what is not pinned": lambda table: table.unpin(B),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_fails_and_changes_no_slot(misuse):
    table = table_with(loading=(A,), ready=(B,))
    with pytest.raises(AssertionError, match="expert"):
        MISUSES[misuse](table)
    table.check()
    assert set(table.residents) == {A, B}


def test_a_pin_counts():
    table = table_with(ready=(A,))
    table.pin(A)
    table.pin(A)
    table.unpin(A)
    assert A not in table.evictable
    table.unpin(A)
    assert A in table.evictable


@pytest.mark.parametrize("num_slots", [-1, 0, 1])
def test_too_few_slots_are_refused_with_the_remedy(num_slots):
    with pytest.raises(ValueError, match=f"num_slots={num_slots} .* use 2 or more"):
        SlotTable(num_slots)


def break_free_list(table: SlotTable) -> None:
    table._free.pop()


def break_ready(table: SlotTable) -> None:
    table._ready.add(C)


def break_pins(table: SlotTable) -> None:
    table._pins[C] = 1


def break_evictable(table: SlotTable) -> None:
    table._evictable.add(A)


@pytest.mark.parametrize("damage", [break_free_list, break_ready, break_pins, break_evictable])
def test_check_notices(damage):
    """Every other test here leans on check(), so check() itself is shown to fail."""
    table = table_with(loading=(A,), ready=(B,))
    table.check()
    damage(table)
    with pytest.raises(AssertionError):
        table.check()
