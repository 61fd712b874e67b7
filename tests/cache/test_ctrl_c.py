"""Ctrl-C at any place of the cache where Python may raise it: others must never wait for who was interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from fakes import Threads, consume

from expertflow.cache.expert_cache import ExpertCache
from expertflow.cache.policies import Forecast
from expertflow.core import ExpertId


def interrupted_at_entry(number: int, run: Callable[[], Any]) -> bool:
    """Raise KeyboardInterrupt where the function entered as the `number`-th begins; whether there were so many.

    Of Python's own functions too: it looks for signals at the entry of each that is not written in C.
    """
    entered = 0

    def trace(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal entered
        if frame.f_code.co_filename.endswith(("expert_cache.py", "threading.py", "contextlib.py")):
            entered += 1
            if entered == number:
                raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return entered >= number


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_interrupted_thread(new_cache):
    """Condition's __enter__ and __exit__ are Python: Ctrl-C at their entry once left the lock taken for ever, and the
    process did not even end, since closing waits for the loader; at the end of a layer it left its turn in the line."""
    number, usable, reached = 0, 0, True
    told: list[str] = []
    while reached:
        number += 1
        cache: ExpertCache = new_cache(3, policy="plec")

        def use(cache: ExpertCache = cache) -> None:
            cache.begin_pass(Forecast([[0.9] * 3 + [0.1] * 3] * 3))
            consume(cache, 0, [0, 1, 2, 3])
            cache.refine(1, [0.1] * 3 + [0.8] * 3)
            cache.prefetch([ExpertId(1, 0)])
            consume(cache, 1, [0])
            assert cache.stats.uses_LE[1][0] == 1

        reached = interrupted_at_entry(number, use)

        def use_from_another_thread(cache: ExpertCache = cache) -> None:
            nonlocal usable
            try:
                consume(cache, 0, [4, 5, 0])
                consume(cache, 2, [1])
                usable += 1
            except RuntimeError as error:
                told.append(str(error))
            finally:
                cache.close()

        with Threads() as threads:
            threads.start(use_from_another_thread)
    assert 1 < usable < number, "interrupts between changes do no harm, and some came in the middle of one"
    assert all("in the middle of a change; load the model again" in error for error in told)
