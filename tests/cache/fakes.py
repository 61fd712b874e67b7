"""A slow tier that obeys the test: experts of known bytes, read when and only when the test lets them.

No files and no sleeps. Timeouts are failure guards: a test that reaches one has failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertflow.cache.expert_cache import ExpertCache
from expertflow.cache.plan import Action, CachePlan, Cancel, Load, Opened, Promote
from expertflow.cache.policies import POLICIES
from expertflow.cache.slots import SlotTable
from expertflow.core import ExpertId, MoEShape
from expertflow.store.disk import Chunk
from expertflow.store.layout import PAGE, Part, Placement, place_raw, tensors

GUARD_S = 20.0
HIDDEN, INNER = 32, 40
POISON = 0xFF  # as float32, bfloat16 and float16 alike: NaN


class FakeStore:
    """E experts in each of L layers, each an up [I, D] and a down [D, I] of float32, in chunks of a page.

    before_read: called by the loader's thread before each chunk, may block or raise. reads: the experts
    of all chunks asked for, in order. The weights of an expert depend on its id alone.
    """

    io_mode = "fake"

    def __init__(self, shape: MoEShape, offset: int = 8, dtype: torch.dtype = torch.float32):
        self.experts: Mapping[ExpertId, tuple[Part, ...]] = {
            ExpertId(layer, expert): _parts(layer, expert, offset, dtype)
            for layer, num_experts in enumerate(shape.experts_per_layer)
            for expert in range(num_experts)
        }
        self._placements = {expert: place_raw(parts) for expert, parts in self.experts.items()}
        self.slot_bytes = max(placement.nbytes for placement in self._placements.values())
        self._expert_of = {parts[0].path: expert for expert, parts in self.experts.items()}
        self._files = {expert: _file(expert, parts) for expert, parts in self.experts.items()}
        self.before_read: Callable[[ExpertId], None] = lambda expert: None
        self.reads: list[ExpertId] = []

    @property
    def num_chunks(self) -> int:
        return len(self.chunks(next(iter(self.experts))))

    def placement(self, expert: ExpertId) -> Placement:
        return self._placements[expert]

    def chunks(self, expert: ExpertId) -> tuple[Chunk, ...]:
        return tuple(
            Chunk(run.path, run.file_offset + begin, PAGE, run.slot_offset + begin)
            for run in self._placements[expert].runs
            for begin in range(0, run.nbytes, PAGE)
        )

    def read_chunk(self, chunk: Chunk, buffer: Tensor) -> int:
        expert = self._expert_of[chunk.path]
        self.reads.append(expert)
        self.before_read(expert)
        source = self._files[expert][chunk.file_offset : chunk.file_offset + chunk.nbytes]
        buffer[chunk.slot_offset : chunk.slot_offset + len(source)] = source
        return len(source)

    def weights(self, expert: ExpertId) -> dict[str, tuple[Tensor, ...]]:
        """What the cache must hand out, made without it."""
        buffer = torch.zeros(self.slot_bytes, dtype=torch.uint8)
        for chunk in self.chunks(expert):
            source = self._files[expert][chunk.file_offset : chunk.file_offset + chunk.nbytes]
            buffer[chunk.slot_offset : chunk.slot_offset + len(source)] = source
        return tensors(buffer, self._placements[expert])

    def close(self) -> None:
        pass


def _parts(layer: int, expert: int, offset: int, dtype: torch.dtype) -> tuple[Part, ...]:
    path = Path(f"layer-{layer}-expert-{expert}")
    nbytes = HIDDEN * INNER * dtype.itemsize
    return (
        Part("up", path, offset, nbytes, dtype, (INNER, HIDDEN)),
        Part("down", path, offset + nbytes, nbytes, dtype, (HIDDEN, INNER)),
    )


def _file(expert: ExpertId, parts: Sequence[Part]) -> Tensor:
    draw = torch.Generator().manual_seed(1000 * expert.layer + expert.expert)
    file = torch.zeros(parts[-1].offset + parts[-1].nbytes, dtype=torch.uint8)
    for part in parts:
        values = torch.randn(part.shape, generator=draw).to(part.dtype)
        file[part.offset : part.offset + part.nbytes] = values.flatten().view(torch.uint8)
    return file


class Turnstile:
    """Lets the loader read as many chunks as it was given permits for."""

    def __init__(self, store: FakeStore, permits: int = 0):
        self._condition = threading.Condition()
        self._permits = permits
        self._arrived = 0
        self._passed = 0
        self._open = False
        store.before_read = self._pass

    def _pass(self, expert: ExpertId) -> None:
        with self._condition:
            self._arrived += 1
            self._condition.notify_all()
            ok = self._condition.wait_for(lambda: self._open or self._permits > 0, GUARD_S)
            assert ok, f"nobody let the load of {expert} go on"
            self._permits -= 1
            self._passed += 1
            self._condition.notify_all()

    def let(self, chunks: int) -> None:
        """Give so many more permits."""
        with self._condition:
            self._permits += chunks
            self._condition.notify_all()

    def let_at_least(self, chunks: int) -> None:
        """As `let`, but unused permits count."""
        with self._condition:
            self._permits = max(self._permits, chunks)
            self._condition.notify_all()

    def open(self) -> None:
        with self._condition:
            self._open = True
            self._condition.notify_all()

    @property
    def passed(self) -> int:
        with self._condition:
            return self._passed

    def wait_for_passes(self, count: int) -> None:
        """Until the loader was let through so many times since the start."""
        with self._condition:
            assert self._condition.wait_for(lambda: self._passed >= count, GUARD_S)

    def wait_for_arrivals(self, count: int) -> None:
        """Until the loader has asked for so many chunks since the start."""
        with self._condition:
            assert self._condition.wait_for(lambda: self._arrived >= count, GUARD_S), (
                f"{self._arrived} chunks were asked for, not {count}"
            )


def on_wait(cache: ExpertCache, tell: Callable[[], None]) -> None:
    """Call tell, with the cache's lock held, whenever a thread other than the loader is about to wait.

    Also bounds the wait: a cache that never wakes its layer fails the test instead of stopping it.
    """
    wait = cache._condition.wait
    loader = cache._loader._thread

    def told_wait(timeout: float | None = None) -> bool:
        if threading.current_thread() is loader:
            return wait(timeout)
        tell()
        assert wait(GUARD_S), "a layer waits for a load that never comes"
        return True

    cache._condition.wait = told_wait  # type: ignore[method-assign]


def poison_pending_slots(cache: ExpertCache) -> None:
    """Fill a slot with NaN when a load into it is submitted: whoever reads it before its bytes are whole,
    or reads an expert that has been evicted, computes NaN."""
    submit = cache._loader.submit

    def poison_and_submit(expert: ExpertId, slot: int, urgent: bool) -> None:
        cache.memory.slot(slot).fill_(POISON)
        submit(expert, slot, urgent)

    cache._loader.submit = poison_and_submit  # type: ignore[method-assign]


def assert_no_pins(cache: ExpertCache) -> None:
    with cache._condition:
        cache.table.check()
        assert not [expert for expert in cache.table.residents if cache.table.is_pinned(expert)]
        assert not cache._line, "a layer is still open"
        assert not cache.plan._demands


def replayed_actions(cache: ExpertCache, policy: str) -> tuple[list[Action], list[Action]]:
    """(what the cache did, what a fresh plan decides when told the same), in order."""
    assert cache.events is not None
    table = SlotTable(cache.num_slots)
    plan = CachePlan(table, POLICIES[policy](cache.shape, cache.num_slots))
    done: list[Action] = []
    decided: list[Action] = []
    for kind, *told in cache.events:
        if kind == "action":
            done.append(told[0])
            assert len(done) <= len(decided), f"{told[0]} was carried out before it was decided"
        elif kind == "open_layer":
            decided += plan.open_layer(*told).actions
        else:
            decided += getattr(plan, kind)(*told)
        table.check()
    return done, decided


class Threads:
    """Run functions in threads; on exit join them and raise what they raised."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, function: Callable[..., Any], *args: Any) -> threading.Thread:
        def run() -> None:
            try:
                function(*args)
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, kind: Any, *exc_info: Any) -> None:
        for thread in self._threads:
            thread.join(GUARD_S)
        if kind is None:
            assert not any(thread.is_alive() for thread in self._threads), "a thread hangs"
            for error in self._errors:
                raise error


