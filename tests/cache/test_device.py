"""Slots on an accelerator: nothing is read before it is there, nothing overwritten while it is read.

On a fake device that is late whenever it may be. Each protection of cache/device.py was taken out once, and a test
here failed. No accelerator is needed; where torch sees one, the last tests run on it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_device import POISON, FakeStream, FakeStreams, fake_device
from fakes import HIDDEN, FakeStore, Threads, Turnstile, assert_no_pins, replayed_actions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertflow.cache.device import AcceleratorDevice, HostDevice, TorchStreams
from expertflow.cache.expert_cache import ExpertCache, Weights
from expertflow.cache.host_cache import HostCache
from expertflow.cache.loader import slot_bytes
from expertflow.core import ExpertId, MoEShape
from expertflow.store.disk import Chunk
from expertflow.store.protocol import Loan

SHAPE = MoEShape((6, 6, 6))
TRUTH = FakeStore(SHAPE)
ROWS = torch.linspace(-1, 1, 2 * HIDDEN).view(2, HIDDEN)


class LendingFakeStore(FakeStore):
    """A FakeStore in RAM. A loan that has ended is poison, as when its memory has gone to another expert."""

    def __init__(self, shape: MoEShape):
        super().__init__(shape)
        self.open_loans = 0

    def lend_chunk(self, chunk: Chunk) -> Loan:
        copy = torch.empty(self.slot_bytes, dtype=torch.uint8)
        count = self.read_chunk(chunk, copy)
        self.open_loans += 1
        lent = copy[chunk.slot_offset : chunk.slot_offset + count]

        def close() -> None:
            self.open_loans -= 1
            lent.fill_(POISON)

        return Loan(lent, close)


def new_store(kind: str) -> Any:
    if kind == "two tiers":
        return LendingFakeStore(SHAPE)
    store = FakeStore(SHAPE)
    if kind == "disk":
        return store
    budget = {"three tiers": 5, "three tiers, tight": 2}[kind] * store.slot_bytes
    return HostCache(store, SHAPE, budget, pin=False)


KINDS = ("disk", "two tiers", "three tiers", "three tiers, tight")


def product(weights: Weights, dtype: torch.dtype | None) -> Tensor:
    rows = ROWS.to(dtype or torch.float32)
    return F.linear(F.relu(F.linear(rows, weights["up"][0])), weights["down"][0])


@cache
def expected(expert: ExpertId, dtype: torch.dtype | None) -> Tensor:
    weights = TRUTH.weights(expert)
    packed = {role: (part.to(dtype or part.dtype).clone(),) for role, (part,) in weights.items()}
    return product(packed, dtype)


class Bench:
    """A cache on a fake device, and kernels that read the weights when the device gets to them."""

    def __init__(
        self, seed: int, num_slots: int = 4, *, kind: str = "disk", favourite: str | None = None, **options
    ):
        self.streams = FakeStreams(seed, favourite)
        self.device = fake_device(self.streams)
        self.store = new_store(kind)
        self.dtype = options.get("dtype")
        self.cache = ExpertCache(
            self.store, SHAPE, num_slots, device=self.device, record_events=True, **options
        )
        self.device.slot = self.cache.memory.slot
        self.results: list[tuple[ExpertId, Tensor]] = []
        self.started: list[ExpertId] = []

    def layer(self, layer: int, experts: Sequence[int]) -> list[int]:
        order = []
        for expert, weights in self.cache.open_layer(layer, experts):
            self.launch(ExpertId(layer, expert), weights)
            order.append(expert)
        return order

    def launch(self, expert: ExpertId, weights: Weights) -> None:
        out = torch.zeros(2, HIDDEN, dtype=self.dtype or torch.float32)

        def kernel() -> None:
            self.started.append(expert)
            out.copy_(product(weights, self.dtype))

        self.streams.enqueue(self.streams.current_stream(), kernel)
        self.results.append((expert, out))

    def verify(self) -> None:
        self.streams.synchronize()
        for expert, out in self.results:
            assert not out.isnan().any(), f"{expert} was read while its slot was being filled"
            assert torch.equal(out, expected(expert, self.dtype)), f"another expert was read for {expert}"

    def close(self) -> None:
        self.cache.close()


@pytest.fixture
def new_bench() -> Iterator[Any]:
    benches: list[Bench] = []

    def new(*args: Any, **options: Any) -> Bench:
        benches.append(Bench(*args, **options))
        return benches[-1]

    yield new
    for bench in benches:
        bench.close()


EXPERTS = st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True)
STEPS = st.lists(
    st.tuples(st.integers(0, 2), EXPERTS, st.lists(st.integers(0, 17), max_size=4), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(
    steps=STEPS,
    seed=st.integers(0, 2**20),
    num_slots=st.integers(2, 9),
    kind=st.sampled_from(KINDS),
    favourite=st.sampled_from([None, "copies", "compute"]),
    overlap=st.booleans(),
    dtype=st.sampled_from([None, torch.float64]),
)
def test_lateness_is_invisible(steps, seed, num_slots, kind, favourite, overlap, dtype):
    """Any traffic through two or three tiers, hints among it, and the router's answers waited for or not."""
    bench = Bench(seed, num_slots, kind=kind, favourite=favourite, overlap=overlap, dtype=dtype)
    try:
        for layer, experts, hints, wait in steps:
            bench.cache.prefetch([ExpertId(hint % 3, hint // 3) for hint in hints])
            assert sorted(bench.layer(layer, experts)) == sorted(experts)
            if wait:
                bench.streams.current_stream().synchronize()  # as index.tolist() does
        bench.verify()
        bench.cache.wait_idle()
        assert_no_pins(bench.cache)
        done, decided = replayed_actions(bench.cache, "lru")
        assert done == decided
        assert not isinstance(bench.store, HostCache) or bench.store.table.check() is None
    finally:
        bench.close()


@pytest.mark.parametrize("seed", range(12))
def test_threads_with_streams_of_their_own_share_a_cache(new_bench, seed):
    bench = new_bench(seed, 3)

    def serve(number: int, stream: FakeStream) -> None:
        with bench.streams.using(stream):
            for step in range(6):
                bench.layer((number + step) % 3, sorted({(number + step) % 6, (2 * step) % 6}))

    with Threads() as threads:
        for number in range(3):
            threads.start(serve, number, bench.streams.new_stream(f"compute {number}"))
    bench.verify()


def test_a_demand_in_the_same_layer_waits_for_the_products_before_it(new_bench):
    """Two slots and six experts in one layer: each slot is filled three times while nothing has been computed."""
    bench = new_bench(0, 2, favourite="copies")
    bench.layer(0, range(6))
    bench.verify()


def test_experts_that_are_there_are_multiplied_before_those_that_are_on_their_way(new_bench, monkeypatch):
    bench = new_bench(0, 4)
    bench.layer(0, [4, 5])
    next_ready = bench.cache._next_ready

    def once_all_is_queued(pending: dict[ExpertId, None]) -> ExpertId | None:
        """The loader is done with its part before the layer looks for its first expert."""
        bench.cache.wait_idle()
        return next_ready(pending)

    monkeypatch.setattr(bench.cache, "_next_ready", once_all_is_queued)
    assert bench.layer(0, [1, 4, 2, 5]) == [4, 5, 1, 2]


def test_the_computing_stream_waits_for_no_more_than_it_needs(new_bench):
    """The first product may run while the second expert is still being copied; without overlap it may not."""
    for overlap in (True, False):
        bench = new_bench(0, 4, favourite="compute", overlap=overlap)
        layer = bench.cache.open_layer(0, [0, 1])
        bench.launch(ExpertId(0, 0), next(layer)[1])
        list(layer)
        bench.cache.wait_idle()
        bench.streams.run_until(lambda bench=bench: bool(bench.started))
        arrived = bench.device._arrived
        assert sum(not event.done for event in arrived.values()) == (1 if overlap else 0)


def test_a_demand_waits_for_two_chunks_of_a_prefetch_no_more(new_bench):
    """What is queued on a stream cannot be overtaken, so little may be queued."""
    bench = new_bench(0, 4)
    gate = Turnstile(bench.store)
    bench.cache.prefetch([ExpertId(1, expert) for expert in range(4)])
    gate.let(2)
    gate.wait_for_arrivals(3)
    with bench.streams.lock:
        assert len(bench.device._in_flight) == 1, "the loader reads one chunk while one is copied"
    gate.open()
    bench.cache.wait_idle()
    assert len(bench.device._in_flight) <= 2
    assert len(bench.streams.host_buffers) == 2
    assert all(buffer.numel() == 4096 for buffer in bench.streams.host_buffers)


def test_staging_is_not_needed_for_what_is_in_memory(new_bench):
    for kind in ("two tiers", "three tiers"):
        bench = new_bench(0, 4, kind=kind)
        bench.layer(0, range(4))
        bench.verify()
        assert not bench.streams.host_buffers


def test_a_loan_ends_once_its_copy_is_done_and_at_the_latest_with_the_cache(new_bench):
    bench = new_bench(0, 4, kind="two tiers")
    bench.layer(0, range(4))
    bench.cache.wait_idle()
    assert 0 < bench.store.open_loans <= 2
    bench.close()
    assert bench.store.open_loans == 0


def test_closing_waits_for_what_is_queued(new_bench):
    """Else memory would go to somebody else while copies write to it and products read it."""
    bench = new_bench(0, 4)
    bench.layer(0, range(4))
    bench.close()
    assert not any(stream.queue for stream in bench.streams.streams)
    bench.verify()


def test_a_failed_read_leaves_everything_usable(new_bench):
    bench = new_bench(3, 2)
    fail = True

    def before_read(expert: ExpertId) -> None:
        if fail and expert == ExpertId(0, 1) and bench.store.reads.count(expert) % 2 == 0:
            raise OSError("injected")

    bench.store.before_read = before_read
    for _ in range(4):
        with pytest.raises(OSError, match="injected"):
            bench.layer(0, [0, 1])
    fail = False
    bench.layer(0, [0, 1, 2])
    bench.verify()
    assert len(bench.streams.host_buffers) == 2, "a failed read loses its buffer"


def test_a_cancelled_load_leaves_its_slot_protected(new_bench):
    """The old expert's products are queued, its slot goes to a prefetch, that is dropped, a demand takes the slot."""
    bench = new_bench(0, 2, favourite="copies")
    bench.layer(0, [0, 1])
    gate = Turnstile(bench.store)
    bench.cache.prefetch([ExpertId(1, 0), ExpertId(1, 1)])
    gate.wait_for_arrivals(1)
    gate.open()
    bench.layer(1, [2, 3])
    assert bench.cache.stats.cancelled
    bench.verify()


def test_the_short_way_is_for_host_memory(new_bench):
    bench = new_bench(0, 4)
    bench.layer(0, [0])
    assert bench.cache.open_ready(0, [0]) is None
    bench.layer(0, [0])
    bench.verify()


def test_slots_are_packed_at_round_addresses(new_bench):
    """Matrix kernels of accelerators are fast from multiples of 16 bytes on; files only promise 8."""
    bench = new_bench(0, 4)
    memory = bench.cache.memory
    assert (
        memory.slot_bytes == slot_bytes(bench.store, None, on_accelerator=True) < 2 * bench.store.slot_bytes
    )
    views = memory.placement(ExpertId(0, 0)).views
    assert all(view.slot_offset % 256 == 0 for (view,) in views.values())
    assert [view.slot_offset % 256 for (view,) in bench.store.placement(ExpertId(0, 0)).views.values()] != [
        0,
        0,
    ]


def test_the_fake_device_notices(monkeypatch):
    """Kernels that ask for nothing must read poison here, or the tests above would prove nothing."""
    bench = Bench(0, 4, favourite="compute")
    monkeypatch.setattr(bench.device, "hand_out", lambda slot: None)
    bench.layer(0, [0, 1])
    with pytest.raises(AssertionError, match="was read"):
        bench.verify()
    bench.close()


def test_in_host_memory_nothing_is_queued():
    device = HostDevice()
    assert not device.queues
    done = []
    device.write_slot(0, lambda: done.append(0))
    assert done == [0]
    assert device.allocate(4096).data_ptr() % 4096 == 0


# The real classes, as far as they go without an accelerator, and all the way with one.


def test_streams_of_torch_on_the_cpu():
    """torch has streams for the CPU, on which everything is done at once, but no events to record there."""
    streams = TorchStreams(torch.device("cpu"))
    stream = streams.new_stream()
    assert isinstance(stream, torch.Stream)
    assert stream == streams.new_stream(), "told apart by what they are, as AcceleratorDevice does"
    target = streams.device_buffer(3)
    streams.enqueue(stream, lambda: target.fill_(7))
    stream.synchronize()
    assert target.tolist() == [7, 7, 7]
    with pytest.raises(RuntimeError, match="doesn't support events"):
        streams.record(stream)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("kind", KINDS)
def test_on_an_accelerator(kind):
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    device = torch.device(accelerator.type, torch.accelerator.current_device_index())
    slots = ExpertCache(new_store(kind), SHAPE, 3, device=AcceleratorDevice(device))
    rows = ROWS.to(device)
    try:
        for _ in range(5):
            for layer in range(3):
                for expert, weights in slots.open_layer(layer, range(6)):
                    assert weights["up"][0].device == device
                    got = F.linear(F.relu(F.linear(rows, weights["up"][0])), weights["down"][0])
                    torch.testing.assert_close(got.cpu(), expected(ExpertId(layer, expert), None))
    finally:
        slots.close()
