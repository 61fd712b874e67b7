"""The expert cache engine: joins slots, plan and loader, and hands experts to a layer as they become ready.

`open_layer` is all that arithmetic sees. Decisions are plan.py's, threads are loader.py's; this file
executes the one with the other and records what happened. Threads may share a cache: one layer is open
at a time and the others wait in line, so that nobody gives up what somebody else waits for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence

import torch
from torch import Tensor

from expertflow.cache.device import SlotDevice
from expertflow.cache.loader import Loader, SlotMemory
from expertflow.cache.plan import Action, CachePlan, Cancel, Load, Promote
from expertflow.cache.policies import POLICIES, Forecast
from expertflow.cache.policies.base import probabilities
from expertflow.cache.slots import SlotTable
from expertflow.cache.stats import CacheStats, Observed, Traffic
from expertflow.core import ExpertId, MoEShape
from expertflow.store.layout import tensors
from expertflow.store.protocol import ExpertStore
from expertflow.timeline import Timeline

logger = logging.getLogger(__name__)

Weights = dict[str, tuple[Tensor, ...]]

_READY = object()  # the turn of open_ready
_MOST_DEFERRED = 256  # layers whose books may wait: what catching up may cost one of them


class ExpertCache:
    """A bounded set of experts in fast memory over a store that has them all.

    num_slots: experts held at once, at least 2. dtype: what weights are multiplied in (None: as
    stored). overlap: hand out ready experts while others arrive; False loads everything a layer needs
    first (as published by Cache-MoE; the slow, obvious version). record_events: keep the inputs and
    actions of the plan in `events`, for replay. device: where the slots are (None: host memory), this cache's alone.
    On an accelerator experts are ready once their copies are queued, and the stream of the thread that opens a layer
    waits for each as it is handed out: `stall_seconds` does not see that.
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
        device: SlotDevice | None = None,
    ):
        if policy not in POLICIES:
            raise ValueError(f"unknown cache policy {policy!r}; known: {', '.join(sorted(POLICIES))}")
        num_slots = min(num_slots, max(2, shape.num_experts))
        self.store = store
        self.shape = shape
        self.overlap = overlap and not POLICIES[policy].blocking
        self.table = SlotTable(num_slots)
        self.plan = CachePlan(self.table, POLICIES[policy](shape, num_slots))
        self.memory = SlotMemory(store, num_slots, dtype, device)
        self._queues = self.memory.device.queues
        self._stats = CacheStats(shape, num_slots, self.memory.slot_bytes, store.io_mode)
        self._events: list[tuple] | None = [] if record_events else None
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._weights: dict[tuple[int, int], Weights] = {}  # by ExpertId, of those that are ready
        self._failed: dict[ExpertId, BaseException] = {}
        self._prefetched_unused: set[ExpertId] = set()
        self._line: dict[object, int] = {}  # turns of open_layer, the open one first -> thread that took it
        self._deferred: list[
            tuple[int, Sequence[int]]
        ] = []  # layers of open_ready that the books do not know yet
        self._ready_since = (0, 0.0)  # layer, clock
        self._pinned_late: list[ExpertId] = []  # of the layer that open_ready holds, once the books know it
        self._broken: BaseException | None = None
        self._closed = False
        self._timeline: Timeline | None = None
        self._short_way = not self._queues  # its lines are for products that wait for nothing
        self._loader = Loader(self.memory, self._condition, self._load_finished)
        self._loader.forked = self._forked

    @property
    def num_slots(self) -> int:
        return self.table.num_slots

    @property
    def stats(self) -> CacheStats:
        """Counters up to now; ask again for later ones, since `open_ready` is counted when somebody asks."""
        with self._lock:
            self._catch_up()
        return self._stats

    @property
    def usable(self) -> bool:
        """Whether a layer could be opened: neither closed, nor interrupted in a change, nor without its loader."""
        return not (self._closed or self._broken or self._loader.died_of)

    def observe(self) -> Observed:
        """Who is in fast memory at this moment, and the counters of it. Holds up a layer for as long as copies take."""
        with self._condition:
            self._catch_up()
            stats, ready, residents = self._stats.copied(), set(self.table.ready), set(self.table.residents)
        return Observed(stats, residents - ready, ready)

    def traffic(self) -> Traffic:
        """Cheap enough for every step: no lock, and no catching up with `open_ready`, which moves nothing."""
        layers = self._stats.layers
        return Traffic(
            sum(layer.bytes_read for layer in layers), sum(layer.stall_seconds for layer in layers)
        )

    @property
    def timeline(self) -> Timeline | None:
        """Who is told when the link was busy and when arithmetic waited; None: nobody."""
        return self._timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self._timeline = self._loader.timeline = timeline

    @property
    def events(self) -> list[tuple] | None:
        """The inputs and actions of the plan up to now, if they are recorded."""
        with self._lock:
            self._catch_up()
        return self._events

    def prefetch(self, experts: Iterable[ExpertId]) -> None:
        """Hint that these experts will be needed, soonest first. Returns at once.

        A wrong hint costs time, never correctness; unknown expert ids are a ValueError.
        """
        experts = list(experts)
        self._verify_known(experts)
        with self._lock, _Step(self):
            self._record("prefetch", tuple(experts))
            self._execute(self.plan.prefetch(experts))

    def begin_pass(self, forecast: Forecast | None) -> None:
        """A pass over the layers begins, of which this is expected; None where nobody predicts. Returns at once.

        A wrong forecast costs time, never correctness: what is no probability counts as unlikely, what is no number
        of passes as far away. One of another shape than the model is a ValueError.
        """
        if forecast is not None:
            forecast = forecast.within_bounds(self.shape)
        with self._lock, _Step(self):
            self._record("begin_pass", forecast)
            self._execute(self.plan.begin_pass(forecast))

    def refine(self, layer: int, p_E: Sequence[float]) -> None:
        """Something better is known of one layer of this pass; of no use once it has opened. As `begin_pass`."""
        if not 0 <= layer < self.shape.num_layers:
            raise ValueError(f"layer {layer} of {self.shape.num_layers} cannot be predicted")
        p_E = probabilities(p_E, self.shape.experts_per_layer[layer])
        with self._lock, _Step(self):
            self._record("refine", layer, p_E)
            self._execute(self.plan.refine(layer, p_E))

    def expect_next(self, p_LE: Sequence[Sequence[float]]) -> None:
        """What the pass after the one that runs is expected to need, known when it is one of other sequences. May be
        said at any time while a pass runs, by any thread. As `begin_pass`."""
        p_LE = Forecast(p_LE).within_bounds(self.shape).p_LE
        with self._lock, _Step(self):
            self._record("expect_next", p_LE)
            self._execute(self.plan.expect_next(p_LE))

    def open_layer(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> Generator[tuple[int, Weights], None, None]:
        """Yield (expert, its weights by role) for each of `experts`, ready ones first.

        experts: distinct ids; more than there are slots run in waves. meanwhile: called once by this thread, when
        what is missing has been asked for and before any of it is waited for. The weights are valid until the
        next item is asked for, and not after. Raises the store's error when a read fails; the next call
        tries again. The layer is open, and other threads wait, until the iterator ends or is closed.
        """
        needed = [ExpertId(layer, expert) for expert in experts]
        self._verify_known(needed)
        if len(set(needed)) != len(needed):
            raise ValueError(f"open_layer of layer {layer}: experts {list(experts)} are not distinct")
        pending: dict[ExpertId, None] = {}
        current: ExpertId | None = None
        counters = self._stats.layers[layer]
        started = time.perf_counter()
        turn = object()
        self.close_ready()  # left open if Ctrl-C came at the very entry of that call
        try:
            with self._lock:
                self._wait_in_line(turn)
            started = time.perf_counter()
            with self._lock, _Step(self):
                pending.update(dict.fromkeys(needed))
                if self._queues:  # those whose copies are queued now come after those that are there
                    pending = dict.fromkeys(sorted(pending, key=self.table.is_ready, reverse=True))
                self._open(layer, needed)
                all_ready = self.plan.content and all(map(self.table.is_ready, needed))
            if meanwhile is not None:
                meanwhile()
            if all_ready:
                # Nothing to wait for and nobody waits for a slot: one step of the books for the whole layer
                # (16 of them cost more than the arithmetic of a small layer). `_leave` releases the pins.
                for expert in needed:
                    if self._queues:
                        self._hand_out(expert, needed)
                    yield expert.expert, self._weights[expert]
                return
            while pending:
                if current is not None:
                    with self._lock, _Step(self):
                        self._release(current)
                        current = None
                with self._lock:
                    while (ready := self._next_ready(pending)) is None:
                        stalled = time.perf_counter()
                        self._condition.wait()
                        going_on = time.perf_counter()
                        counters.stall_seconds += going_on - stalled
                        if self._timeline is not None:
                            self._timeline.add("stall", f"layer {layer}", stalled, going_on)
                    current = ready
                    del pending[ready]
                    if self._queues:
                        self._hand_out(ready, pending)
                yield ready.expert, self._weights[ready]
        finally:
            with self._lock:
                try:
                    if next(iter(self._line), None) is turn:
                        counters.open_seconds += time.perf_counter() - started
                        if self._broken is None:
                            with _Step(self, even_if_closed=True):
                                self._leave(current, pending)
                finally:
                    self._line.pop(turn, None)
                    self._condition.notify_all()

    def open_ready(self, layer: int, experts: Sequence[int]) -> list[Weights] | None:
        """The weights of all of these distinct experts if they are ready and nobody waits for anything, else None.

        The short way through `open_layer` for a decode step that finds everything: after each product has swept
        the core's caches every line costs, so the books learn of the layer when somebody next needs them. Not
        None: the layer is open, and the weights valid, until this thread calls `close_ready` or `open_layer`.
        """
        with self._lock:
            if (
                self._line
                or not self._short_way
                or self._broken
                or self._loader.died_of
                or not self.plan.quiet
            ):
                return None
            weights = [self._weights.get((layer, expert)) for expert in experts]
            if not all(weights):
                return None
            if len(self._deferred) >= _MOST_DEFERRED:
                self._catch_up()
            self._line[_READY] = threading.get_ident()
            self._deferred.append((layer, experts))
            self._ready_since = (layer, time.perf_counter())
            return weights  # type: ignore[return-value]  # mypy does not see that all of them are there

    def close_ready(self) -> None:
        """End what `open_ready` opened in this thread; without it, nothing happens."""
        with self._lock:
            if self._line.get(_READY) != threading.get_ident():
                return
            try:
                if self._pinned_late and self._broken is None:
                    with _Step(self, even_if_closed=True):
                        while self._pinned_late:
                            self._release(self._pinned_late.pop(0))
            finally:
                del self._line[_READY]
                layer, since = self._ready_since
                self._stats.layers[layer].open_seconds += time.perf_counter() - since
                if self._line:
                    self._condition.notify_all()

    def reset_stats(self) -> None:
        with self._lock:
            self._catch_up()
            self._stats.reset()
            self._prefetched_unused.clear()

    def wait_idle(self) -> None:
        """Return when no load is queued or under way, or the cache is closed (tests and benchmarks)."""
        with self._lock:
            while not (self._loader.idle or self._closed or self._broken):
                self._condition.wait()

    def close(self) -> None:
        """Stop the loader: on return no read is under way. Idempotent; a layer that is open in another
        thread gets a RuntimeError. The weights must not be used afterwards."""
        with self._lock:
            self._closed = True
            self._short_way = False
        self._loader.close()  # wakes every thread that waits

    def _catch_up(self) -> None:
        """Enter the layers of `open_ready` in the books, before anything else is decided or read from them.

        They found all they needed while nothing waited, so there is nothing to do but count; the one that is
        still open gets the pins that protect it from what comes next.
        """
        if not self._deferred or self._broken is not None:
            return
        try:
            deferred, self._deferred = self._deferred, []
            held = _READY in self._line
            for place, (layer, experts) in enumerate(deferred, 1):
                needed = [ExpertId(layer, expert) for expert in experts]
                self._open(layer, needed)
                if held and place == len(deferred):
                    self._pinned_late = needed
                else:
                    for expert in needed:
                        self._release(expert)
        except BaseException as error:  # as in _Step, which not every caller is in
            self._broken = error
            self._condition.notify_all()
            raise

    def _forked(self) -> None:
        """In a child process, where only the thread that forked lives on."""
        if any(thread != threading.get_ident() for thread in self._line.values()):
            self._broken = RuntimeError("the process was forked while another of its threads was in a layer")

    def _verify_usable(self, even_if_closed: bool = False) -> None:
        if self._broken is not None:
            raise RuntimeError(
                "the expert cache was interrupted in the middle of a change; load the model again"
            ) from self._broken
        if self._loader.died_of is not None:
            raise RuntimeError(
                "the loader thread died; load the model again, and report this"
            ) from self._loader.died_of
        if self._closed and not even_if_closed:
            raise RuntimeError("the expert cache is closed; load the model again to use it")

    def _verify_known(self, experts: Sequence[ExpertId]) -> None:
        for expert in experts:
            if expert not in self.store.experts:
                raise ValueError(f"{expert}: the checkpoint has {len(self.store.experts)}, but not this one")

    def _wait_in_line(self, turn: object) -> None:
        self._verify_usable()
        me = threading.get_ident()
        if me in self._line.values():
            raise RuntimeError(
                "open_layer: this thread has a layer open already and would wait for itself; "
                "exhaust or close that iterator first"
            )
        self._line[turn] = me
        while next(iter(self._line)) is not turn:
            self._condition.wait()
            self._verify_usable()

    def _open(self, layer: int, needed: list[ExpertId]) -> None:
        opened = self.plan.open_layer(layer, needed)
        self._record("open_layer", layer, tuple(needed))
        counters = self._stats.layers[layer]
        counters.hits += len(opened.ready)
        counters.in_flight += len(opened.in_flight)
        counters.misses += len(opened.missing)
        uses_E = self._stats.uses_LE[layer]
        for expert in needed:
            uses_E[expert.expert] += 1
            if expert in self._prefetched_unused:
                self._prefetched_unused.discard(expert)
                self._stats.prefetches_useful += 1
        for expert in (*opened.in_flight, *opened.missing):
            self._stats.misses_LE[layer][expert.expert] += 1
        self._execute(opened.actions)

    def _next_ready(self, pending: dict[ExpertId, None]) -> ExpertId | None:
        self._verify_usable()
        some_missing = False
        first = None
        for expert in pending:
            if expert in self._failed:
                raise self._failed[expert]
            if self.table.is_ready(expert):
                if self.overlap:
                    return expert
                first = first or expert
            elif self.table.lookup(expert) is not None:
                some_missing = True
        # Without overlap nothing is computed until all that has a slot is there.
        return None if some_missing else first

    def _hand_out(self, expert: ExpertId, others: Iterable[ExpertId]) -> None:
        """Let this thread's stream read the expert, which is pinned; without overlap, once all others are there."""
        for other in (expert,) if self.overlap else (expert, *others):
            if self.table.is_ready(other):
                slot = self.table.lookup(other)
                assert slot is not None, f"{other} is ready in no slot"
                self.memory.device.hand_out(slot)

    def _release(self, expert: ExpertId) -> None:
        self._record("release", expert)
        self._execute(self.plan.release(expert))

    def _leave(self, current: ExpertId | None, pending: dict[ExpertId, None]) -> None:
        """The open layer ends. What is pending was given up: its computation failed or was interrupted."""
        if current is not None:
            pending.pop(current, None)
        if pending:  # first, or the releases below would start loads for it
            self._record("withdraw", tuple(pending))
            self._execute(self.plan.withdraw(pending))
        if current is not None:
            self._release(current)
        for expert in pending:
            if self.table.is_pinned(expert):
                self._release(expert)
            if self._failed.pop(expert, None) is not None:
                self._abandon(expert)

    def _abandon(self, expert: ExpertId) -> None:
        self._count_unused(expert)
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
                    self._stats.prefetches += 1
                    self._prefetched_unused.add(action.expert)
                self._loader.submit(action.expert, action.slot, action.urgent)
            elif isinstance(action, Promote):
                self._loader.promote(action.expert)
            elif isinstance(action, Cancel):
                if self._loader.cancel(action.expert):
                    self._stats.cancelled += 1
                    self._count_unused(action.expert)
                    self._record("load_abandoned", action.expert)
                    todo += self.plan.load_abandoned(action.expert)
                else:
                    self._record("cancel_refused", action.expert)
                    todo += self.plan.cancel_refused(action.expert)

    def _count_unused(self, expert: ExpertId) -> None:
        if expert in self._prefetched_unused:
            self._prefetched_unused.discard(expert)
            self._stats.prefetches_unused += 1

    def _load_finished(
        self, expert: ExpertId, nbytes: int, seconds: float, error: BaseException | None
    ) -> None:
        if self._broken is not None:
            return  # whoever asks is told; the loader's thread has nobody to tell
        with _Step(self, even_if_closed=True):
            self._stats.layers[expert.layer].bytes_read += nbytes
            self._stats.read_seconds += seconds
            self._stats.io_mode = self.store.io_mode  # known for sure only after reads
            if error is None:
                slot = self.table.lookup(expert)
                assert slot is not None, f"{expert} was loaded into no slot"
                self._stats.loads_LE[expert.layer][expert.expert] += 1
                self._weights[expert] = tensors(self.memory.slot(slot), self.memory.placement(expert))
                self._record("load_finished", expert)
                self._execute(self.plan.load_finished(expert))
            elif self.table.is_pinned(expert):
                self._failed[expert] = error
            else:
                # A later demand will try again and, if it fails again, say so to someone who can act on it.
                logger.warning("prefetch of %s failed: %s", expert, error)
                self._count_unused(expert)
                self._record("prefetch_failed", expert)
                self._execute(self.plan.prefetch_failed(expert))

    def _record(self, *event: object) -> None:
        if self._events is not None:
            self._events.append(event)


class _Step:
    """One step of a cache's books, to be taken with its lock held. A step cut short (Ctrl-C between two lines, a bug)
    leaves experts in slots that the books do not know: then nothing may be read any more.

    The lock is no business of this class: Python may raise Ctrl-C at the entry of any function of its own, `__exit__`
    among them (and those of Condition and contextlib), and only an RLock is given back without one.
    """

    def __init__(self, cache: ExpertCache, even_if_closed: bool = False):
        self._cache, self._even_if_closed = cache, even_if_closed

    def __enter__(self) -> None:
        self._cache._verify_usable(self._even_if_closed)
        self._cache._catch_up()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._cache._broken = error
            self._cache._condition.notify_all()