def consume(cache: ExpertCache, layer: int, experts: Sequence[int]) -> list[int]:
    """Open a layer, compare each expert's bytes with the store's; the experts in order of arrival."""
    store = cache.store
    assert isinstance(store, FakeStore)
    order = []
    for expert, weights in cache.open_layer(layer, experts):
        expected = store.weights(ExpertId(layer, expert))
        for role, parts in expected.items():
            for part, got in zip(parts, weights[role], strict=True):
                assert torch.equal(part, got), f"{ExpertId(layer, expert)} has wrong bytes in {role}"
        order.append(expert)
    assert sorted(order) == sorted(experts)
    return order


def experts_of(shape: MoEShape) -> Iterator[ExpertId]:
    for layer, num_experts in enumerate(shape.experts_per_layer):
        yield from (ExpertId(layer, expert) for expert in range(num_experts))


def serve(plan: CachePlan, layer: int, needed: Sequence[int]) -> Opened:
    """Run one layer through a plan whose loads take no time; checks the books after each step."""
    opened = plan.open_layer(layer, [ExpertId(layer, expert) for expert in needed])
    actions = list(opened.actions)
    to_release = {*opened.ready, *opened.in_flight, *opened.missing}
    while actions or to_release:
        if actions:
            action = actions.pop(0)
            if isinstance(action, (Load, Promote)):
                actions += plan.load_finished(action.expert)
            elif isinstance(action, Cancel):
                actions += plan.load_abandoned(action.expert)
        else:
            expert = min(expert for expert in to_release if plan.table.is_ready(expert))
            to_release.remove(expert)
            actions += plan.release(expert)
        plan.table.check()
    return opened
