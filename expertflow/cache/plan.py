"""Decisions of the cache: what to load, where, and at whose expense.

Pure: told what happened (a layer opened, a load finished, an expert was released), it answers with
actions and changes only its own books. It imports no thread, file, clock or device, so the
simulator runs these very lines, and a recorded event list can be replayed against them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from expertflow.cache.policies import Policy
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


class CachePlan:
    """Who gets a slot (paper 3.4: prefetch, and real-time correction when the router has spoken)."""

    def __init__(self, table: SlotTable, policy: Policy):
        self.table = table
        self.policy = policy
        self._demands: deque[ExpertId] = deque()  # needed by an open layer, no slot found yet
        self._hints: deque[ExpertId] = deque()  # predicted, no slot found yet
        self._expected: set[ExpertId] = set()  # predicted, and their layer has not opened since
        self._queued: dict[ExpertId, None] = {}  # prefetches given to the loader, latest last

    def prefetch(self, experts: Iterable[ExpertId]) -> list[Action]:
        """Take note of experts that will be needed, soonest first, and load what fits now.

        A hint never pushes out another expected expert and never delays a demand; it lapses when
        its layer opens.
        """
        for expert in experts:
            if expert in self._expected:
                continue
            self._expected.add(expert)
            if self.table.lookup(expert) is None:
                self._hints.append(expert)
        return self._assign()

    def open_layer(self, layer: int, needed: Sequence[ExpertId]) -> Opened:
        """The router of `layer` has spoken: correct the plan (paper 3.4, real-time correction).

        Pins every needed expert that holds a slot; each must be released once.
        """
        wanted = set(needed)
        actions: list[Action] = [
            Cancel(expert) for expert in self._queued if expert.layer == layer and expert not in wanted
        ]
        self._hints = deque(expert for expert in self._hints if expert.layer != layer)
        self._expected = {expert for expert in self._expected if expert.layer != layer}
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
                if expert in self._queued:
                    del self._queued[expert]
                    actions.append(Promote(expert))
        self._demands.extend(missing)
        actions += self._assign()
        return Opened(tuple(ready), tuple(in_flight), tuple(missing), tuple(actions))

    def load_finished(self, expert: ExpertId) -> list[Action]:
        self._queued.pop(expert, None)
        self.table.finish_load(expert)
        return self._assign()

    def load_abandoned(self, expert: ExpertId) -> list[Action]:
        """The load was cancelled or failed. If it was pinned, whoever waits for it must give up first."""
        self._queued.pop(expert, None)
        self.table.abandon_load(expert)
        self.policy.evicted(expert)
        return self._assign()

    def release(self, expert: ExpertId) -> list[Action]:
        """The open layer is done with this expert."""
        self.table.unpin(expert)
        return self._assign()

    def withdraw(self, experts: Iterable[ExpertId]) -> None:
        """An open layer gives up demands that have no slot yet (its computation failed or was interrupted)."""
        gone = set(experts)
        self._demands = deque(expert for expert in self._demands if expert not in gone)

    def _assign(self) -> list[Action]:
        actions: list[Action] = []
        while self._demands:
            expert = self._demands[0]
            if self.table.lookup(expert) is not None:
                # Another open layer (a second sequence of the same model) asked for it in the meantime.
                self._demands.popleft()
                self.table.pin(expert)
                continue
            load = self._find_room(expert, self.table.evictable, urgent=True)
            if load is None:
                # Queued prefetches hold slots that nobody reads yet: take the last one back.
                if self._queued:
                    last = next(reversed(self._queued))
                    del self._queued[last]
                    actions.append(Cancel(last))
                return actions
            self._demands.popleft()
            self.table.pin(expert)
            actions.append(load)
        while self._hints:
            expert = self._hints[0]
            if self.table.lookup(expert) is not None:
                self._hints.popleft()
                continue
            load = self._find_room(expert, _Except(self.table.evictable, self._expected), urgent=False)
            if load is None:
                break
            self._hints.popleft()
            self._queued[expert] = None
            actions.append(load)
        return actions

    def _find_room(self, expert: ExpertId, offered: Container[ExpertId], urgent: bool) -> Load | None:
        slot = self.table.take_free()
        victim = None
        if slot is None:
            victim = self.policy.choose_victim(offered, expert)
            if victim is None:
                return None
            slot = self.table.evict(victim)
            self.policy.evicted(victim)
        self.table.begin_load(expert, slot)
        self.policy.loaded(expert)
        return Load(expert, slot, victim, urgent)
