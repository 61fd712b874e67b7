"""Page-aligned memory for direct reads, as torch tensors."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


def aligned_buffer(nbytes: int) -> Tensor:
    """Zeroed uint8 tensor of nbytes on a page boundary; pages cost memory only once touched.

    The memory goes back to the system with the last tensor that shares it.
    """
    assert nbytes > 0, nbytes
    # mmap's default is a shared mapping, which never gets huge pages and is counted as shmem.
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them; only speed is lost
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
