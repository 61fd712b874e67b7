"""RAM in front of a disk: same bytes, fewer reads, and no chunk before it is whole."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import GUARD_S, POISON, FakeStore, Threads, consume, experts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertflow.cache.host_cache import ExpertChunk, HostCache, host_slots
from expertflow.core import ExpertId, MoEShape
from expertflow.store.disk import Chunk
from expertflow.store.protocol import LendingStore

SHAPE = MoEShape((6, 6, 6))
TRUTH = FakeStore(SHAPE)
CHUNKS = TRUTH.num_chunks
A, B, C = ExpertId(0, 0), ExpertId(0, 1), ExpertId(0, 2)


class HalfReads(FakeStore):
    """Reads leave poison in their place until they are through."""

    def read_chunk(self, chunk: Chunk, buffer: Tensor) -> int:
        buffer[chunk.slot_offset : chunk.slot_offset + chunk.nbytes] = POISON
        return super().read_chunk(chunk, buffer)


def new_host(num_slots: int) -> tuple[HalfReads, HostCache]:
    disk = HalfReads(SHAPE)
    return disk, HostCache(disk, SHAPE, num_slots * disk.slot_bytes, pin=False)


def truth(chunk: Chunk) -> Tensor:
    assert isinstance(chunk, ExpertChunk)
    buffer = torch.zeros(TRUTH.slot_bytes, dtype=torch.uint8)
    count = TRUTH.read_chunk(TRUTH.chunks(chunk.expert)[chunk.index], buffer)
    return buffer[chunk.slot_offset : chunk.slot_offset + count]


def read(host: HostCache, chunk: Chunk) -> None:
    buffer = torch.full((host.slot_bytes,), 7, dtype=torch.uint8)
    count = host.read_chunk(chunk, buffer)
    begin, end = chunk.slot_offset, chunk.slot_offset + count
    assert torch.equal(buffer[begin:end], truth(chunk))
    assert (buffer[:begin] == 7).all()
    assert (buffer[begin + chunk.nbytes :] == 7).all()


def read_all(host: HostCache, expert: ExpertId) -> None:
    for chunk in host.chunks(expert):
        read(host, chunk)


def resident(host: HostCache) -> set[ExpertId]:
    host.table.check()
    return {expert for expert in host.table.residents if host.table.is_ready(expert)}


def test_what_was_read_once_comes_from_memory():
    disk, host = new_host(3)
    for _ in range(3):
        for expert in (A, B):
            read_all(host, expert)
    assert Counter(disk.reads) == {A: CHUNKS, B: CHUNKS}
    assert (host.stats.hits, host.stats.misses) == (4, 2)
    assert host.stats.bytes_from_ram == 2 * host.stats.bytes_from_disk > 0
    assert resident(host) == {A, B}


def test_it_evicts_as_its_policy_says():
    disk = FakeStore(MoEShape((6,)))
    host = HostCache(disk, MoEShape((6,)), 2 * disk.slot_bytes, pin=False)
    for expert in (A, B, A, C):
        read_all(host, expert)
    assert resident(host) == {A, C}


@pytest.mark.parametrize(("num_slots", "experts_read"), [(2, None), (7, None), (18, 9)])
def test_a_cache_over_it_gets_what_the_disk_has(new_cache, num_slots, experts_read):
    disk, host = new_host(num_slots)
    cache = new_cache(2, HostFake(host, disk))
    for layer in (0, 1, 2, 0, 1, 2):
        consume(cache, layer, [1, 2, 3])
    assert host.stats.hits + host.stats.misses == sum(map(sum, cache.stats.loads_LE))
    assert len(disk.reads) == host.stats.misses * CHUNKS
    assert experts_read in (None, host.stats.misses)
    assert cache.stats.bytes_read == host.stats.bytes_from_ram + host.stats.bytes_from_disk


class HostFake(FakeStore):
    """A FakeStore to compare with, that reads through a HostCache."""

    def __init__(self, host: HostCache, disk: FakeStore):
        super().__init__(SHAPE)
        self.host = host

    def chunks(self, expert: ExpertId) -> Any:
        return self.host.chunks(expert)

    def read_chunk(self, chunk: Chunk, buffer: Tensor) -> int:
        return self.host.read_chunk(chunk, buffer)

    def weights(self, expert: ExpertId) -> Any:
        return TRUTH.weights(expert)


OPS = st.lists(st.tuples(st.integers(0, 17), st.integers(0, CHUNKS - 1), st.integers(0, 3)), max_size=60)


@settings(deadline=None, max_examples=100)
@given(OPS, st.integers(2, 5), st.data())
def test_any_order_of_chunks_loans_and_failures(ops, num_slots, data):
    """Against the truth: whole experts, single chunks, loans kept over other reads, and a disk that fails."""
    disk, host = new_host(num_slots)
    experts = list(experts_of(SHAPE))
    loans: list[tuple[Chunk, Any]] = []
    failing: set[ExpertId] = set()

    def before_read(expert: ExpertId) -> None:
        if expert in failing:
            raise OSError("injected")

    disk.before_read = before_read
    for number, index, kind in ops:
        expert = experts[number]
        chunk = host.chunks(expert)[index]
        if kind == 0:
            read_all(host, expert)
        elif kind == 1:
            read(host, chunk)
        elif kind == 2 and (loan := host.lend_chunk(chunk)) is not None:
            loans.append((chunk, loan))
        elif kind == 3:
            failing.add(expert)
            try:
                read_all(host, expert)
            except OSError:
                assert expert not in resident(host)
            failing.clear()
        if loans and data.draw(st.booleans()):
            loans.pop(0)[1].close()
        host.table.check()
        for lent, loan in loans:
            assert torch.equal(loan.bytes, truth(lent)), "a loan changed"
            assert host.table.is_pinned(lent.expert)
    while loans:
        loans.pop()[1].close()
    assert not [expert for expert in host.table.residents if host.table.is_pinned(expert)]
    assert host.table.residents - resident(host) == host._filling.keys()


@pytest.mark.parametrize("seed", range(6))
def test_readers_in_several_threads_see_whole_chunks_and_none_reads_twice(seed):
    disk, host = new_host(18)
    chunks = [chunk for expert in experts_of(SHAPE) for chunk in host.chunks(expert)]
    together = threading.Barrier(3)

    def reader(number: int) -> None:
        mine = sorted(experts_of(SHAPE))
        random.Random(seed * 3 + number // 2).shuffle(mine)
        together.wait(GUARD_S)
        for expert in mine:
            read_all(host, expert)

    with Threads() as threads:
        for number in range(3):
            threads.start(reader, number)
    assert len(disk.reads) == len(chunks), "two readers fetched the same chunk"
    assert len(resident(host)) == 18


def test_a_reader_waits_for_another_that_reads_the_same_chunk():
    disk, host = new_host(2)
    inside, go_on, asked = threading.Event(), threading.Event(), threading.Event()

    def before_read(expert: ExpertId) -> None:
        inside.set()
        assert go_on.wait(GUARD_S)

    disk.before_read = before_read
    wait = host._condition.wait

    def told_wait(timeout: float | None = None) -> bool:
        asked.set()
        return wait(GUARD_S)

    host._condition.wait = told_wait  # type: ignore[method-assign]
    chunk = host.chunks(A)[0]
    with Threads() as threads:
        threads.start(read, host, chunk)
        assert inside.wait(GUARD_S)
        threads.start(read, host, chunk)
        assert asked.wait(GUARD_S), "the second reader does not wait"
        go_on.set()
    assert disk.reads == [A]


def test_another_expert_is_read_meanwhile():
    """The lock is not held over a read: a demand of another cache would wait for it."""
    disk, host = new_host(3)
    inside, go_on = threading.Event(), threading.Event()

    def before_read(expert: ExpertId) -> None:
        if expert == A:
            inside.set()
            assert go_on.wait(GUARD_S)

    disk.before_read = before_read
    with Threads() as threads:
        threads.start(read, host, host.chunks(A)[0])
        assert inside.wait(GUARD_S)
        read_all(host, B)
        go_on.set()


def test_one_reader_that_fails_leaves_the_other_to_try():
    disk, host = new_host(2)
    first = host.chunks(A)[0]
    loan = host.lend_chunk(first)
    assert loan is not None
    disk.before_read = lambda expert: (_ for _ in ()).throw(OSError("injected"))
    with pytest.raises(OSError, match="injected"):
        read(host, host.chunks(A)[1])
    assert torch.equal(loan.bytes, truth(first)), "its slot went while it was lent"
    disk.before_read = lambda expert: None
    read(host, host.chunks(A)[1])
    loan.close()
    for chunk in host.chunks(A)[2:]:
        read(host, chunk)
    assert resident(host) == {A}


def test_a_failed_expert_gives_its_slot_back():
    disk, host = new_host(2)
    for expert in (A, B, C):
        disk.before_read = lambda expert: (_ for _ in ()).throw(OSError("injected"))
        with pytest.raises(OSError, match="injected"):
            read_all(host, expert)
    disk.before_read = lambda expert: None
    assert not host.table.residents
    read_all(host, A)
    assert resident(host) == {A}


def test_an_error_is_not_forgotten_when_another_reader_gets_its_chunk():
    """The slot of an expert that nobody could finish was never free again."""
    disk, host = new_host(2)
    read(host, host.chunks(A)[0])
    outer = True

    def before_read(expert: ExpertId) -> None:
        nonlocal outer
        if not outer:
            raise OSError("injected")
        outer = False
        with pytest.raises(OSError, match="injected"):  # while the chunk before is on its way
            read(host, host.chunks(A)[2])

    disk.before_read = before_read
    read(host, host.chunks(A)[1])
    assert not host.table.residents


@pytest.mark.parametrize("num_slots", [2, 16])
def test_experts_that_were_called_off_half_read_keep_few_slots(num_slots):
    """A prefetch may end between two chunks; whoever asks later gets the slot."""
    _, host = new_host(num_slots)
    others = [expert for expert in experts_of(SHAPE) if expert != C]
    for expert in others:
        read(host, host.chunks(expert)[0])
    read_all(host, C)
    assert resident(host) == {C}
    assert len(host._filling) == num_slots // 8
    last = others[-1]
    for chunk in host.chunks(last)[1:]:  # its reader comes back
        read(host, chunk)
    assert (last in resident(host)) == (num_slots == 16)


def test_it_reads_past_its_slots_when_all_are_in_use():
    _, host = new_host(2)
    loans = [host.lend_chunk(host.chunks(expert)[0]) for expert in (A, B)]
    assert None not in loans
    assert host.lend_chunk(host.chunks(C)[0]) is None
    read_all(host, C)
    assert (host.stats.hits, host.stats.misses) == (0, 3)
    assert resident(host) == set()


def test_whatever_buffer_a_chunk_goes_to():
    """Staging buffers hold one chunk: it goes to their beginning, from memory and past it."""
    _, host = new_host(2)
    keep = [host.lend_chunk(host.chunks(expert)[0]) for expert in (A, B)]
    for expert in (A, C):
        for chunk in host.chunks(expert):
            buffer = torch.zeros(4096, dtype=torch.uint8)
            count = host.read_chunk(replace(chunk, slot_offset=0), buffer)
            assert torch.equal(buffer[:count], truth(chunk))
    assert len(keep) == 2


def test_it_says_what_it_is_and_closes_its_source():
    disk, host = new_host(4)
    assert host.io_mode == "ram for 4 experts, else fake"
    assert isinstance(host, LendingStore)
    assert not isinstance(disk, LendingStore)
    closed = []
    disk.close = lambda: closed.append(1)  # type: ignore[method-assign]
    host.close()
    assert closed == [1]
    with pytest.raises(ValueError, match="the store was closed"):
        read_all(host, A)


def test_a_budget_for_less_than_two_is_refused():
    with pytest.raises(ValueError, match=r"host_memory of 7 B holds 1 experts of 4 B each, and two must"):
        host_slots(7, 4, 6, pin=False)
    assert host_slots(8, 4, 6, pin=False) == [2]
    assert host_slots(10**9, 4, 6, pin=False) == [6]
