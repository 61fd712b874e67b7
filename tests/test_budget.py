"""What a process may use, by what the machine and its memory cgroup say."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertflow import budget

GIB = 2**30


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A memory cgroup in a folder: write(limit, usage, stat) makes it the only one there is."""

    def write(folder: str, limit_file: str, usage_file: str, limit: str, usage: int, stat: str) -> None:
        at = tmp_path / folder
        at.mkdir(exist_ok=True)
        for name, text in ((limit_file, limit), (usage_file, str(usage)), ("memory.stat", stat)):
            (at / name).write_text(text)

    class Redirected(type(Path())):
        def __new__(cls, *parts):
            first = str(parts[0]) if parts else ""
            if first.startswith("/sys/fs/cgroup"):
                parts = (str(tmp_path) + first.removeprefix("/sys/fs/cgroup"), *parts[1:])
            return Path(*parts)

    monkeypatch.setattr(budget, "Path", Redirected)
    monkeypatch.setattr(budget, "process_bytes", lambda: 0)
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: type("", (), {"available": 100 * GIB}))
    return write


def test_files_in_the_page_cache_of_the_group_are_free(group):
    stat = f"anon {2 * GIB}\ninactive_file {3 * GIB}\nactive_file {GIB}\n"
    group(".", "memory.max", "memory.current", str(10 * GIB), 6 * GIB, stat)
    assert budget.free_bytes() == int(8 * GIB * 0.9)


def test_version_1_counts_children(group):
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {2 * GIB}\ntotal_active_file {GIB}\n"
    group("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", str(10 * GIB), 5 * GIB, stat)
    assert budget.free_bytes() == int(8 * GIB * 0.9)


@pytest.mark.parametrize("stat", ["", "nonsense\n"])
def test_a_group_that_does_not_say_has_no_cache(group, stat):
    group(".", "memory.max", "memory.current", str(10 * GIB), 6 * GIB, stat)
    assert budget.free_bytes() == int(4 * GIB * 0.9)


def test_no_limit_is_the_machines(group):
    group(".", "memory.max", "memory.current", "max", 6 * GIB, "")
    assert budget.free_bytes() == int(100 * GIB * 0.9)
