"""Ctrl-C between layers instead of in the middle of the cache's bookkeeping.

Python raises KeyboardInterrupt between any two instructions, also between taking a slot and noting whose
it is. While a model runs, SIGINT is therefore only noted, and raised before the next MoE layer starts.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Defers SIGINT within `deferred`; `check` raises it. A second SIGINT is raised at once."""

    def __init__(self) -> None:
        self._pending = False

    def check(self, *_: Any) -> None:
        """Raise the KeyboardInterrupt that came meanwhile. Takes any arguments, to serve as a hook."""
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only in the main thread and only in place of Python's own handler: an application's stays."""
        mine = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if not mine:
            yield
            return
        self._pending = False
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.check()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._pending:
            signal.default_int_handler(signum, frame)
        self._pending = True
