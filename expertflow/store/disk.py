"""DiskStore: every expert by direct reads from the untouched checkpoint, straight into a slot.

It owns file descriptors, no threads and no memory. Direct reads leave nothing in the page cache, which
would count against the memory budget; where the file system refuses them, reads are buffered, the
cached pages are given back after each, and `io_mode` says so.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from expertflow.core import ExpertId
from expertflow.store.checkpoint import Checkpoint, FileIdentity, changed_error
from expertflow.store.layout import (
    PAGE,
    Part,
    Placement,
    Run,
    aligned_buffer,
    page_ceil,
    page_floor,
    place_raw,
)

log = logging.getLogger(__name__)

# A demand load waits for the chunk in progress: 7 ms at 1.2 GB/s. Throughput is flat from 128 KiB on with an idle
# processor; with both cores computing it is 0.99 GB/s at 4 MiB and 1.08 at 8 (reference machine, 2026-11).
CHUNK_BYTES = 8 << 20

_O_DIRECT: int | None = getattr(os, "O_DIRECT", None)
_REFUSALS = (errno.EINVAL, errno.ENOTSUP)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One read: nbytes of a file from file_offset on, to slot_offset of a slot."""

    path: Path
    file_offset: int
    nbytes: int
    slot_offset: int


class DiskStore:
    """Experts by direct I/O. Thread-safe, except that close() must come after the last read.

    experts: the parts of each expert; they must lie in files of the checkpoint.
    direct: True insists on direct I/O, False reads buffered, None falls back to buffered and warns.
    chunk_bytes: largest single read, a multiple of 4096.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: Mapping[ExpertId, Sequence[Part]],
        *,
        direct: bool | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        if chunk_bytes <= 0 or chunk_bytes % PAGE:
            raise ValueError(f"chunk_bytes={chunk_bytes} must be a positive multiple of {PAGE}")
        assert experts, "a store without experts"
        self.experts: Mapping[ExpertId, tuple[Part, ...]] = MappingProxyType(
            {expert: tuple(parts) for expert, parts in experts.items()}
        )
        self._identities = checkpoint.identities
        self._placements = {expert: place_raw(parts) for expert, parts in self.experts.items()}
        self.slot_bytes: int = max(placement.nbytes for placement in self._placements.values())
        self._chunk_bytes = chunk_bytes
        self._insist = direct is True
        self._buffered_because = "asked for" if direct is False else None
        self._lock = threading.Lock()
        self._descriptors: dict[tuple[Path, bool], int] = {}  # by file and whether direct
        self._closed = False
        self._finalizer = weakref.finalize(self, _close_all, self._descriptors)
        if direct is not False and _O_DIRECT is None:
            self._fall_back("this system has no O_DIRECT")

    @property
    def io_mode(self) -> str:
        """Known for sure after the first read."""
        return "direct" if self._buffered_because is None else f"buffered ({self._buffered_because})"

    def placement(self, expert: ExpertId) -> Placement:
        return self._placements[expert]

    def chunks(self, expert: ExpertId) -> tuple[Chunk, ...]:
        return tuple(
            chunk for run in self._placements[expert].runs for chunk in _split(run, self._chunk_bytes)
        )

    def read_chunk(self, chunk: Chunk, buffer: Tensor) -> int:
        """Read a chunk into its place in buffer, a whole slot: page-aligned uint8 on the CPU.

        Returns the bytes read, fewer than the chunk's at the end of the file only. Releases the GIL.
        OSError when the bytes cannot be read, ValueError when the file has changed since it was opened.
        """
        assert buffer.data_ptr() % PAGE == 0, f"slot at {buffer.data_ptr():#x} is not page-aligned"
        target = buffer.numpy().data[chunk.slot_offset : chunk.slot_offset + chunk.nbytes]
        assert len(target) == chunk.nbytes, f"{chunk} does not fit into {buffer.numel()} bytes"
        identity = self._identities[chunk.path]
        needed = min(chunk.nbytes, identity.nbytes - chunk.file_offset)
        direct = self._buffered_because is None
        try:
            descriptor = self._descriptor(chunk.path, direct)
            done = _read_fully(descriptor, target, chunk.file_offset, needed, direct)
        except OSError as error:
            if direct and error.errno in _REFUSALS:
                self._fall_back(f"direct reads refused for {chunk.path}: {os.strerror(error.errno)}")
                return self.read_chunk(chunk, buffer)
            raise OSError(
                error.errno,
                f"{chunk.path}: reading {needed} bytes at offset {chunk.file_offset} failed "
                f"({error.strerror or error}); check the disk (dmesg, smartctl) and the mount, "
                "or copy the checkpoint to another disk",
            ) from error
        if done < needed:
            raise OSError(
                errno.EIO,
                f"{chunk.path}: only {done} of {needed} bytes at offset {chunk.file_offset} came; it was "
                "truncated or changed while open: download it again, then open the checkpoint again",
            )
        if not direct:
            _drop_from_page_cache(descriptor, chunk)
        # After the read, since a write changes the times before the data. It costs a microsecond.
        now = FileIdentity.of(os.fstat(descriptor))
        if now != identity:
            raise changed_error(chunk.path, identity, now)
        return done

    def _descriptor(self, path: Path, direct: bool) -> int:
        with self._lock:
            if self._closed:
                raise ValueError(f"the store was closed; open the checkpoint again to read {path}")
            descriptor = self._descriptors.get((path, direct))
            if descriptor is None:
                descriptor = self._open(path, direct)
                self._descriptors[path, direct] = descriptor
            return descriptor

    def _open(self, path: Path, direct: bool) -> int:
        try:
            descriptor = _open_for_reads(path, direct)
        except FileNotFoundError:
            raise changed_error(path, self._identities[path], None) from None
        now = FileIdentity.of(os.fstat(descriptor))
        if now != self._identities[path]:
            os.close(descriptor)
            raise changed_error(path, self._identities[path], now)
        return descriptor

    def _fall_back(self, reason: str) -> None:
        if self._insist:
            raise ValueError(f"direct=True, but {reason}; use direct=None to allow buffered reads")
        with self._lock:
            if self._buffered_because is not None:
                return  # another thread was first
            # The direct descriptors stay open until close: another thread may be reading from one.
            self._buffered_because = reason
        log.warning(
            "experts are read through the page cache, which is slower and takes memory for a moment: %s",
            reason,
        )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._finalizer()

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def _close_all(descriptors: dict[tuple[Path, bool], int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _split(run: Run, chunk_bytes: int) -> Iterator[Chunk]:
    for begin in range(0, run.nbytes, chunk_bytes):
        nbytes = min(chunk_bytes, run.nbytes - begin)
        yield Chunk(run.path, run.file_offset + begin, nbytes, run.slot_offset + begin)


def _open_for_reads(path: Path, direct: bool) -> int:
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    if direct:
        assert _O_DIRECT is not None
        return os.open(path, flags | _O_DIRECT)
    descriptor = os.open(path, flags)
    if hasattr(os, "posix_fadvise"):
        # Read-ahead past the chunk would stay in the page cache, out of sight of the DONTNEED below.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor


def _read_fully(descriptor: int, target: memoryview, offset: int, needed: int, direct: bool) -> int:
    """Read `needed` bytes or more, up to the length of target. Returns how many, fewer at end of file."""
    done = 0
    while done < needed:
        begin = page_floor(done) if direct else done  # direct reads may resume at a page boundary only
        try:
            count = os.preadv(descriptor, [target[begin:]], offset + begin)
        except InterruptedError:
            continue
        if begin + count <= done:
            break
        done = begin + count
    return done


def _drop_from_page_cache(descriptor: int, chunk: Chunk) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, chunk.file_offset, chunk.nbytes, os.POSIX_FADV_DONTNEED)


def measure_read_bandwidth(
    paths: Sequence[Path], seconds: float = 1.0, chunk_bytes: int = CHUNK_BYTES
) -> float:
    """Bytes per second of direct reads at random places of the files, for about that many seconds.

    Falls back to buffered reads (of pages dropped from the cache first) where direct ones are refused.
    """
    sizes = {path: path.stat().st_size for path in paths}
    readable = [path for path, nbytes in sizes.items() if nbytes]
    if not readable:
        raise ValueError(
            f"nothing to measure: {[str(path) for path in paths]} hold no bytes; give weight files"
        )
    for direct in (True, False) if _O_DIRECT is not None else (False,):
        descriptors: dict[tuple[Path, bool], int] = {}
        try:
            for path in readable:
                descriptors[path, direct] = _open_for_reads(path, direct)
            places = [(descriptors[path, direct], sizes[path]) for path in readable]
            return _random_reads_per_second(places, direct, seconds, page_ceil(chunk_bytes))
        except OSError as error:
            if not direct or error.errno not in _REFUSALS:
                raise
        finally:
            _close_all(descriptors)
    raise AssertionError("unreachable: the buffered pass returns or raises")


def _random_reads_per_second(
    places: list[tuple[int, int]], direct: bool, seconds: float, chunk_bytes: int
) -> float:
    target = aligned_buffer(chunk_bytes).numpy().data
    draw = random.Random(0)
    weights = [nbytes for _, nbytes in places]
    total = 0
    elapsed = 0.0
    while elapsed < seconds or not total:
        descriptor, file_bytes = draw.choices(places, weights)[0]
        offset = draw.randrange(max(1, (file_bytes - chunk_bytes) // PAGE + 1)) * PAGE
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, chunk_bytes, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        count = _read_fully(descriptor, target, offset, min(chunk_bytes, file_bytes - offset), direct)
        elapsed += time.perf_counter() - begin
        if not count:
            raise OSError(
                errno.EIO, f"no bytes at offset {offset} of a file of {file_bytes}; it was truncated"
            )
        total += count
    return total / elapsed
