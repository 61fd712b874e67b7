"""Bounds: policies that know the future. Only the simulator can tell it to them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Container, Sequence

from expertflow.cache.policies.base import Policy, Visit
from expertflow.core import ExpertId, MoEShape

NEVER = 1 << 60


class Belady(Policy):
    """Evicts whoever is needed again last (Belady 1966), on demand: nobody can move fewer bytes.

    For this it even lets a demand wait for an expert in use that is needed later than all others, so in time
    others may be better. Without `foresee` nobody is ever needed again.
    """

    def __init__(self, shape: MoEShape, num_slots: int):
        super().__init__(shape, num_slots)
        self._visits: list[list[ExpertId]] = []
        self._uses: dict[ExpertId, list[int]] = {}  # moments to come, the next one last
        self._width = max(shape.experts_per_layer)  # moments in a visit
        self._visit = -1
        # Residents in the order in which they would go, and each one's place in it: (- next use, age, expert). Looking
        # at all of them for each victim took nine tenths of a simulation.
        self._order: list[tuple[int, int, ExpertId]] = []
        self._residents: dict[ExpertId, tuple[int, int, ExpertId]] = {}
        self._loads = 0

    def foresee(self, visits: Sequence[Visit]) -> None:
        """All visits that will come, in order; `layer_opened` is then called once for each."""
        self._visits = [[ExpertId(layer, expert) for expert in experts] for layer, experts in visits]
        self._visit = -1
        self._uses = {}
        for number in range(len(self._visits) - 1, -1, -1):
            # Within a visit whoever is not needed again for long is used first, since its slot can then serve
            # the others: of two that are needed in one visit, the latter of these is the one to evict.
            moments = sorted(self._visits[number], key=self.next_use, reverse=True)
            for moment, expert in enumerate(moments, number * self._width):
                self._uses.setdefault(expert, []).append(moment)
        for expert in list(self._residents):
            self._replace(expert)

    def next_use(self, expert: ExpertId) -> int:
        """When it is needed next, after the visits that have begun: visit * width + its place in the visit."""
        uses = self._uses.get(expert)
        return uses[-1] if uses else NEVER

    def loaded(self, expert: ExpertId) -> None:
        self._loads += 1
        self._enter(expert, self._loads)

    def used(self, expert: ExpertId) -> None:
        return None

    def evicted(self, expert: ExpertId) -> None:
        self._leave(expert)

    def _enter(self, expert: ExpertId, age: int) -> None:
        self._residents[expert] = place = (-self.next_use(expert), age, expert)
        insort(self._order, place)

    def _leave(self, expert: ExpertId) -> int:
        place = self._residents.pop(expert)
        del self._order[bisect_left(self._order, place)]
        return place[1]

    def _replace(self, expert: ExpertId) -> None:
        """Its next use is another now."""
        self._enter(expert, self._leave(expert))

    def layer_opened(self, layer: int, needed: Sequence[ExpertId]) -> None:
        self._visit += 1
        for expert in needed:
            uses = self._uses.get(expert)
            if uses and uses[-1] // self._width <= self._visit:
                uses.pop()
                if expert in self._residents:
                    self._replace(expert)

    def choose_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        return next((expert for _, _, expert in self._order if expert in offered), None)

    def order_demands(self, missing: list[ExpertId]) -> list[ExpertId]:
        return sorted(missing, key=self.next_use, reverse=True)

    def prefers_waiting(self, offered: Container[ExpertId], wanted: ExpertId) -> bool:
        victim = self.choose_victim(offered, wanted)
        if victim is None:
            return False
        needed_last = self.next_use(victim)
        return any(
            expert.layer == wanted.layer and expert not in offered and self.next_use(expert) > needed_last
            for expert in self._residents
        )


class PrefetchingBelady(Belady):
    """Knows the future and uses the link whenever it is idle: fetches in order of use, for whoever is needed later."""

    looks_ahead = True
    binds_late = True

    def __init__(self, shape: MoEShape, num_slots: int):
        super().__init__(shape, num_slots)
        self._all_here_until = 0  # everything that visits before this one need is resident

    def foresee(self, visits: Sequence[Visit]) -> None:
        super().foresee(visits)
        self._all_here_until = 0

    def evicted(self, expert: ExpertId) -> None:
        super().evicted(expert)
        self._all_here_until = min(self._all_here_until, self.next_use(expert) // self._width)

    def prefers_waiting(self, offered: Container[ExpertId], wanted: ExpertId) -> bool:
        return False  # it is after time, not bytes

    def next_prefetch(self, residents: Collection[ExpertId]) -> ExpertId | None:
        self._all_here_until = max(self._all_here_until, self._visit + 1)
        while self._all_here_until < len(self._visits):
            for expert in self._visits[self._all_here_until]:
                if expert not in residents:
                    return expert
            self._all_here_until += 1
        return None

    def choose_prefetch_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        victim = self.choose_victim(offered, wanted)
        if victim is None or self.next_use(victim) <= self.next_use(wanted):
            return None
        return victim
