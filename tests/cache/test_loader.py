from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from fakes import GUARD_S, FakeStore, Turnstile

from expertflow.cache.loader import Loader, SlotMemory, slot_bytes
from expertflow.core import ExpertId, MoEShape
from expertflow.store.layout import tensors

SHAPE = MoEShape((8,))
EXPERTS = [ExpertId(0, expert) for expert in range(8)]


class Harness:
    """A loader with a slot for every expert, so that only the order of loads is in question."""

    def __init__(self, dtype: torch.dtype | None = None):
        self.store = FakeStore(SHAPE)
        self.memory = SlotMemory(self.store, len(EXPERTS), dtype)
        self.condition = threading.Condition()
        self.finished: list[ExpertId] = []
        self.errors: dict[ExpertId, BaseException] = {}
        self.nbytes: dict[ExpertId, int] = {}
        self.gate = Turnstile(self.store)
        self.loader = Loader(self.memory, self.condition, self._finish)

    def _finish(self, expert: ExpertId, nbytes: int, seconds: float, error: BaseException | None) -> None:
        assert seconds >= 0
        self.finished.append(expert)
        self.nbytes[expert] = nbytes
        if error is not None:
            self.errors[expert] = error

    def submit(self, expert: int, urgent: bool) -> None:
        with self.condition:
            self.loader.submit(EXPERTS[expert], slot=expert, urgent=urgent)

    def promote(self, expert: int) -> None:
        with self.condition:
            self.loader.promote(EXPERTS[expert])

    def cancel(self, expert: int) -> bool:
        with self.condition:
            return self.loader.cancel(EXPERTS[expert])

    def wait_until(self, done: Callable[[], bool]) -> None:
        with self.condition:
            assert self.condition.wait_for(done, GUARD_S)

    def run_dry(self) -> None:
        self.gate.open()
        self.wait_until(lambda: self.loader.idle)

    def close(self) -> None:
        self.gate.open()
        self.loader.close()

    def verify_loaded(self) -> None:
        for expert in self.finished:
            got = tensors(self.memory.slot(expert.expert), self.memory.placement(expert))
            for role, (stored,) in self.store.weights(expert).items():
                assert torch.equal(torch.cat(got[role]), stored.to(self.memory.dtype or stored.dtype)), expert


@pytest.fixture(params=[None, torch.bfloat16], ids=["as stored", "cast"])
def harness(request) -> Iterator[Harness]:
    harness = Harness(request.param)
    yield harness
    harness.close()


def order_of_chunks(harness: Harness) -> list[int]:
    return [expert.expert for expert in harness.store.reads]


def test_demands_go_before_prefetches_and_each_kind_in_order(harness):
    harness.submit(0, urgent=False)
    harness.gate.wait_for_arrivals(1)
    for expert, urgent in [(1, False), (2, True), (3, False), (4, True)]:
        harness.submit(expert, urgent)
    harness.run_dry()
    n = harness.store.num_chunks
    assert order_of_chunks(harness) == [0] + [2] * n + [4] * n + [0] * (n - 1) + [1] * n + [3] * n
    assert harness.finished == [EXPERTS[expert] for expert in (2, 4, 0, 1, 3)]
    harness.verify_loaded()


def test_a_demand_waits_for_one_chunk_of_a_prefetch_no_more(harness):
    harness.submit(0, urgent=False)
    harness.gate.wait_for_arrivals(1)
    harness.submit(1, urgent=True)
    harness.gate.let(1)
    harness.gate.wait_for_arrivals(2)
    assert order_of_chunks(harness) == [0, 1]


def test_a_demand_is_not_overtaken_by_the_next_demand(harness):
    harness.submit(0, urgent=True)
    harness.gate.wait_for_arrivals(1)
    harness.submit(1, urgent=True)
    harness.run_dry()
    n = harness.store.num_chunks
    assert order_of_chunks(harness) == [0] * n + [1] * n


def test_a_promoted_prefetch_keeps_what_it_has_read(harness):
    harness.submit(0, urgent=False)
    harness.submit(1, urgent=False)
    harness.gate.wait_for_arrivals(1)
    harness.submit(2, urgent=True)
    harness.promote(1)
    harness.promote(0)
    harness.submit(3, urgent=True)
    harness.run_dry()
    n = harness.store.num_chunks
    assert order_of_chunks(harness) == [0] + [2] * n + [1] * n + [0] * (n - 1) + [3] * n
    harness.verify_loaded()


def test_only_a_prefetch_that_has_not_begun_can_be_cancelled(harness):
    harness.submit(0, urgent=False)
    harness.gate.wait_for_arrivals(1)
    harness.submit(1, urgent=False)
    harness.submit(2, urgent=True)
    assert not harness.cancel(0), "its slot is being written"
    assert harness.cancel(1)
    assert not harness.cancel(1), "it is gone"
    assert not harness.cancel(2), "a layer waits for it"
    harness.run_dry()
    assert harness.finished == [EXPERTS[2], EXPERTS[0]]
    assert not harness.cancel(0), "it is loaded"


def test_a_preempted_prefetch_cannot_be_cancelled_either(harness):
    """Between its chunks nobody writes to its slot, but its first bytes are there and it will go on."""
    harness.submit(0, urgent=False)
    harness.gate.wait_for_arrivals(1)
    harness.submit(1, urgent=True)
    harness.gate.let(1)
    harness.gate.wait_for_arrivals(2)
    assert not harness.cancel(0)


