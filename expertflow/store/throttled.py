"""ThrottledStore: another store behind a link of a given bandwidth, to see how a model would run over it.

It owns no bytes. A read takes as long as its bytes would take over the link, or as long as the inner store
takes where that is slower. Over a RAM store nothing else is in the way, so link-bound behaviour can be timed
without the noise of a disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from expertflow.config import format_bandwidth
from expertflow.store.protocol import ExpertStore

if TYPE_CHECKING:
    from expertflow.core import ExpertId
    from expertflow.store.disk import Chunk
    from expertflow.store.layout import Part, Placement

# A reader that has more to read asks again within microseconds, and within this even on a busy machine.
_BACK_TO_BACK_S = 1e-3


class ThrottledStore:
    """`inner` over a link of bytes_per_second. Thread-safe; readers at the same time share the link in turn.

    A read ends when its bytes have crossed, counted from when the link was free or, if that was before the read
    began, from then. Sleeping ends late by 50 to 100 us, as much as a small expert takes; what one sleep was late,
    the next read makes up for if it follows at once, so that n reads take the time of their bytes and one delay.
    clock, sleep: for tests.
    """

    def __init__(
        self,
        inner: ExpertStore,
        bytes_per_second: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not 0 < bytes_per_second < float("inf"):
            raise ValueError(
                f"a link of {bytes_per_second} bytes per second carries nothing; give a finite number above 0"
            )
        self.inner = inner
        self.bytes_per_second = bytes_per_second
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free_at = -float("inf")  # when the link has carried all that was asked for
        self._late_s = 0.0  # what the last sleep was late and nobody has made up for yet
        self._returned_at = -float("inf")

    @property
    def experts(self) -> Mapping[ExpertId, tuple[Part, ...]]:
        return self.inner.experts

    @property
    def slot_bytes(self) -> int:
        return self.inner.slot_bytes

    @property
    def io_mode(self) -> str:
        return f"{self.inner.io_mode}, held to {format_bandwidth(self.bytes_per_second)}"

    def placement(self, expert: ExpertId) -> Placement:
        return self.inner.placement(expert)

    def chunks(self, expert: ExpertId) -> tuple[Chunk, ...]:
        return self.inner.chunks(expert)

    def read_chunk(self, chunk: Chunk, buffer: Tensor) -> int:
        began = self._clock()
        count = self.inner.read_chunk(chunk, buffer)
        with self._lock:
            late_s = self._late_s if began - self._returned_at < _BACK_TO_BACK_S else 0.0
            self._free_at = max(self._free_at, began - late_s) + count / self.bytes_per_second
            arrived_at = self._free_at
        now = read_at = self._clock()
        while now < arrived_at:
            self._sleep(arrived_at - now)
            now = self._clock()
        with self._lock:
            # Only sleeping is made up for. An inner store that is slower than the link stays slower.
            self._late_s = now - arrived_at if read_at < arrived_at else min(late_s, now - arrived_at)
            self._returned_at = now
        return count

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> ThrottledStore:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()
