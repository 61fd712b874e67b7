"""What every benchmark needs: a cold page cache, a memory cgroup, and an honest report.

Nothing here decides a result.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

console = Console(stderr=True)
GIB = 2**30


def drop_from_page_cache(folder: Path) -> None:
    """Forget cached pages of a checkpoint, so that a run starts cold."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure_fresh_memory(nbytes: int = GIB) -> float:
    """Bytes per second of memory that nobody had before: found and cleared by the kernel, and by its host if virtual.

    Waits first: a host takes free memory back within seconds (Linux' free page reporting), as before any first run.
    """
    time.sleep(5)
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.madvise(mmap.MADV_HUGEPAGE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        started = time.perf_counter()
        ctypes.memset(begin, 0, nbytes)
        return nbytes / (time.perf_counter() - started)


class MemoryCgroup:
    """A memory cgroup of our own (v1 or v2), or None of the above: then `available` is False."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.folder: Path | None = None
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        for root, limit_file in ((v1, "memory.limit_in_bytes"), (v2, "memory.max")):
            folder = root / f"expertflow-bench-{os.getpid()}"
            try:
                folder.mkdir()
                (folder / limit_file).write_text(str(limit_bytes))
            except OSError:
                if folder.exists():
                    folder.rmdir()
                continue
            self.folder = folder
            break

    @property
    def available(self) -> bool:
        return self.folder is not None

    def enter(self) -> None:
        """Move the calling process in (given to Popen's preexec_fn)."""
        assert self.folder is not None
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if self.folder and (self.folder / name).exists():
                return int((self.folder / name).read_text())
        return None

    def remove(self) -> None:
        if self.folder is not None:
            self.folder.rmdir()


@contextmanager
def memory_limit(limit_bytes: int | None) -> Iterator[MemoryCgroup | None]:
    if limit_bytes is None:
        yield None
        return
    group = MemoryCgroup(limit_bytes)
    try:
        yield group
    finally:
        group.remove()


def run_worker(module: str, arguments: list[str], limit_bytes: int | None, threads: int) -> dict[str, Any]:
    """Run `python -m module --worker ...` alone in a cgroup; its last line of output is JSON.

    Adds peak_bytes, limit_bytes, and `error` when it died.
    """
    with memory_limit(limit_bytes) as group:
        enter = group.enter if group is not None and group.available else None
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            preexec_fn=enter,
            check=False,
        )
        peak = group.peak_bytes() if group is not None else None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        tail = done.stderr.strip().splitlines()[-3:]
        return {"error": f"exit status {done.returncode}: {' | '.join(tail)}", "peak_bytes": peak}
    result = json.loads(lines[-1])
    result["peak_bytes"] = peak
    result["limit_bytes"] = limit_bytes
    result["limit_enforced"] = enter is not None
    return result


def other_load() -> float:
    """One-minute load average before we start: above about 0.5, timings are not to be trusted."""
    return os.getloadavg()[0]


def stolen_share() -> float:
    """Share of the processors' time since this module was imported that a hypervisor gave to other machines."""
    now = _processor_ticks()
    total = sum(now) - sum(_TICKS_AT_START)
    return (now[7] - _TICKS_AT_START[7]) / total if total > 0 else 0.0


def _processor_ticks() -> list[int]:
    """user, nice, system, idle, iowait, irq, softirq, steal; zeros where the kernel does not say."""
    try:
        return [int(ticks) for ticks in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    except (OSError, ValueError):
        return [0] * 8


_TICKS_AT_START = _processor_ticks()


def commit() -> str:
    """Of the working copy, with a plus where it holds changes; "unknown" outside one."""
    described = _git("describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+")
    return described or "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stolen_share": round(stolen_share(), 3),
    }


def report(
    name: str,
    metrics: dict[str, Any],
    bounds: dict[str, Any],
    targets: dict[str, Any],
    seed: int,
    json_path: Path | None,
) -> None:
    """Print the JSON object that ends every benchmark, and write it to a file when asked."""
    result = {
        "name": name,
        "commit": commit(),
        "machine": machine(),
        "seed": seed,
        "metrics": metrics,
        "bounds": bounds,
        "targets": targets,
    }
    text = json.dumps(result)
    if json_path is not None:
        partial = json_path.with_suffix(".part")
        partial.write_text(text + "\n")
        partial.rename(json_path)
    print(text)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
