"""A process that was forked has the memory of a cache and none of its threads."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable

import pytest
import torch
from fakes import GUARD_S, Threads, Turnstile, assert_no_pins, consume, on_wait

from expertflow.cache.expert_cache import ExpertCache
from expertflow.core import ExpertId

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def in_child(check: Callable[[], None]) -> int:
    """What the child's exit code says of `check`; one that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(GUARD_S))
            check()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def read(cache: ExpertCache, experts: list[int]) -> None:
    """As `consume`, in whatever dtype."""
    for expert, weights in cache.open_layer(0, experts):
        for role, parts in cache.store.weights(ExpertId(0, expert)).items():
            for part, got in zip(parts, weights[role], strict=True):
                assert torch.equal(part.to(got.dtype), got), f"expert {expert} has wrong bytes in {role}"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_both_processes_go_on_with_what_was_under_way(new_cache, packed):
    """The fork comes while one expert is half read and another waits."""
    cache: ExpertCache = new_cache(3, dtype=torch.float64 if packed else None)
    assert cache.memory.packs == packed
    read(cache, [0])
    gate = Turnstile(cache.store)
    cache.prefetch([ExpertId(0, 1), ExpertId(0, 2)])
    gate.let(1)
    gate.wait_for_passes(1)
    gate.wait_for_arrivals(2)

    def check() -> None:
        assert threading.active_count() == 1
        cache.store.before_read = lambda expert: None
        for experts in ([1, 0], [2], [3, 4, 5]):
            read(cache, experts)
        cache.close()

    assert in_child(check) == 0
    gate.open()
    for experts in ([1, 0], [2], [3, 4, 5]):
        read(cache, experts)
    assert_no_pins(cache)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_without_the_thread_that_was_in_a_layer_says_so(new_cache):
    cache: ExpertCache = new_cache(3)
    gate = Turnstile(cache.store)
    waiting = threading.Semaphore(0)
    on_wait(cache, waiting.release)

    def check() -> None:
        with pytest.raises(RuntimeError, match="load the model again") as refused:
            consume(cache, 1, [0])
        assert "forked while another" in str(refused.value.__cause__)
        gate.open()
        cache.close()

    with Threads() as threads:
        user = threads.start(consume, cache, 0, [0])
        assert waiting.acquire(timeout=GUARD_S)
        code = in_child(check)
        gate.open()
        user.join(GUARD_S)
    assert code == 0
    consume(cache, 1, [0])


def test_a_closed_cache_stays_closed_in_a_child(new_cache):
    cache: ExpertCache = new_cache(3)
    cache.close()
    before = threading.active_count()

    def check() -> None:
        assert threading.active_count() == 1 <= before
        cache.close()

    assert in_child(check) == 0
