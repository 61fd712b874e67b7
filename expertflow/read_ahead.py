"""Asking the kernel for dense weights, and for memory to put them, before anybody needs them.

Hints only: nothing waits, nothing can fail.

Imports no torch, so that a command may call `read_early` before its imports: those take seconds, and the disk
is idle meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import operator
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from expertflow.budget import free_bytes, process_bytes
from expertflow.early_memory import EARLY

PIECE_BYTES = 128 << 10  # Linux cuts a longer wish to the device's read-ahead, often this, and drops the rest
MOST_BYTES = 4 << 30  # of dense weights; what the page cache drops again would be read twice
_BUFFERS_BYTES = (
    1 << 20
)  # what a model holds beside its weights: tables of rotary angles, each on a page of its own
_EXPERT = re.compile(r"(^|\.)experts\.")  # and not shared_experts


def read_early(folder: Path) -> threading.Thread | None:
    """Start reading what looks like dense weights in a folder's safetensors files. None: nothing to ask for.

    And start getting as much memory, unless the machine has little.

    Names decide, since the model is not known yet; a wrong guess costs a read. Anything odd about a file is
    left for store/checkpoint.py to complain about.
    """
    if not hasattr(os, "posix_fadvise") or not folder.is_dir():
        return None
    thread = threading.Thread(target=_read_folder, args=(folder,), name="expertflow-read-early", daemon=True)
    thread.start()
    return thread


def will_need(path: Path, places: Iterable[tuple[int, int]]) -> None:
    """Ask for (offset, length) places in a file. Asking takes time with the disk's: have a thread do it."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for offset, nbytes in places:
            for begin in range(offset, offset + nbytes, PIECE_BYTES):
                length = min(PIECE_BYTES, offset + nbytes - begin)
                os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)


def _read_folder(folder: Path) -> None:
    places = {path: _dense_places(path) for path in sorted(folder.glob("*.safetensors"))}
    sizes = [nbytes for found in places.values() for _, nbytes in found]
    if sum(sizes) <= min(MOST_BYTES, (free_bytes() - process_bytes()) // 2):
        EARLY.begin(sum(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for nbytes in sizes) + _BUFFERS_BYTES)
    left = MOST_BYTES
    for path, found in places.items():
        left -= sum(nbytes for _, nbytes in found)
        if left < 0:
            return
        will_need(path, found)


def _dense_places(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of each tensor that is no expert by its name and no stack of them by its shape."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > 100 << 20:
                return []
            header = json.loads(file.read(length))
        places = []
        for key, entry in header.items():
            if key != "__metadata__" and len(entry["shape"]) < 3 and not _EXPERT.search(key):
                begin, end = map(operator.index, entry["data_offsets"])
                if not 0 <= begin <= end <= size - 8 - length:
                    return []
                places.append((8 + length + begin, end - begin))
        return places
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return []
