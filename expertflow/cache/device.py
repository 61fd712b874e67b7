"""Devices that slots lie on: how bytes get there, when they may be read, and when overwritten.

In host memory a call that returns has done its work. An accelerator only takes note of it: what is queued on one
stream runs in order, streams among each other do not. Two waits keep that invisible, and the host waits for neither:
the stream that computes waits for the copy into a slot before it reads it, and the copy waits for the products that
read what was there before. No thread starts here, and every call is of torch's device-agnostic API, behind `Streams`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from expertflow.store.disk import Chunk
from expertflow.store.layout import aligned_buffer
from expertflow.store.pinned import pinned_block
from expertflow.store.protocol import ExpertStore, LendingStore, Loan

# Chunks that the link may have before it. One is copied while the next is read or queued; with more, a demand would
# wait behind them, since what is queued on a stream cannot be overtaken.
_MOST_IN_FLIGHT = 2


class SlotDevice(Protocol):
    """Where slots are. For one cache: slots are known by their numbers."""

    torch_device: torch.device

    @property
    def queues(self) -> bool:
        """Calls return before their work is done, so that slots have to be handed out and given away."""
        ...

    def allocate(self, nbytes: int) -> Tensor:
        """uint8[nbytes], at least page-aligned where the device has pages."""
        ...

    def read_chunk(self, store: ExpertStore, chunk: Chunk, target: Tensor) -> int:
        """Bring a chunk to its place in target, a whole slot as `store` fills it. Returns its bytes.

        By the thread of the loader. Raises what the store raises.
        """
        ...

    def write_slot(self, slot: int, write: Callable[[], None]) -> None:
        """Have `write` fill the slot once nobody reads it any more. By the thread of the loader."""
        ...

    def give_away(self, slot: int) -> None:
        """The slot is another expert's from now on: nobody will be told to read the old one. By any thread."""
        ...

    def hand_out(self, slot: int) -> None:
        """The calling thread is about to read the slot, which was written, until it is given away."""
        ...

    def close(self) -> None:
        """Return when nothing queued reads or writes memory of ours. After the last call of the loader."""
        ...


