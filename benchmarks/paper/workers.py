"""Parts of an item in several processes. Those that are counted or simulated take one core each, and no clock."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks.paper.item import Item, Mode, Part, Say, Settings

_queue: Any = None  # of a worker: what it says, to be said by who started it


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_share(item: Item) -> bool:
    """Whether its parts may be made side by side: they take no clock, and a worker finds them by name."""
    from benchmarks.paper.items import ITEMS

    return item.mode != "measured" and item in ITEMS


def made_together(
    item: Item, settings: Settings, parts: Sequence[Part], say: Say, jobs: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and what came of it, of each part as soon as it is there. item: one that can share.

    Raises what a part raises; then, and when it is left early, the workers are stopped where they are.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    queue = context.SimpleQueue()
    speaker = threading.Thread(target=_speak, args=(queue, say), daemon=True)
    speaker.start()
    pool = ProcessPoolExecutor(min(jobs, len(parts)), context, _begin, (queue,))
    try:
        futures = {pool.submit(_make, item.name, item.mode, settings, part.key): part.key for part in parts}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        queue.put(None)
        speaker.join()


def _speak(queue: Any, say: Say) -> None:
    while (text := queue.get()) is not None:
        say(text)


def _begin(queue: Any) -> None:
    global _queue
    _queue = queue
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this, who ends it


def _make(name: str, mode: Mode, settings: Settings, key: str) -> dict[str, Any]:
    # Parts are closures: they are made anew here, and found by their key.
    from benchmarks.paper.items import ITEMS

    item = next(item for item in ITEMS if (item.name, item.mode) == (name, mode))
    part = next(part for part in item.parts(settings) if part.key == key)
    return part.made(_queue.put)
