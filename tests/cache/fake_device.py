"""An accelerator that runs what it was given as late, and in as unfortunate an order, as streams permit.

A stream is first in, first out; streams among each other are not ordered, except by events. Nothing runs until
somebody waits for something, and then a seeded adversary picks the stream that goes on. Memory is ordinary.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from expertflow.cache.device import AcceleratorDevice
from expertflow.store.layout import aligned_buffer

POISON = 0xFF  # as float32, bfloat16 and float16 alike: NaN


class FakeEvent:
    """What a torch.Event is that was recorded once."""

    def __init__(self, device: FakeStreams):
        self._device = device
        self.done = False

    def synchronize(self) -> None:
        self._device.run_until(lambda: self.done)


class FakeStream:
    def __init__(self, device: FakeStreams, name: str):
        self.device, self.name = device, name
        self.queue: deque[FakeEvent | Callable[[], None]] = deque()  # an event in it is waited for

    def wait_event(self, event: FakeEvent) -> None:
        with self.device.lock:
            self.queue.append(event)
        self.device.queued(self)

    def synchronize(self) -> None:
        self.device.run_until(lambda: not self.queue)

    @property
    def can_go_on(self) -> bool:
        return bool(self.queue) and (not isinstance(self.queue[0], FakeEvent) or self.queue[0].done)


class FakeStreams:
    """Streams of a device that the test drives.

    favourite: the stream whose turn it is whenever it can go on ("copies", "compute"), or None for any.
    immediate: products of host code, which are done when their call returns, stand for those of the computing
    stream: it runs at once what it is given, and everything that it waits for.
    """

    def __init__(self, seed: int, favourite: str | None = None, immediate: bool = False):
        self.lock = threading.RLock()
        self.draw = random.Random(seed)
        self.favourite, self.immediate = favourite, immediate
        self.compute = FakeStream(self, "compute")
        self.streams = [self.compute]
        self._current = threading.local()
        self.host_buffers: list[Tensor] = []

    def new_stream(self, name: str = "copies") -> FakeStream:
        self.streams.append(FakeStream(self, name))
        return self.streams[-1]

    def current_stream(self) -> FakeStream:
        return getattr(self._current, "stream", self.compute)

    @contextmanager
    def using(self, stream: FakeStream) -> Iterator[None]:
        """As `with torch.Stream`, for the calling thread."""
        self._current.stream = stream
        try:
            yield
        finally:
            del self._current.stream

    def record(self, stream: FakeStream) -> FakeEvent:
        event = FakeEvent(self)

        def complete() -> None:
            event.done = True

        self.enqueue(stream, complete)
        return event

    def enqueue(self, stream: FakeStream, work: Callable[[], None]) -> None:
        with self.lock:
            stream.queue.append(work)
        self.queued(stream)

    def queued(self, stream: FakeStream) -> None:
        if self.immediate and stream is self.compute:
            stream.synchronize()

    def device_buffer(self, nbytes: int) -> Tensor:
        """As torch gives it: what used it before may not be done yet, here a kernel that writes NaN."""
        buffer = aligned_buffer(nbytes)
        self.enqueue(self.current_stream(), lambda: poison(buffer))
        return buffer

    def host_buffer(self, nbytes: int) -> Tensor:
        self.host_buffers.append(aligned_buffer(nbytes))
        return self.host_buffers[-1]

    def run_until(self, done: Callable[[], bool]) -> None:
        with self.lock:
            while not done():
                able = [stream for stream in self.streams if stream.can_go_on]
                assert able, "every stream waits for another"
                favoured = [stream for stream in able if stream.name == self.favourite]
                stream = self.draw.choice(favoured or able)
                work = stream.queue.popleft()
                if not isinstance(work, FakeEvent):
                    work()

    def synchronize(self) -> None:
        self.run_until(lambda: not any(stream.queue for stream in self.streams))


class PoisoningDevice(AcceleratorDevice):
    """Leaves NaN in a slot from when it may be overwritten until it is."""

    slot: Callable[[int], Tensor]  # set once the cache has its memory

    def _wait_for_readers(self, slot: int) -> None:
        super()._wait_for_readers(slot)
        self._streams.enqueue(self._copies, lambda: poison(self.slot(slot)))


def poison(buffer: Tensor) -> None:
    buffer.fill_(POISON)


def fake_device(streams: FakeStreams) -> PoisoningDevice:
    return PoisoningDevice(torch.device("cpu"), streams)
