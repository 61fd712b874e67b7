"""Decisions of the cache: what to load, where, and at whose expense.

Pure: told what happened (a layer opened, a load finished, an expert was released), it answers with
actions and changes only its own books. It imports no thread, file, clock or device, so the
simulator runs these very lines, and a recorded event list can be replayed against them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from expertflow.cache.policies.base import Forecast, Policy
from expertflow.cache.slots import SlotTable
from expertflow.core import ExpertId


@dataclass(frozen=True, slots=True)
class Load:
    """Read `expert` into `slot`. A demand load is urgent: it goes before every prefetch."""

    expert: ExpertId
    slot: int
    evicted: ExpertId | None
    urgent: bool


@dataclass(frozen=True, slots=True)
class Promote:
    """A prefetch on its way has become a demand."""

    expert: ExpertId


@dataclass(frozen=True, slots=True)
class Cancel:
    """A prefetch is no longer wanted: drop it if its first byte was not read yet."""

    expert: ExpertId


Action = Load | Promote | Cancel


@dataclass(frozen=True, slots=True)
class Opened:
    """How a layer found the cache: each needed expert is in exactly one of the three."""

    ready: tuple[ExpertId, ...]
    in_flight: tuple[ExpertId, ...]
    missing: tuple[ExpertId, ...]
    actions: tuple[Action, ...]


class _Except(Container[ExpertId]):
    """`offered` without the experts that a prefetch must not push out."""

    def __init__(self, offered: Container[ExpertId], kept: Container[ExpertId]):
        self.offered, self.kept = offered, kept

    def __contains__(self, expert: object) -> bool:
        return expert in self.offered and expert not in self.kept


# Loads under way up to which a policy that looks ahead is asked for one more: one that is read, and one that the
# link goes on with. A prefetch decided earlier than that would push somebody out before anything is gained.
_MOST_UNDER_WAY = 2


class _Stage(Enum):
    """How far a prefetch got that no layer has asked for."""

    QUEUED = "not a byte asked for: it can be dropped"
    CANCELLING = "the loader is being asked to drop it"
    STARTED = "the loader refused: its bytes are on their way"


class CachePlan:
    """Who gets a slot (paper 3.4: prefetch, and real-time correction when the router has spoken).

    One layer is open at a time: from open_layer until each of its experts was released or withdrawn.
    Every Cancel must be answered, by load_abandoned when the loader dropped it, else by cancel_refused.
    """

    def __init__(self, table: SlotTable, policy: Policy):
        self.table = table
        self.policy = policy
        self._demands: deque[ExpertId] = deque()  # needed by the open layer, no slot found yet
        self._hints: dict[ExpertId, None] = {}  # predicted, no slot found yet; soonest first
        self._expected: set[ExpertId] = set()  # predicted, and their layer has not opened since
        self._prefetching: dict[ExpertId, _Stage] = {}  # given to the loader, not there yet; latest last
        self._under_way: set[ExpertId] = set()  # every load that has not ended, demands too
        self._unreadable: set[ExpertId] = set()  # failed, and their layer has not opened since

    @property
    def content(self) -> bool:
        """No demand and no hint waits for a slot, so a release would start nothing."""
        return not self._demands and not self._hints

    @property
    def quiet(self) -> bool:
        """Content, no prefetch under way, none to come: a layer that finds all it needs asks for no action."""
        return not self._demands and not self._hints and not self._prefetching and self.policy.content

    def begin_pass(self, forecast: Forecast | None) -> list[Action]:
        """A pass over all layers begins, of which this is expected; None when nobody predicts."""
        self.policy.begin_pass(forecast)
        return self._assign()

    def refine(self, layer: int, p_E: Sequence[float]) -> list[Action]:
        """Something better is known of one layer of this pass; too late once it has opened."""
        self.policy.refine(layer, p_E)
        return self._assign()

    def expect_next(self, p_LE: Sequence[Sequence[float]]) -> list[Action]:
        """While a pass runs: the next one, of other sequences, is expected to need these."""
        self.policy.expect_next(p_LE)
        return self._assign()

    def prefetch(self, experts: Iterable[ExpertId]) -> list[Action]:
        """Take note of experts that will be needed, soonest first, and load what fits now.

        A hint never pushes out another expected expert and never delays a demand; it lapses when
        its layer opens. Repeating one is harmless, and brings back an expert that a demand pushed out.
        """
        for expert in experts:
            self._expected.add(expert)
            if self.table.lookup(expert) is None:
                self._hints[expert] = None
        return self._assign()

    def open_layer(self, layer: int, needed: Sequence[ExpertId]) -> Opened:
        """The router of `layer` has spoken: correct the plan (paper 3.4, real-time correction).

        needed: distinct. Pins every needed expert, at once or when it gets a slot; each must be released
        once, or withdrawn.
        """
        wanted = set(needed)
        assert len(wanted) == len(needed), f"layer {layer} needs an expert twice: {needed}"
        assert not self._demands, f"layer {layer} opens while another waits for {list(self._demands)}"
        unwanted = [expert for expert in self._prefetching if expert.layer == layer and expert not in wanted]
        actions = [self._cancel(e) for e in unwanted if self._prefetching[e] is _Stage.QUEUED]
        self.policy.layer_opened(layer, needed)
        self._hints = {expert: None for expert in self._hints if expert.layer != layer}
        self._expected = {expert for expert in self._expected if expert.layer != layer}
        self._unreadable = {expert for expert in self._unreadable if expert.layer != layer}
        ready, in_flight, missing = [], [], []
        for expert in needed:
            if self.table.lookup(expert) is None:
                missing.append(expert)
                continue
            self.table.pin(expert)
            self.policy.used(expert)
            if self.table.is_ready(expert):
                ready.append(expert)
            else:
                in_flight.append(expert)
                if self._prefetching.pop(expert, None) is not None:
                    actions.append(Promote(expert))
        missing = self.policy.order_demands(missing)
        self._demands.extend(missing)
        actions += self._assign()
        return Opened(tuple(ready), tuple(in_flight), tuple(missing), tuple(actions))

    def load_finished(self, expert: ExpertId) -> list[Action]:
        self._prefetching.pop(expert, None)
        self._under_way.discard(expert)
        self.table.finish_load(expert)
        return self._assign()

    def load_abandoned(self, expert: ExpertId) -> list[Action]:
        """A demand failed, or a prefetch was cancelled. If it was pinned, whoever waits for it must give up first."""
        self._prefetching.pop(expert, None)
        self._under_way.discard(expert)
        self.table.abandon_load(expert)
        self.policy.evicted(expert)
        return self._assign()

    def prefetch_failed(self, expert: ExpertId) -> list[Action]:
        """As load_abandoned. The policy would name it again at once, and for ever: it waits until its layer opens."""
        self._unreadable.add(expert)
        return self.load_abandoned(expert)

    def cancel_refused(self, expert: ExpertId) -> list[Action]:
        """The loader has begun this load already; it will finish, and its slot comes free with it."""
        self._prefetching[expert] = _Stage.STARTED
        return self._assign()

    def release(self, expert: ExpertId) -> list[Action]:
        """The open layer is done with this expert."""
        self.table.unpin(expert)
        return self._assign()

    def withdraw(self, experts: Iterable[ExpertId]) -> list[Action]:
        """The open layer gives up demands that have no slot yet (it failed, or was interrupted)."""
        gone = set(experts)
        self._demands = deque(expert for expert in self._demands if expert not in gone)
        return self._assign()

    def _assign(self) -> list[Action]:
        if _Stage.CANCELLING in self._prefetching.values():
            return []  # the answer comes back here, and may be a free slot: evict nobody before
        actions: list[Action] = []
        while self._demands:
            evictable = self.table.evictable
            if self.table.is_full and (
                self._no_hurry() or self.policy.prefers_waiting(evictable, self._demands[0])
            ):
                return actions
            load = self._find_room(self._demands[0], evictable, urgent=True)
            if load is None:
                return actions + self._cancel_for_demands()
            self._demands.popleft()
            self.table.pin(load.expert)
            self.policy.used(load.expert)
            actions.append(load)
        while self._hints:
            expert = next(iter(self._hints))
            if self.table.lookup(expert) is None:
                load = self._find_room(expert, _Except(self.table.evictable, self._expected), urgent=False)
                if load is None:
                    break
                self._prefetching[expert] = _Stage.QUEUED
                actions.append(load)
            del self._hints[expert]
        if self.policy.looks_ahead:
            actions += self._look_ahead()
        return actions

    def _no_hurry(self) -> bool:
        """The link has demands enough to go on with, and experts in use now may be better victims soon."""
        return self.policy.binds_late and len(self._under_way) - len(self._prefetching) >= _MOST_UNDER_WAY

    def _look_ahead(self) -> list[Action]:
        """Keep the link supplied with what the policy expects to be needed."""
        actions: list[Action] = []
        while len(self._under_way) < _MOST_UNDER_WAY:
            passed_over = (
                self.table.residents | self._unreadable if self._unreadable else self.table.residents
            )
            expert = self.policy.next_prefetch(passed_over)
            if expert is None:
                break
            offered: Container[ExpertId] = self.table.evictable
            if self._expected:
                offered = _Except(offered, self._expected)
            load = self._find_room(expert, offered, urgent=False, own_idea=True)
            if load is None:
                break
            self._prefetching[expert] = _Stage.QUEUED
            actions.append(load)
        return actions

    def _cancel_for_demands(self) -> list[Action]:
        """Queued prefetches hold slots that nobody reads yet: take back the last, as many as are short."""
        queued = [expert for expert, stage in self._prefetching.items() if stage is _Stage.QUEUED]
        return [self._cancel(expert) for expert in queued[::-1][: len(self._demands)]]

    def _cancel(self, expert: ExpertId) -> Action:
        self._prefetching[expert] = _Stage.CANCELLING
        return Cancel(expert)

    def _find_room(
        self, expert: ExpertId, offered: Container[ExpertId], urgent: bool, own_idea: bool = False
    ) -> Load | None:
        slot = self.table.take_free()
        victim = None
        if slot is None:
            choose = self.policy.choose_prefetch_victim if own_idea else self.policy.choose_victim
            victim = choose(offered, expert)
            if victim is None:
                return None
            slot = self.table.evict(victim)
            self.policy.evicted(victim)
        self.table.begin_load(expert, slot)
        self._under_way.add(expert)
        self.policy.loaded(expert)
        return Load(expert, slot, victim, urgent)
