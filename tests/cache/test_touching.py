import ctypes
import mmap
import threading

import pytest
import torch
from torch import Tensor

from expertflow.cache.touching import AHEAD_BYTES, PIECE_BYTES, TouchAhead
from expertflow.store.layout import aligned_buffer

MIB = 1 << 20
HUGE = 2 * MIB  # pages may come in so many bytes at once


def resident_bytes(memory: Tensor) -> int:
    """How much of fresh memory the kernel has found pages for."""
    pages = -(-memory.numel() // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * pages)()
    address, length = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel())
    assert ctypes.CDLL(None).mincore(address, length, states) == 0
    return mmap.PAGESIZE * sum(state & 1 for state in states)


def settled(touch: TouchAhead) -> None:
    """Wait until the thread has nothing to do, or has ended."""
    thread = touch._thread
    assert thread is not None
    while thread.is_alive() and touch._touched < touch._wanted:
        thread.join(0.01)


@pytest.fixture
def populates():
    """Whether this kernel can do it at all."""
    memory = aligned_buffer(mmap.PAGESIZE)
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(mmap.PAGESIZE), 23):
        pytest.skip("a kernel without MADV_POPULATE_WRITE (Linux 5.14)")


def test_touches_what_is_read_soon_and_no_more(populates: None) -> None:
    memory = aligned_buffer(AHEAD_BYTES + 100 * MIB)
    touch = TouchAhead(memory)
    assert resident_bytes(memory) == 0

    touch.reading_until(10 * MIB)

    settled(touch)
    assert 0 <= resident_bytes(memory) - (10 * MIB + AHEAD_BYTES) <= HUGE
    touch.close()


def test_touches_everything_and_ends(populates: None) -> None:
    memory = aligned_buffer(3 * PIECE_BYTES + 5 * mmap.PAGESIZE)
    touch = TouchAhead(memory)

    touch.reading_until(mmap.PAGESIZE)

    assert touch._thread is not None
    touch._thread.join(60)
    assert not touch._thread.is_alive()
    assert resident_bytes(memory) == memory.numel()
    touch.reading_until(memory.numel())  # nothing is left to do
    touch.close()


def test_leaves_contents_alone() -> None:
    memory = aligned_buffer(4 * PIECE_BYTES)
    torch.randint(256, memory.shape, dtype=torch.uint8, out=memory)
    before = memory.clone()
    touch = TouchAhead(memory)

    touch.reading_until(1)

    settled(touch)
    touch.close()
    assert torch.equal(memory, before)


def test_reading_backwards_or_again_asks_for_nothing_more(populates: None) -> None:
    memory = aligned_buffer(3 * AHEAD_BYTES)
    touch = TouchAhead(memory)
    touch.reading_until(AHEAD_BYTES)
    settled(touch)

    touch.reading_until(MIB)

    settled(touch)
    assert 0 <= resident_bytes(memory) - 2 * AHEAD_BYTES <= HUGE
    touch.close()


def test_close_before_and_during_the_work_leaves_no_thread() -> None:
    unused = TouchAhead(aligned_buffer(PIECE_BYTES))
    unused.close()
    unused.reading_until(PIECE_BYTES)
    assert unused._thread is None

    busy = TouchAhead(aligned_buffer(64 * PIECE_BYTES))
    busy.reading_until(64 * PIECE_BYTES)
    busy.close()
    assert "expertflow-touch" not in [thread.name for thread in threading.enumerate()]


def test_a_kernel_that_refuses_ends_it_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertflow.cache.touching._MADV_POPULATE_WRITE", 9999)
    memory = aligned_buffer(4 * PIECE_BYTES)
    touch = TouchAhead(memory)

    touch.reading_until(PIECE_BYTES)

    assert touch._thread is not None
    touch._thread.join(60)
    assert not touch._thread.is_alive()
    assert resident_bytes(memory) == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_its_own_thread_may_close_it() -> None:
    """As when the garbage collector finds there that a model is used no more."""
    memory = aligned_buffer(2 * PIECE_BYTES)
    threads = []

    class Forgotten:
        def numel(self) -> int:
            return memory.numel()

        def data_ptr(self) -> int:
            threads.append(threading.current_thread())
            touch.close()
            return memory.data_ptr()

    touch = TouchAhead(Forgotten())  # type: ignore[arg-type]
    touch.reading_until(PIECE_BYTES)
    assert touch._thread is not None
    touch._thread.join(60)
    assert threads == [touch._thread]


def test_without_a_thread_only_speed_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    touch = TouchAhead(aligned_buffer(PIECE_BYTES))
    touch.reading_until(PIECE_BYTES)
    touch.close()
