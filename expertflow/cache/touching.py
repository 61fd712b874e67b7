"""Memory that is about to be read into, touched before.

The first write to fresh memory makes the kernel find and clear its pages. In a direct read that comes at each page's
turn, while the disk waits: a first prompt's 1.4 GB of fresh slots took 0.7 s longer (2 cores, Linux 6.18, 2026-11).
Here a thread has the kernel do it, piece by piece, a little ahead of the reads. Contents are left alone, so it does
not matter who comes first, and without a kernel that can do it (before 5.14) only speed is lost.
"""

from __future__ import annotations

import ctypes
import sys
import threading

from torch import Tensor

PIECE_BYTES = 8 << 20
AHEAD_BYTES = 64 << 20  # of the farthest read: what nobody reads into is not to cost memory
_MADV_POPULATE_WRITE = 23


class TouchAhead:
    """Of one page-aligned buffer that is read into from its beginning on, by and large."""

    def __init__(self, memory: Tensor):
        self._memory = memory
        self._wanted = 0  # bytes from the beginning
        self._touched = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = not sys.platform.startswith("linux")

    def reading_until(self, end: int) -> None:
        """Somebody is about to read into the memory before byte `end`. By one thread, which Ctrl-C does not reach."""
        if self._closed or end <= self._wanted - AHEAD_BYTES // 2:
            return
        with self._changed:
            if self._closed:
                return
            self._wanted = min(end + AHEAD_BYTES, self._memory.numel())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="expertflow-touch", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Return when the memory may go.

        By any thread, its own too: the garbage collector runs the finalizer of a model wherever it happens to run.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        while True:
            with self._changed:
                while self._touched >= self._wanted and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                begin, end = self._touched, min(self._touched + PIECE_BYTES, self._wanted)
            address = ctypes.c_void_p(self._memory.data_ptr() + begin)
            refused = madvise(address, ctypes.c_size_t(end - begin), _MADV_POPULATE_WRITE)
            with self._changed:
                self._touched = end
                # All done, a kernel that cannot, or no memory: then the reads will say so.
                self._closed = self._closed or bool(refused) or end == self._memory.numel()
