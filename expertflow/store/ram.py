"""RamStore: every expert read once from another store and kept in RAM, pinned for an accelerator.

The same interface as DiskStore; only where the bytes come from differs, and a slot filled from here is
equal to one filled from disk. `resident` shows an expert's bytes in place, for copies to a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from expertflow.core import ExpertId
from expertflow.store.disk import Chunk, DiskStore
from expertflow.store.layout import Part, Placement, aligned_buffer
from expertflow.store.pinned import pinned_block
from expertflow.store.protocol import Loan

# Pinned allocations are rounded up to a power of two, so one per expert would waste up to half.
_PINNED_BLOCK_BYTES = 256 << 20


class RamStore:
    """All experts of `source` in RAM. Thread-safe. The source may be closed afterwards.

    pin: page-locked memory, which device copies need to overlap with computing; None pins when an
    accelerator is available. progress: called with (bytes so far, bytes in all) after each expert.
    """

    def __init__(
        self,
        source: DiskStore,
        *,
        pin: bool | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        available = torch.accelerator.is_available()
        if pin and not available:
            raise ValueError("pin=True needs an accelerator, and torch sees none; use pin=None or False")
        self.pinned: bool = available if pin is None else pin
        self.experts: Mapping[ExpertId, tuple[Part, ...]] = source.experts
        self.slot_bytes: int = source.slot_bytes
        self._placements = {expert: source.placement(expert) for expert in self.experts}
        self._chunks = {expert: source.chunks(expert) for expert in self.experts}
        self.nbytes: int = sum(placement.nbytes for placement in self._placements.values())
        self._resident: dict[ExpertId, Tensor] = {}
        # Experts may share pages, and then a chunk: whichever expert comes last, the bytes are the same.
        self._bytes_of_chunk: dict[Chunk, Tensor] = {}
        done = 0
        for expert, home in zip(self.experts, self._homes(), strict=True):
            for chunk in self._chunks[expert]:
                count = source.read_chunk(chunk, home)
                self._bytes_of_chunk[chunk] = home[chunk.slot_offset : chunk.slot_offset + count]
            self._resident[expert] = home
            done += home.numel()
            if progress is not None:
                progress(done, self.nbytes)

    def _homes(self) -> Iterator[Tensor]:
        """A page-aligned piece of memory for each expert, in order."""
        block = torch.empty(0, dtype=torch.uint8)
        used = 0
        if not self.pinned and self.nbytes:
            block = aligned_buffer(self.nbytes)  # untouched pages cost nothing
        for expert in self.experts:
            nbytes = self._placements[expert].nbytes
            if used + nbytes > block.numel():
                block, used = pinned_block(max(nbytes, _PINNED_BLOCK_BYTES)), 0
            yield block[used : used + nbytes]
            used += nbytes

    @property
    def io_mode(self) -> str:
        return "ram (pinned)" if self.pinned else "ram"

    def placement(self, expert: ExpertId) -> Placement:
        return self._placements[expert]

    def chunks(self, expert: ExpertId) -> tuple[Chunk, ...]:
        return self._chunks[expert]

    def resident(self, expert: ExpertId) -> Tensor:
        """The expert's bytes as `placement` describes them, not a copy: never write to it."""
        return self._resident[expert]

    def lend_chunk(self, chunk: Chunk) -> Loan:
        return Loan(self._bytes(chunk), _keep)

    def read_chunk(self, chunk: Chunk, buffer: Tensor) -> int:
        source = self._bytes(chunk)
        count = source.numel()
        buffer[chunk.slot_offset : chunk.slot_offset + count].copy_(source)
        return count

    def _bytes(self, chunk: Chunk) -> Tensor:
        if not self._resident:
            raise ValueError(f"the store was closed; open the checkpoint again to read {chunk.path}")
        return self._bytes_of_chunk[chunk]

    def close(self) -> None:
        self._resident.clear()
        self._bytes_of_chunk.clear()

    def __enter__(self) -> RamStore:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def _keep() -> None:
    """A loan of what stays anyway ends."""
