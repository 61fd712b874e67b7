"""HostCache: RAM of a given budget in front of a disk, for slots on a device. Itself a store, so that three tiers are
ExpertCache(HostCache(DiskStore)).

The same slot table, plan and policies as the cache above it, asked expert by expert as that cache's loader reads. It
has no thread: whoever reads an expert that is not here brings it here, chunk by chunk, and takes it from here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from expertflow.cache.plan import CachePlan, Load
from expertflow.cache.policies import POLICIES
from expertflow.cache.slots import SlotTable
from expertflow.config import format_bytes
from expertflow.core import ExpertId, MoEShape
from expertflow.store.disk import Chunk
from expertflow.store.layout import Part, Placement
from expertflow.store.pinned import host_pieces, pieces_per_block
from expertflow.store.protocol import ExpertStore, Loan

_MOST_HALF_READ = 4  # experts that wait for the rest of their chunks, with nobody at it


@dataclass(frozen=True, slots=True)
class ExpertChunk(Chunk):
    """A chunk that knows whose it is: experts may share pages, and then chunks, of a file."""

    expert: ExpertId
    index: int  # among the chunks of that expert


@dataclass(slots=True)
class HostStats:
    """Counters since the start. An expert counts when its first chunk is asked for."""

    hits: int = 0
    misses: int = 0
    bytes_from_ram: int = 0
    bytes_from_disk: int = 0


@dataclass(slots=True)
class _Filling:
    """An expert on its way into its slot. Nobody needs to finish it: a prefetch may be called off between chunks."""

    missing: set[int]  # chunks that are not there
    reading: set[int] = field(default_factory=set)  # of those, the ones that somebody reads now
    failed: set[int] = field(default_factory=set)  # of those, the ones that could not be read


class HostCache:
    """Some experts of `source` in RAM, all of them on offer. Thread-safe; owns and closes `source`.

    budget_bytes: RAM for experts; ValueError when not even two fit. pin: page-locked memory, which copies to an
    accelerator need to overlap with computing. policy: one that is told of uses only, since nobody predicts here.
    """

    def __init__(
        self, source: ExpertStore, shape: MoEShape, budget_bytes: int, *, policy: str = "lru", pin: bool
    ) -> None:
        assert not POLICIES[policy].looks_ahead, f"{policy} waits for forecasts that nobody makes here"
        per_block = host_slots(budget_bytes, source.slot_bytes, shape.num_experts, pin)
        num_slots = sum(per_block)
        self.source = source
        self.experts: Mapping[ExpertId, tuple[Part, ...]] = source.experts
        self.slot_bytes: int = source.slot_bytes
        self.pinned = pin
        self.table = SlotTable(num_slots)
        self.plan = CachePlan(self.table, POLICIES[policy](shape, num_slots))
        self.stats = HostStats()
        self._slots: list[Tensor] = host_pieces(per_block, self.slot_bytes, pin)
        self._nbytes: dict[tuple[ExpertId, int], int] = {}  # what reading a chunk has brought
        self._filling: dict[ExpertId, _Filling] = {}
        self._condition = threading.Condition()
        self._closed = False

    @property
    def num_slots(self) -> int:
        return self.table.num_slots

    @property
    def io_mode(self) -> str:
        held = f"ram for {self.num_slots} experts{' (pinned)' if self.pinned else ''}"
        return f"{held}, else {self.source.io_mode}"

    def placement(self, expert: ExpertId) -> Placement:
        return self.source.placement(expert)

    def chunks(self, expert: ExpertId) -> tuple[ExpertChunk, ...]:
        return tuple(
            ExpertChunk(chunk.path, chunk.file_offset, chunk.nbytes, chunk.slot_offset, expert, index)
            for index, chunk in enumerate(self.source.chunks(expert))
        )

    def read_chunk(self, chunk: Chunk, buffer: Tensor) -> int:
        """From RAM, or from the source by way of RAM; past it when every slot is in use. Raises its errors."""
        loan = self.lend_chunk(chunk)
        if loan is None:
            return self._read_past(chunk, buffer)
        try:
            count = loan.bytes.numel()
            buffer[chunk.slot_offset : chunk.slot_offset + count].copy_(loan.bytes)
            return count
        finally:
            loan.close()

    def lend_chunk(self, chunk: Chunk) -> Loan | None:
        """As protocol.py says. The expert keeps its slot until the loan is closed."""
        assert isinstance(chunk, ExpertChunk), f"{chunk} is no chunk of this store's"
        expert, index = chunk.expert, chunk.index
        with self._condition:
            slot = self._pin(expert, index)
            if slot is None:
                return None
            try:
                count = self._bring(expert, index, slot)
            except BaseException:
                self._unpin(expert)
                raise
        offset = self.source.chunks(expert)[index].slot_offset
        return Loan(self._slots[slot][offset : offset + count], lambda: self._return(expert))

    def _pin(self, expert: ExpertId, index: int) -> int | None:
        """The slot that the expert has or gets, pinned; None when it has none and gets none."""
        if self._closed:
            raise ValueError(f"the store was closed; open the checkpoint again to read {expert}")
        if index > 0:
            slot = self.table.lookup(expert)
            if slot is not None:  # else it has gone since its first chunk: not worth a slot
                self.table.pin(expert)
            return slot
        if self.table.is_ready(expert):
            self.stats.hits += 1
        if self.table.lookup(expert) is None:
            self._abandon_stale()
        opened = self.plan.open_layer(expert.layer, [expert])
        for action in opened.actions:
            assert isinstance(action, Load), f"{action} of a plan that prefetches nothing"
            self.stats.misses += 1
            self._filling[expert] = _Filling(set(range(len(self.source.chunks(expert)))))
        if self.table.lookup(expert) is None:
            self.plan.withdraw([expert])
        return self.table.lookup(expert)

    def _bring(self, expert: ExpertId, index: int, slot: int) -> int:
        """Have the chunk in the slot, by reading it or by waiting for who reads it; its bytes."""
        while (filling := self._filling.get(expert)) is not None and index in filling.missing:
            if index in filling.reading:
                self._condition.wait()
                continue
            filling.reading.add(index)
            try:
                with self._unlocked():
                    count = self.source.read_chunk(self.source.chunks(expert)[index], self._slots[slot])
            except BaseException:
                filling.failed.add(index)
                raise
            finally:
                filling.reading.remove(index)
                self._condition.notify_all()
            self._nbytes[expert, index] = count
            self.stats.bytes_from_disk += count
            filling.missing.remove(index)
            filling.failed.discard(index)
            if not filling.missing:
                del self._filling[expert]
                self.plan.load_finished(expert)
            return count
        count = self._nbytes[expert, index]
        self.stats.bytes_from_ram += count
        return count

    def _unpin(self, expert: ExpertId) -> None:
        self.plan.release(expert)
        filling = self._filling.get(expert)
        if filling is not None and filling.failed and not self.table.is_pinned(expert):
            self._abandon(expert)

    def _abandon(self, expert: ExpertId) -> None:
        del self._filling[expert]
        self.plan.load_abandoned(expert)

    def _abandon_stale(self) -> None:
        """Give back slots of experts that nobody holds and whose reader went elsewhere between two chunks.

        A few may stay half read, the latest: a demand went first, and their reader comes back.
        """
        stale = [expert for expert in self._filling if not self.table.is_pinned(expert)]
        for expert in stale[: max(0, len(stale) - min(_MOST_HALF_READ, self.num_slots // 8))]:
            self._abandon(expert)

    def _return(self, expert: ExpertId) -> None:
        with self._condition:
            self._unpin(expert)

    def _read_past(self, chunk: Chunk, buffer: Tensor) -> int:
        assert isinstance(chunk, ExpertChunk)
        source_chunk = replace(self.source.chunks(chunk.expert)[chunk.index], slot_offset=chunk.slot_offset)
        count = self.source.read_chunk(source_chunk, buffer)
        with self._condition:
            self.stats.misses += chunk.index == 0
            self.stats.bytes_from_disk += count
        return count

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        self._condition.release()
        try:
            yield
        finally:
            self._condition.acquire()

    def close(self) -> None:
        """After the last read; loans that are still open stay valid."""
        with self._condition:
            self._closed = True
        self.source.close()


def host_slots(budget_bytes: int, slot_bytes: int, num_experts: int, pin: bool) -> list[int]:
    """Slots in each block of memory, for all that fits. ValueError when fewer than two do."""
    if pin:
        per_block = pieces_per_block(budget_bytes, slot_bytes, num_experts)
    else:
        per_block = [min(num_experts, budget_bytes // slot_bytes)]
    if sum(per_block) < 2:
        raise ValueError(
            f"host_memory of {format_bytes(budget_bytes)} holds {sum(per_block)} experts of {format_bytes(slot_bytes)} "
            f"each, and two must fit; give more, or leave it out to read every expert from the disk"
        )
    return per_block
