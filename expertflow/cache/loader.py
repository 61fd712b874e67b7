"""Loader: the only place with a thread for I/O. It copies experts from a store into slots.

Loads are cut in chunks of a few MiB. Between two chunks the thread looks for a demand load, so a
demand waits for at most one chunk of a prefetch, never for a whole expert. One thread is enough: it
saturates the disks we measured and leaves the cores to arithmetic. How bytes get to a slot is device.py's
business; on an accelerator a load is finished when its copies are queued.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from expertflow.cache.device import HostDevice, SlotDevice
from expertflow.cache.touching import TouchAhead
from expertflow.core import ExpertId
from expertflow.store.disk import Chunk
from expertflow.store.layout import Placement, copy_parts, page_ceil, place_packed
from expertflow.store.protocol import ExpertStore
from expertflow.timeline import Timeline


class SlotMemory:
    """The bytes of all slots, one page-aligned allocation, and the typed views of each resident.

    dtype: what the weights are multiplied in. Where it is the checkpoint's, an expert lies in its slot
    exactly as a direct read leaves it. Where it differs, and on an accelerator, it is packed on its way in: cast,
    each tensor at a round address, which matrix kernels there ask for, and without the rest of its pages.
    """

    def __init__(
        self,
        store: ExpertStore,
        num_slots: int,
        dtype: torch.dtype | None = None,
        device: SlotDevice | None = None,
    ):
        self.store = store
        self.dtype = dtype
        self.device: SlotDevice = HostDevice() if device is None else device
        self.packs = is_packed(store, dtype, self.device.queues)
        self._packed: dict[ExpertId, Placement] = {}
        self.slot_bytes = slot_bytes(store, dtype, self.device.queues)
        self._memory = self.device.allocate(num_slots * self.slot_bytes)
        self._touch = None if self.device.queues else TouchAhead(self._memory)

    def slot(self, index: int) -> Tensor:
        """uint8[slot_bytes] on a page boundary."""
        return self._memory.narrow(0, index * self.slot_bytes, self.slot_bytes)

    def will_be_filled(self, slot: int) -> None:
        """The slot's next load begins. By the thread of the loader."""
        if self._touch is not None:
            self._touch.reading_until((slot + 1) * self.slot_bytes)

    def close(self) -> None:
        """After the last load: nobody touches the memory when this returns."""
        if self._touch is not None:
            self._touch.close()
        self.device.close()

    def placement(self, expert: ExpertId) -> Placement:
        """How this expert lies in any slot. A function of the checkpoint and dtype alone, so that an
        expert has the same alignment, hence the same last bits in its products, wherever it lands."""
        if not self.packs:
            return self.store.placement(expert)
        if expert not in self._packed:
            self._packed[expert] = place_packed(self.store.experts[expert], self.dtype)
        return self._packed[expert]

    def pack(self, expert: ExpertId, raw_bytes: Tensor, slot: int) -> None:
        """Fill a slot from all chunks of the expert. raw_bytes: on the device, laid out as the store leaves it."""
        raw, packed = self.store.placement(expert), self.placement(expert)
        self.device.write_slot(
            slot, lambda: copy_parts(raw_bytes, raw, self.slot(slot), packed, non_blocking=True)
        )


def _needs_packing(parts: tuple, dtype: torch.dtype | None) -> bool:
    return any(
        (dtype is not None and part.dtype.is_floating_point and part.dtype != dtype)
        or part.offset % part.dtype.itemsize
        for part in parts
    )


def is_packed(store: ExpertStore, dtype: torch.dtype | None, on_accelerator: bool) -> bool:
    """Whether experts are rearranged on their way into a slot, rather than left as they are read."""
    return on_accelerator or any(_needs_packing(parts, dtype) for parts in store.experts.values())


def slot_bytes(store: ExpertStore, dtype: torch.dtype | None, on_accelerator: bool = False) -> int:
    """Bytes of one slot when weights are kept in `dtype` (None: as stored)."""
    if not is_packed(store, dtype, on_accelerator):
        return store.slot_bytes
    return page_ceil(max(place_packed(parts, dtype).nbytes for parts in store.experts.values()))


@dataclass(slots=True)
class _Job:
    expert: ExpertId
    slot: int
    chunks: tuple[Chunk, ...]
    next_chunk: int = 0
    nbytes: int = 0
    read_seconds: float = 0.0
    staging: Tensor | None = field(default=None, repr=False)


Finished = Callable[[ExpertId, int, float, BaseException | None], None]