class HostDevice:
    """Slots in host memory, where a product reads what a read has just left there."""

    torch_device = torch.device("cpu")
    queues = False

    def allocate(self, nbytes: int) -> Tensor:
        return aligned_buffer(nbytes)

    def read_chunk(self, store: ExpertStore, chunk: Chunk, target: Tensor) -> int:
        return store.read_chunk(chunk, target)

    def write_slot(self, slot: int, write: Callable[[], None]) -> None:
        write()

    def give_away(self, slot: int) -> None:
        pass

    def hand_out(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


class Streams(Protocol):
    """What AcceleratorDevice asks of torch. Streams and events are torch.Stream and torch.Event, or behave so."""

    def new_stream(self) -> Any: ...

    def current_stream(self) -> Any:
        """The one that the calling thread computes on."""
        ...

    def record(self, stream: Any) -> Any:
        """An event that completes when all that the stream was given so far is done."""
        ...

    def enqueue(self, stream: Any, work: Callable[[], None]) -> None:
        """Give work, which starts copies and kernels, to the stream."""
        ...

    def device_buffer(self, nbytes: int) -> Tensor: ...

    def host_buffer(self, nbytes: int) -> Tensor:
        """Page-aligned host memory that copies to the device may start from while the host goes on."""
        ...


class TorchStreams:
    """Streams of a torch device."""

    def __init__(self, device: torch.device):
        self.device = device

    def new_stream(self) -> torch.Stream:
        return torch.Stream(device=self.device)

    def current_stream(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)

    def record(self, stream: torch.Stream) -> torch.Event:
        event = torch.Event(device=self.device)
        event.record(stream)
        return event

    def enqueue(self, stream: torch.Stream, work: Callable[[], None]) -> None:
        with stream:
            work()

    def device_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host_buffer(self, nbytes: int) -> Tensor:
        return pinned_block(nbytes)


class AcceleratorDevice:
    """Slots on an accelerator, filled by a stream of its own.

    Every copy goes through that one stream. A copy that waits for products holds up those behind it, demands too, but
    not for long: a router's answer is on the host only when all products before it are done, so a demand never finds
    a copy that waits for an earlier layer. The link is given a chunk or two at a time; `read_chunk` waits for the
    chunk before, and a demand overtakes prefetches as it does on a disk.
    """

    queues = True

    def __init__(self, device: torch.device, streams: Streams | None = None):
        self.torch_device = device
        self._streams = streams if streams is not None else TorchStreams(device)
        self._copies = self._streams.new_stream()
        self._in_flight: deque[tuple[Any, Callable[[], None]]] = deque()  # event of a chunk, what to do then
        self._staging: list[Tensor] = []
        self._lock = threading.Lock()
        self._arrived: dict[int, Any] = {}  # by slot: the event of its last write
        self._readers: dict[int, list[Any]] = {}  # by slot: the streams that were let in since
        self._last_reads: dict[int, list[Any]] = {}  # by slot: events that its next write waits for

    def allocate(self, nbytes: int) -> Tensor:
        memory = self._streams.device_buffer(nbytes)
        # torch hands out memory that an earlier product of this stream may still be using.
        self._copies.wait_event(self._streams.record(self._streams.current_stream()))
        return memory

    def read_chunk(self, store: ExpertStore, chunk: Chunk, target: Tensor) -> int:
        while len(self._in_flight) >= _MOST_IN_FLIGHT:
            self._finish_oldest()
        loan = self._borrow(store, chunk)
        place = target[chunk.slot_offset : chunk.slot_offset + loan.bytes.numel()]
        try:
            self._streams.enqueue(self._copies, lambda: _copy(place, loan.bytes))
        finally:
            # Failed or not: part of it may be under way.
            self._in_flight.append((self._streams.record(self._copies), loan.close))
        return loan.bytes.numel()

    def _borrow(self, store: ExpertStore, chunk: Chunk) -> Loan:
        """The chunk's bytes in host memory: where they lie, or read into staging."""
        if isinstance(store, LendingStore) and (lent := store.lend_chunk(chunk)) is not None:
            return lent
        staging = self._staging.pop() if self._staging else self._streams.host_buffer(_chunk_bytes(store))
        try:
            count = store.read_chunk(replace(chunk, slot_offset=0), staging)
        except BaseException:
            self._staging.append(staging)
            raise
        return Loan(staging[:count], lambda: self._staging.append(staging))

    def _finish_oldest(self) -> None:
        event, done = self._in_flight.popleft()
        event.synchronize()
        done()

    def write_slot(self, slot: int, write: Callable[[], None]) -> None:
        self._wait_for_readers(slot)
        self._streams.enqueue(self._copies, write)
        arrived = self._streams.record(self._copies)
        with self._lock:
            self._arrived[slot] = arrived

    def _wait_for_readers(self, slot: int) -> None:
        with self._lock:
            last_reads = self._last_reads.pop(slot, ())
        for event in last_reads:
            self._copies.wait_event(event)

    def give_away(self, slot: int) -> None:
        with self._lock:
            # Not when the reader was done with it: it is enough to ask once per load, and whoever runs this line need
            # not be the thread that computes. The load may yet be cancelled: the events stay for the next one.
            events = [self._streams.record(stream) for stream in self._readers.pop(slot, ())]
            self._last_reads.setdefault(slot, []).extend(events)
            self._arrived.pop(slot, None)

    def hand_out(self, slot: int) -> None:
        stream = self._streams.current_stream()
        with self._lock:
            readers = self._readers.setdefault(slot, [])
            if stream not in readers:
                stream.wait_event(self._arrived[slot])
                readers.append(stream)

    def close(self) -> None:
        with self._lock:
            in_flight, self._in_flight = self._in_flight, deque()
            readers = [stream for streams in self._readers.values() for stream in streams]
            self._readers.clear()
        for stream in [self._copies, *readers]:
            stream.synchronize()
        for _, done in in_flight:
            done()


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _chunk_bytes(store: ExpertStore) -> int:
    return max(chunk.nbytes for expert in store.experts for chunk in store.chunks(expert))
