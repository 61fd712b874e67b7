"""The expert cache engine: joins slots, plan and loader, and hands experts to a layer as they become ready.

`open_layer` is all that arithmetic sees. Decisions are plan.py's, threads are loader.py's; this file
executes the one with the other and records what happened.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from expertflow.cache.loader import Loader, SlotMemory
from expertflow.cache.plan import Action, Cancel, CachePlan, Load, Promote
from expertflow.cache.policies import POLICIES
from expertflow.cache.slots import SlotTable
from expertflow.cache.stats import CacheStats
from expertflow.core import ExpertId, MoEShape
from expertflow.store.layout import tensors
from expertflow.store.protocol import ExpertStore

logger = logging.getLogger(__name__)

Weights = dict[str, tuple[Tensor, ...]]


class ExpertCache:
    """A bounded set of experts in fast memory over a store that has them all.

    num_slots: experts held at once, at least 2. dtype: what weights are multiplied in (None: as
    stored). overlap: hand out ready experts while others arrive; False loads everything a layer needs
    first (as published by Cache-MoE; the slow, obvious version). record_events: keep the inputs and
    actions of the plan in `events`, for replay.
    """

    def __init__(
        self,
        store: ExpertStore,
        shape: MoEShape,
        num_slots: int,
        *,
        policy: str = "lru",
        dtype: torch.dtype | None = None,
        overlap: bool = True,
        record_events: bool = False,
    ):
        if policy not in POLICIES:
            raise ValueError(f"unknown cache policy {policy!r}; known: {', '.join(sorted(POLICIES))}")
        num_slots = min(num_slots, max(2, shape.num_experts))
        self.store = store
        self.shape = shape
        self.overlap = overlap
        self.table = SlotTable(num_slots)
        self.plan = CachePlan(self.table, POLICIES[policy](shape, num_slots))
        self.memory = SlotMemory(store, num_slots, dtype)
        self.stats = CacheStats(shape, num_slots, self.memory.slot_bytes, getattr(store, "io_mode", "memory"))
        self.events: list[tuple] | None = [] if record_events else None
        self._condition = threading.Condition()
        self._weights: dict[ExpertId, Weights] = {}
        self._failed: dict[ExpertId, BaseException] = {}
        self._prefetched_unused: set[ExpertId] = set()
        self._closed = False
        self._loader = Loader(self.memory, self._condition, self._load_finished)

    @property
    def num_slots(self) -> int:
        return self.table.num_slots

    def prefetch(self, experts: Iterable[ExpertId]) -> None:
        """Hint that these experts will be needed, soonest first. Returns at once.

        A wrong hint costs time, never correctness; unknown expert ids are a ValueError.
        """
        experts = list(experts)
        for expert in experts:
            if expert not in self.store.experts:
                raise ValueError(f"prefetch of {expert}, which the checkpoint does not have")
        with self._condition:
            self._record("prefetch", tuple(experts))
            self._execute(self.plan.prefetch(experts))

    def open_layer(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Weights]]:
        """Yield (expert, its weights by role) for each of `experts`, ready ones first.

        experts: distinct ids; more than there are slots run in waves. The weights are valid until the
        next item is asked for, and not after. Raises the store's error when a read fails.
        """
        needed = [ExpertId(layer, expert) for expert in experts]
        started = time.perf_counter()
        counters = self.stats.layers[layer]
        pending = dict.fromkeys(needed)
        current: ExpertId | None = None
        with self._condition:
            if self._closed:
                raise RuntimeError("this ExpertCache is closed; load the model again to use it")
            opened = self.plan.open_layer(layer, needed)
            self._record("open_layer", layer, tuple(needed))
            counters.hits += len(opened.ready)
            counters.in_flight += len(opened.in_flight)
            counters.misses += len(opened.missing)
            uses_E = self.stats.uses_LE[layer]
            for expert in needed:
                uses_E[expert.expert] += 1
                self._prefetched_unused.discard(expert)
            self._execute(opened.actions)
        try:
            while pending:
                with self._condition:
                    if current is not None:
                        self._release(current)
                        current = None
                    while (ready := self._next_ready(pending)) is None:
                        stalled = time.perf_counter()
                        self._condition.wait()
                        counters.stall_seconds += time.perf_counter() - stalled
                del pending[ready]
                current = ready
                yield ready.expert, self._weights[ready]
        finally:
            with self._condition:
                if current is not None:
                    self._release(current)
                if pending:
                    self._give_up(pending)
            counters.open_seconds += time.perf_counter() - started

    def reset_stats(self) -> None:
        with self._condition:
            self.stats.reset()

    def wait_idle(self) -> None:
        """Return when no load is queued or under way (tests and benchmarks)."""
        with self._condition:
            while not self._loader.idle:
                self._condition.wait()

    def close(self) -> None:
        """Stop the loader. Idempotent; the weights must not be used afterwards."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._condition.notify_all()
        self._loader.close()

    def _next_ready(self, pending: dict[ExpertId, None]) -> ExpertId | None:
        if self._closed:
            raise RuntimeError("this ExpertCache was closed while a layer was computing")
        some_missing = False
        first = None
        for expert in pending:
            if expert in self._failed:
                raise self._failed[expert]
            if self.table.is_ready(expert) and self.table.is_pinned(expert):
                if self.overlap:
                    return expert
                first = first or expert
            elif self.table.lookup(expert) is not None:
                some_missing = True
        # Without overlap nothing is computed until all that has a slot is there.
        return None if some_missing else first

    def _release(self, expert: ExpertId) -> None:
        self._record("release", expert)
        self._execute(self.plan.release(expert))

    def _give_up(self, pending: dict[ExpertId, None]) -> None:
        """The layer's computation failed or was interrupted: leave the books as if it had finished."""
        self.plan.withdraw(pending)
        self._record("withdraw", tuple(pending))
        for expert in pending:
            if self.table.is_pinned(expert):
                self._release(expert)
            if expert in self._failed and not self.table.is_pinned(expert):
                del self._failed[expert]
                self._record("load_abandoned", expert)
                self._execute(self.plan.load_abandoned(expert))

    def _execute(self, actions: Iterable[Action]) -> None:
        todo = list(actions)
        while todo:
            action = todo.pop(0)
            self._record("action", action)
            if isinstance(action, Load):
                if action.evicted is not None:
                    del self._weights[action.evicted]
                    self._count_unused(action.evicted)
                if not action.urgent:
                    self.stats.prefetches += 1
                    self._prefetched_unused.add(action.expert)
                self._loader.submit(action.expert, action.slot, action.urgent)
            elif isinstance(action, Promote):
                self._loader.promote(action.expert)
            elif isinstance(action, Cancel) and self._loader.cancel(action.expert):
                self.stats.cancelled += 1
                self._count_unused(action.expert)
                self._record("load_abandoned", action.expert)
                todo += self.plan.load_abandoned(action.expert)

    def _count_unused(self, expert: ExpertId) -> None:
        if expert in self._prefetched_unused:
            self._prefetched_unused.discard(expert)
            self.stats.prefetches_unused += 1

    def _load_finished(
        self, expert: ExpertId, nbytes: int, seconds: float, error: BaseException | None
    ) -> None:
        self.stats.layers[expert.layer].bytes_read += nbytes
        self.stats.read_seconds += seconds
        if error is None:
            slot = self.table.lookup(expert)
            assert slot is not None, f"{expert} was loaded into no slot"
            self.stats.loads_LE[expert.layer][expert.expert] += 1
            self._weights[expert] = tensors(self.memory.slot(slot), self.memory.placement(expert))
            self._record("load_finished", expert)
            self._execute(self.plan.load_finished(expert))
        elif self.table.is_pinned(expert):
            self._failed[expert] = error
        else:
            # A later demand will try again and, if it fails again, say so to someone who can act on it.
            logger.warning("prefetch of %s failed: %s", expert, error)
            self._record("load_abandoned", expert)
            self._execute(self.plan.load_abandoned(expert))

    def _record(self, *event: object) -> None:
        if self.events is not None:
            self.events.append(event)