class Loader:
    """A thread that performs loads, urgent ones first, each kind in the order given.

    Every method is called with `condition` held; `finished(expert, nbytes, seconds, error)` is called
    by the thread with `condition` held. A failed load does not stop the thread.
    """

    def __init__(self, memory: SlotMemory, condition: threading.Condition, finished: Finished):
        self.memory = memory
        self.condition = condition
        self._finished = finished
        self._urgent: OrderedDict[ExpertId, _Job] = OrderedDict()
        self._prefetch: OrderedDict[ExpertId, _Job] = OrderedDict()
        self._closed = False
        self._ended = False  # the thread touches neither slots nor books any more
        self.timeline: Timeline | None = None
        self.died_of: BaseException | None = None  # set when a bug of ours ended the thread
        # Packing needs the bytes as stored beside the slot. Two, since a demand may overtake a prefetch.
        # No third load is ever begun: urgent ones are done one by one, and prefetches wait for all of them.
        buffers = 2 if memory.packs else 0
        self._staging = [memory.device.allocate(memory.store.slot_bytes) for _ in range(buffers)]
        self.forked: Callable[[], None] | None = (
            None  # asked in a child process before anything else happens there
        )
        self._thread: threading.Thread | None = None
        self._start()
        _living.add(self)

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="expertflow-loader", daemon=True)
            self._thread.start()

    @property
    def staging_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._staging)

    @property
    def idle(self) -> bool:
        return not self._urgent and not self._prefetch

    def submit(self, expert: ExpertId, slot: int, urgent: bool) -> None:
        queue = self._urgent if urgent else self._prefetch
        chunks = self.memory.store.chunks(expert)
        assert chunks, f"{expert} has no bytes to load"
        self.memory.device.give_away(slot)
        queue[expert] = _Job(expert, slot, chunks)
        self._start()
        self.condition.notify_all()

    def promote(self, expert: ExpertId) -> None:
        """Make a prefetch urgent, keeping what it has read so far."""
        job = self._prefetch.pop(expert, None)
        if job is not None:
            self._urgent[expert] = job
            self._start()

    def cancel(self, expert: ExpertId) -> bool:
        """Drop a prefetch of which no byte was asked for yet; True when dropped."""
        job = self._prefetch.get(expert)
        if job is None or job.next_chunk > 0 or job.staging is not None:
            return False
        del self._prefetch[expert]
        return True

    def close(self) -> None:
        """Stop after the chunk in flight, and return when no more bytes can come.

        By any thread, also one that holds `condition` already: the garbage collector may run the finalizer of a model
        in the midst of anything. So it is the condition that is waited for first, which gives the lock back.
        """
        with self.condition:
            self._closed = True
            self.condition.notify_all()
            thread = self._thread
            while thread not in (None, threading.current_thread()) and not self._ended:
                self.condition.wait()
        if thread is not None and thread is not threading.current_thread():
            thread.join()  # it needs the lock no more
        self.memory.close()

    def begin_anew(self) -> None:
        """In a process that was forked: the thread did not come along, nor what it was about to read.

        A new one begins with the next load, since most children never need one.
        """
        if self.forked is not None:
            self.forked()
        if self._ended:
            return
        for job in (*self._urgent.values(), *self._prefetch.values()):
            job.next_chunk = job.nbytes = 0
            if job.staging is not None:
                self._staging.append(job.staging)
                job.staging = None
        self._thread = None
        if self._urgent:
            self._start()

    def _run(self) -> None:
        try:
            self._perform_loads()
        except BaseException as error:  # a bug of ours; without this a layer would wait for ever
            self.died_of = error
            raise
        finally:
            with self.condition:
                self._ended = True
                self.condition.notify_all()

    def _perform_loads(self) -> None:
        while True:
            with self.condition:
                while self.idle and not self._closed:
                    self.condition.wait()
                if self._closed:
                    return
                queue = self._urgent or self._prefetch
                job = next(iter(queue.values()))
                chunk = job.chunks[job.next_chunk]
                # From here on cancel() refuses: the slot is being written.
                job.next_chunk += 1
                if self.memory.packs and job.staging is None:
                    job.staging = self._staging.pop()
            if job.next_chunk == 1:
                self.memory.will_be_filled(job.slot)
            error: BaseException | None = None
            started = time.perf_counter()
            try:
                target = self.memory.slot(job.slot) if job.staging is None else job.staging
                job.nbytes += self.memory.device.read_chunk(self.memory.store, chunk, target)
                if job.staging is not None and job.next_chunk == len(job.chunks):
                    self.memory.pack(job.expert, job.staging, job.slot)
            except BaseException as caught:  # whatever it is, the layer that waits must hear of it
                error = caught
            ended = time.perf_counter()
            job.read_seconds += ended - started
            if self.timeline is not None:
                urgent = job.expert in self._urgent
                layer, number = job.expert
                self.timeline.add("link", f"{number} of layer {layer}", started, ended, urgent=urgent)
            if error is not None or job.next_chunk == len(job.chunks):
                with self.condition:
                    if (
                        self._closed
                    ):  # nobody reads it; whoever closed may be in the midst of changing the books
                        return
                    # promote() may have moved it meanwhile.
                    self._urgent.pop(job.expert, None)
                    self._prefetch.pop(job.expert, None)
                    if job.staging is not None:
                        self._staging.append(job.staging)
                    self._finished(job.expert, job.nbytes, job.read_seconds, error)
                    self.condition.notify_all()


# A fork copies memory and locks as they are, and of the threads only the one that forks: so no lock is to be held by
# another at that moment, and in the child each loader gets a thread of its own.
_living: weakref.WeakSet[Loader] = weakref.WeakSet()
_held: list[Loader] = []


def _before_fork() -> None:
    for loader in list(_living):
        loader.condition.acquire()
        _held.append(loader)


def _after_fork(in_child: bool) -> None:
    while _held:
        loader = _held.pop()
        try:
            if in_child:
                loader.begin_anew()
        finally:
            loader.condition.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=partial(_after_fork, in_child=False),
        after_in_child=partial(_after_fork, in_child=True),
    )
