from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading

import psutil
import pytest

from expertflow import budget, early_memory
from expertflow.early_memory import PIECE_BYTES, SMALLEST_BYTES, EarlyMemory

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="memory comes when it is needed here"
)
NBYTES = 4 * PIECE_BYTES


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> EarlyMemory:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    return EarlyMemory()


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The clearing thread stands still after one piece until this is set."""
    go_on, begun = threading.Event(), threading.Event()
    memset = ctypes.memset

    def slow(address: int, value: int, nbytes: int) -> None:
        memset(address, value, nbytes)
        if begun.is_set():
            assert go_on.wait(60)
        begun.set()

    monkeypatch.setattr(ctypes, "memset", slow)
    return go_on


def resident_bytes(pages: mmap.mmap) -> int:
    states = (ctypes.c_ubyte * (len(pages) // mmap.PAGESIZE))()
    address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(pages)))
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(pages)), states) == 0
    return mmap.PAGESIZE * sum(state & 1 for state in states)


def wait_for(early: EarlyMemory) -> None:
    assert early.thread is not None
    early.thread.join(60)
    assert not early.thread.is_alive()


def test_memory_is_there_before_it_is_taken(early: EarlyMemory) -> None:
    early.begin(NBYTES)
    wait_for(early)
    assert early.held_bytes() == NBYTES
    pages = early.take(NBYTES)
    assert pages is not None
    assert len(pages) == NBYTES
    assert resident_bytes(pages) == NBYTES
    assert bytes(pages[:100]) == bytes(100)
    assert early.held_bytes() == 0


def test_it_is_taken_once(early: EarlyMemory) -> None:
    assert early.take(1) is None
    early.begin(NBYTES)
    assert early.take(NBYTES) is not None
    assert early.take(NBYTES) is None


def test_what_is_taken_is_written_to_by_nobody_else(early: EarlyMemory, held_back: threading.Event) -> None:
    early.begin(NBYTES)
    threading.Timer(0.0, held_back.set).start()
    pages = early.take(NBYTES)
    assert pages is not None
    pages[:] = b"\x07" * NBYTES
    wait_for(early)
    assert pages[:] == b"\x07" * NBYTES


@pytest.mark.parametrize("wanted", [0, 1, PIECE_BYTES + 5, NBYTES - 1])
def test_what_nobody_can_use_goes_back(early: EarlyMemory, wanted: int) -> None:
    early.begin(NBYTES)
    wait_for(early)
    pages = early.take(wanted)
    assert pages is not None
    used = -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE
    assert resident_bytes(pages) == used


def test_too_little_is_given_back_whole(early: EarlyMemory) -> None:
    early.begin(NBYTES)
    wait_for(early)
    with_it = psutil.Process().memory_info().rss
    assert early.take(NBYTES + 1) is None
    assert early.held_bytes() == 0
    assert with_it - psutil.Process().memory_info().rss > NBYTES // 2


def test_a_second_wish_waits_until_the_first_is_taken(early: EarlyMemory) -> None:
    early.begin(NBYTES)
    first = early.thread
    early.begin(2 * NBYTES)
    assert early.thread is first
    assert early.take(NBYTES + 1) is None
    early.begin(2 * NBYTES)
    assert early.take(NBYTES + 1) is not None


def test_little_is_not_worth_it(early: EarlyMemory) -> None:
    early.begin(SMALLEST_BYTES - 1)
    assert early.thread is None


def test_a_single_core_has_imports_to_do(early: EarlyMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    early.begin(NBYTES)
    assert early.thread is None


def test_no_room_to_map(early: EarlyMemory) -> None:
    early.begin(1 << 60)
    assert early.thread is None
    assert early.take(1) is None


def test_the_budget_counts_it_once(early: EarlyMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the dense weights that will lie there, not as what the process holds beside them."""
    monkeypatch.setattr(budget, "EARLY", early)
    before = budget.process_bytes()
    early.begin(8 * NBYTES)
    wait_for(early)
    assert abs(budget.process_bytes() - before) < NBYTES


def test_it_needs_none_of_the_imports_it_runs_beside() -> None:
    code = f"import sys, {early_memory.__name__}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