def test_a_failed_load_is_reported_and_the_next_one_runs(harness):
    passed = harness.store.before_read

    def fail_second_chunk_of_zero(expert: ExpertId) -> None:
        passed(expert)
        if expert == EXPERTS[0] and harness.store.reads.count(expert) == 2:
            raise OSError("injected")

    harness.store.before_read = fail_second_chunk_of_zero
    for expert in (0, 1, 2):
        harness.submit(expert, urgent=True)
    harness.run_dry()
    assert harness.finished == EXPERTS[:3]
    assert list(harness.errors) == [EXPERTS[0]]
    assert str(harness.errors[EXPERTS[0]]) == "injected"
    assert order_of_chunks(harness).count(0) == 2, "nothing is read after the failure"
    assert harness.nbytes[EXPERTS[0]] < harness.nbytes[EXPERTS[1]] == len(harness.store._files[EXPERTS[1]])
    harness.finished.remove(EXPERTS[0])
    harness.verify_loaded()


def test_even_an_error_that_is_no_exception_is_reported(harness):
    class Stop(BaseException):
        pass

    def stop(expert: ExpertId) -> None:
        raise Stop

    harness.store.before_read = stop
    harness.submit(0, urgent=True)
    harness.wait_until(lambda: EXPERTS[0] in harness.errors)
    assert isinstance(harness.errors[EXPERTS[0]], Stop)
    assert harness.loader._thread.is_alive()


def test_close_stops_after_the_chunk_under_way(harness):
    harness.submit(0, urgent=True)
    harness.gate.wait_for_arrivals(1)
    closer = threading.Thread(target=harness.loader.close)
    closer.start()
    harness.wait_until(lambda: harness.loader._closed)
    assert closer.is_alive()
    harness.gate.open()
    closer.join(GUARD_S)
    assert not closer.is_alive()
    assert order_of_chunks(harness) == [0]
    assert harness.finished == []


def test_two_staging_buffers_are_enough():
    """Demands overtake prefetches, prefetches become demands, chunk by chunk in random order. A third load
    begun at once would find no buffer, and the loader's thread would die of it."""
    assert max(most_loads_begun_at_once(seed) for seed in range(8)) == 2


def most_loads_begun_at_once(seed: int) -> int:
    harness = Harness(torch.bfloat16)
    draw = random.Random(seed)
    most_begun = 0
    unsubmitted = list(range(8))
    arrivals = 0
    try:
        while unsubmitted or not harness.loader.idle:
            if unsubmitted and (harness.loader.idle or draw.random() < 0.5):
                harness.submit(unsubmitted.pop(), urgent=draw.random() < 0.5)
            elif draw.random() < 0.4:
                harness.promote(draw.randrange(8))
            elif draw.random() < 0.1:
                harness.cancel(draw.randrange(8))
            if harness.loader.idle:
                continue
            # The loader stands before a chunk of its choice. Look at it, then let that chunk pass.
            arrivals += 1
            harness.gate.wait_for_arrivals(arrivals)
            with harness.condition:
                jobs = [*harness.loader._urgent.values(), *harness.loader._prefetch.values()]
                begun = [job for job in jobs if job.staging is not None]
                assert len(begun) + len(harness.loader._staging) == 2
                assert len({job.staging.data_ptr() for job in begun}) == len(begun)
            most_begun = max(most_begun, len(begun))
            reads = len(harness.finished)
            # Asked before the chunk may pass: once it has, the loader may stand before the last chunk of another.
            finishes = harness.store.reads.count(harness.store.reads[-1]) == harness.store.num_chunks
            harness.gate.let(1)
            if finishes:
                harness.wait_until(lambda reads=reads: len(harness.finished) > reads)
        assert not harness.errors
        assert len(harness.loader._staging) == 2
        harness.verify_loaded()
        return most_begun
    finally:
        harness.close()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
def test_slots_are_pages_and_lie_apart(dtype):
    store = FakeStore(SHAPE)
    memory = SlotMemory(store, 3, dtype)
    assert memory.slot_bytes == slot_bytes(store, dtype)
    begins = [memory.slot(index).data_ptr() for index in range(3)]
    assert [begin % 4096 for begin in begins] == [0, 0, 0]
    assert begins[1] - begins[0] == begins[2] - begins[1] == memory.slot_bytes
    assert all(memory.placement(expert).nbytes <= memory.slot_bytes for expert in EXPERTS)


def test_an_expert_lies_alike_in_every_slot():
    """Else its products could differ in the last bits with the slot it happens to be in."""
    memory = SlotMemory(FakeStore(SHAPE), 3, torch.bfloat16)
    (first,) = {memory.placement(EXPERTS[5]).views["up"] for _ in range(3)}
    assert all(view.slot_offset % 64 == 0 for view in first)


def test_fresh_slots_are_touched_before_their_first_load_and_the_thread_ends_with_the_cache(
    monkeypatch: pytest.MonkeyPatch,
):
    told: list[int | str] = []

    class Told:
        def __init__(self, memory: torch.Tensor):
            told.append(memory.numel())

        def reading_until(self, end: int) -> None:
            assert threading.current_thread().name == "expertflow-loader"
            told.append(end)

        def close(self) -> None:
            told.append("closed")

    monkeypatch.setattr("expertflow.cache.loader.TouchAhead", Told)
    harness = Harness()
    for expert in (0, 1, 2):
        harness.submit(expert, urgent=True)
    harness.run_dry()
    harness.close()

    size = harness.memory.slot_bytes
    assert told == [len(EXPERTS) * size, size, 2 * size, 3 * size, "closed"]
