"""Memory for dense weights, got from the kernel while the process is still importing libraries.

The first write to fresh memory has the kernel find and clear its pages. Where a virtual machine's host takes free
memory back, the host has to find them too: .36 to .5 GB/s, with one thread or two, against 3 to 9 for memory that the
host still has there (2 cores, Linux 6.18, free page reporting, 2026-11). Imports keep one core busy for seconds, and
leave the others to this. Only speed hangs on it: what is not had early is had as always.

Imports no torch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

PIECE_BYTES = (
    16 << 20
)  # between two, the thread waits its turn among those of Python; who takes, waits for one
SMALLEST_BYTES = PIECE_BYTES  # less is had in a moment


class EarlyMemory:
    """One mapping, cleared by a thread from its beginning on, and given to whoever asks first for so much."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: mmap.mmap | None = None
        self._cleared = 0
        self.thread: threading.Thread | None = None  # of the last `begin`

    def begin(self, nbytes: int) -> None:
        """Start getting nbytes. Nothing happens with a single core, and while what was begun before is not taken."""
        if (
            nbytes < SMALLEST_BYTES
            or not hasattr(os, "sched_getaffinity")
            or len(os.sched_getaffinity(0)) < 2
        ):
            return
        with self._lock:
            if self._pages is not None:
                return
            try:
                pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                pages.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # no room to map, or a kernel that is too small for this to matter
                return
            self._pages, self._cleared = pages, 0
            self.thread = threading.Thread(
                target=self._clear, args=(pages,), name="expertflow-early-memory", daemon=True
            )
            self.thread.start()

    def held_bytes(self) -> int:
        """Of this process' resident set, what somebody will still take."""
        with self._lock:
            return self._cleared

    def take(self, nbytes: int) -> mmap.mmap | None:
        """At least nbytes of zeros that begin on a page boundary, whoever asks first; None where there are none.

        What nobody can use after this call goes back to the system.
        """
        with self._lock:
            pages, cleared = self._pages, self._cleared
            self._pages, self._cleared = None, 0
        if pages is None or len(pages) < nbytes:
            return None
        end = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if end < cleared:
            pages.madvise(mmap.MADV_DONTNEED, end, len(pages) - end)
        return pages

    def _clear(self, pages: mmap.mmap) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        while True:
            with self._lock:
                begin, end = self._cleared, min(self._cleared + PIECE_BYTES, len(pages))
                if self._pages is not pages or begin == end:
                    return
                ctypes.memset(address + begin, 0, end - begin)  # without the interpreter's lock
                self._cleared = end


EARLY = EarlyMemory()
