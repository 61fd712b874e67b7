"""Slots: which expert occupies which piece of fast memory.

Bookkeeping only: it never touches a tensor, so the engine and the simulator share it.
An expert is loading, ready, or absent. A pinned expert is never offered for eviction, nor is one
that is still loading: its bytes are on their way to the slot.
"""

from __future__ import annotations

from collections.abc import Set

from expertflow.core import ExpertId


class SlotTable:
    """A fixed number of slots, each empty or holding one expert (loading or ready)."""

    def __init__(self, num_slots: int):
        if num_slots < 2:
            raise ValueError(
                f"num_slots={num_slots} leaves no slot to load into while one computes; use 2 or more"
            )
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[ExpertId, int] = {}
        self._ready: set[ExpertId] = set()
        self._pins: dict[ExpertId, int] = {}
        self._evictable: set[ExpertId] = set()

    def lookup(self, expert: ExpertId) -> int | None:
        """The expert's slot while it is loading or ready, or None when it is absent."""
        return self._slot_of.get(expert)

    def is_ready(self, expert: ExpertId) -> bool:
        return expert in self._ready

    @property
    def ready(self) -> Set[ExpertId]:
        """Every expert whose bytes are whole. A live view, as `evictable`."""
        return self._ready

    @property
    def residents(self) -> Set[ExpertId]:
        """Every expert that holds a slot, loading ones included."""
        return self._slot_of.keys()

    @property
    def evictable(self) -> Set[ExpertId]:
        """Ready and not pinned. A live view: do not keep it over a change."""
        return self._evictable

    @property
    def is_full(self) -> bool:
        return not self._free

    def take_free(self) -> int | None:
        """A slot that holds nothing, or None. The caller must begin_load into it."""
        return self._free.pop() if self._free else None

    def begin_load(self, expert: ExpertId, slot: int) -> None:
        assert expert not in self._slot_of, f"{expert} is already resident"
        self._slot_of[expert] = slot

    def finish_load(self, expert: ExpertId) -> None:
        assert expert in self._slot_of, f"{expert} finished loading into no slot"
        assert expert not in self._ready, f"{expert} finished loading twice"
        self._ready.add(expert)
        if expert not in self._pins:
            self._evictable.add(expert)

    def abandon_load(self, expert: ExpertId) -> None:
        """The load was cancelled or failed: its slot is free again."""
        assert expert in self._slot_of, f"{expert} holds no slot"
        assert expert not in self._ready, f"{expert} is ready; evict it instead"
        assert expert not in self._pins, f"a layer still waits for {expert}"
        self._free.append(self._slot_of.pop(expert))

    def evict(self, expert: ExpertId) -> int:
        """Forget a ready, unpinned expert and return its slot. Nothing is copied: weights are read-only."""
        assert expert in self._evictable, f"{expert} is pinned, loading or absent"
        self._evictable.remove(expert)
        self._ready.remove(expert)
        return self._slot_of.pop(expert)

    def pin(self, expert: ExpertId) -> None:
        assert expert in self._slot_of, f"{expert} holds no slot to pin"
        self._pins[expert] = self._pins.get(expert, 0) + 1
        self._evictable.discard(expert)

    def unpin(self, expert: ExpertId) -> None:
        assert self._pins.get(expert, 0) > 0, f"{expert} is not pinned"
        self._pins[expert] -= 1
        if self._pins[expert] == 0:
            del self._pins[expert]
            if expert in self._ready:
                self._evictable.add(expert)

    def is_pinned(self, expert: ExpertId) -> bool:
        return expert in self._pins

    def check(self) -> None:
        """Assert that every slot is accounted for exactly once (tests call this after each step)."""
        used = list(self._slot_of.values())
        assert sorted(used + self._free) == list(range(self.num_slots)), "a slot is lost or held twice"
        assert self._ready <= self._slot_of.keys(), "a ready expert holds no slot"
        assert self._pins.keys() <= self._slot_of.keys(), "a pinned expert holds no slot"
        assert self._evictable == self._ready - self._pins.keys(), "the evictable set is stale"
