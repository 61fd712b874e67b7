"""Memory that is about to be read into, touched before.

The first write to fresh memory makes the kernel find and clear its pages. In a direct read that comes at each page's
turn, while the disk waits: a first prompt's 1.4 GB of fresh slots took 0.7 s longer (2 cores, Linux 6.18, 2026-11).
Here a thread has the kernel do it, piece by piece, a little ahead of the reads. Contents are left alone, so it does
not matter who comes first, and where it cannot be done (no such kernel, before 5.14; no thread) only speed is lost.
"""

from __future__ import annotations

import ctypes
import queue
import sys
import threading

from torch import Tensor

PIECE_BYTES = 8 << 20
AHEAD_BYTES = 64 << 20  # of the farthest read: what nobody reads into is not to cost memory
_MADV_POPULATE_WRITE = 23


class TouchAhead:
    """Of one page-aligned buffer that is read into from its beginning on, by and large.

    Without a lock: the garbage collector may run the finalizer of a model, and so `close`, in the midst of any line.
    """

    def __init__(self, memory: Tensor):
        self._memory = memory
        self._wanted = 0  # bytes from the beginning
        self._touched = 0
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = not sys.platform.startswith("linux")

    def reading_until(self, end: int) -> None:
        """Somebody is about to read into the memory before byte `end`. By one thread, which Ctrl-C does not reach."""
        if self._closed or end <= self._wanted - AHEAD_BYTES // 2:
            return
        self._wanted = min(end + AHEAD_BYTES, self._memory.numel())
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="expertflow-touch", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads here, or the interpreter ends
                self._closed = True
                return
            self._thread = thread
        self._wake.put(None)

    def close(self) -> None:
        """Touch nothing any more. By any thread, its own too."""
        self._closed = True
        self._wake.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        while not self._closed:
            begin, end = self._touched, min(self._touched + PIECE_BYTES, self._wanted)
            if begin >= end:
                self._wake.get()
                continue
            address = ctypes.c_void_p(self._memory.data_ptr() + begin)
            refused = madvise(address, ctypes.c_size_t(end - begin), _MADV_POPULATE_WRITE)
            self._touched = end
            if refused or end == self._memory.numel():  # nobody can, or all is done
                self._closed = True
