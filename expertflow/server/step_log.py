"""What the last steps of the engine did: written by the thread that steps, read by whoever shows it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from expertflow.cache.expert_cache import ExpertCache
from expertflow.engine.engine import Engine

_KEPT = 4096
WINDOW_SECONDS = 2.0


class StepRecord(NamedTuple):
    """began: time.monotonic. rows: sequences that got a token in it, prompts just read not counted."""

    began: float
    seconds: float
    rows: int
    tokens: int
    stall_seconds: float
    load_bytes: int


class StepLog:
    """The newest steps, and the rates over the last of them."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self._steps: deque[StepRecord] = deque(maxlen=_KEPT)

    @contextmanager
    def step(self, engine: Engine, cache: ExpertCache) -> Iterator[None]:
        """Record what happens within. Costs some microseconds."""
        stats, before = engine.stats, cache.traffic()
        rows, tokens = stats.decode_rows, stats.generated_tokens
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        stats, after = engine.stats, cache.traffic()
        self._steps.append(
            StepRecord(
                began,
                seconds,
                stats.decode_rows - rows,
                stats.generated_tokens - tokens,
                after.stall_seconds - before.stall_seconds,
                after.bytes_read - before.bytes_read,
            )
        )

    def newest(self, most: int) -> list[StepRecord]:
        """In order of time. From any thread: a copy of a deque is made in one go."""
        return list(self._steps)[-most:]

    def recent(self, now: float) -> list[StepRecord]:
        """Steps that ended within the window."""
        return [step for step in list(self._steps) if step.began + step.seconds > now - WINDOW_SECONDS]
