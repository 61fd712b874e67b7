"""What a process may use, by what the machine and its memory cgroup say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expertflow import budget
from expertflow.config import Settings, TraceSettings

GIB = 2**30


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Memory cgroups in folders: write(folder, ..., limit, usage, stat) makes one; there are no others.

    The process is in that of its `own` text, /proc/self/cgroup.
    """

    def write(
        folder: str, limit_file: str, usage_file: str, limit: str, usage: int, stat: str, own: str = "0::/"
    ) -> None:
        at = tmp_path / folder
        at.mkdir(exist_ok=True, parents=True)
        (tmp_path / "own").write_text(own)
        for name, text in ((limit_file, limit), (usage_file, str(usage)), ("memory.stat", stat)):
            (at / name).write_text(text)

    class Redirected(type(Path())):
        def __new__(cls, *parts):
            first = str(parts[0]) if parts else ""
            if first.startswith("/sys/fs/cgroup"):
                parts = (str(tmp_path) + first.removeprefix("/sys/fs/cgroup"), *parts[1:])
            return Path(tmp_path / "own") if first == "/proc/self/cgroup" else Path(*parts)

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


@pytest.mark.parametrize(
    ("root", "limit", "usage", "own"),
    [
        (".", "memory.max", "memory.current", "0::/system.slice/expertflow.service\n"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "4:cpu,memory:/slurm/job 7\n0::/\n"),
    ],
)
def test_the_group_of_a_service_or_a_job_binds_and_so_do_those_above(group, root, limit, usage, own):
    """Only the root's limit was once read, and a job with 8 of 100 GiB planned for 90."""
    path = own.splitlines()[0].split(":")[2].removeprefix("/")
    group(f"{root}/{path}", limit, usage, str(8 * GIB), 2 * GIB, "", own)
    assert budget.free_bytes() == int(6 * GIB * 0.9)
    above = path.split("/")[0]
    group(f"{root}/{above}", limit, usage, str(20 * GIB), 15 * GIB, "", own)
    assert budget.free_bytes() == int(5 * GIB * 0.9)


def test_in_a_container_the_root_is_its_group(group):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group("memory", *names, str(10 * GIB), 4 * GIB, "", own="4:memory:/docker/0123abc\n")
    assert budget.free_bytes() == int(6 * GIB * 0.9)


@pytest.mark.parametrize("stat", ["", "nonsense\n"])
def test_a_group_that_does_not_say_has_no_cache(group, stat):
    group(".", "memory.max", "memory.current", str(10 * GIB), 6 * GIB, stat)
    assert budget.free_bytes() == int(4 * GIB * 0.9)


def test_no_limit_is_the_machines(group):
    group(".", "memory.max", "memory.current", "max", 6 * GIB, "")
    assert budget.free_bytes() == int(100 * GIB * 0.9)


def planned(**settings):
    model = budget.ModelBytes(1000, 8, 2, 100, 0, 10, 7, 3)
    return budget.plan_memory(model, Settings(cache_size=1, context=50, **settings), 0, 0)


def test_sequences_that_are_held_at_once_are_in_the_plan():
    """A unit computes two batches at once, so scratch grows to that and no further; KV is for all of them."""
    alone, unit, many = planned(batch=4), planned(batch=4, sequences=8), planned(batch=4, sequences=32)
    assert (alone.kv_bytes, unit.kv_bytes, many.kv_bytes) == (4 * 50 * 10, 8 * 50 * 10, 32 * 50 * 10)
    assert unit.scratch_bytes - alone.scratch_bytes == 4 * 7 + 4 * 3, (
        "a token and the logits of each of 4 more"
    )
    assert many.scratch_bytes == unit.scratch_bytes


def test_by_default_one_batch_is_held():
    assert (Settings(batch=3).held, Settings(batch=3).unit, TraceSettings().held) == (
        3,
        3,
        TraceSettings.batch,
    )
    assert replace(Settings(), batch=3).held == 3
    assert (Settings(batch=3, sequences=5).unit, Settings(batch=3, sequences=50).unit) == (5, 6)


@pytest.mark.parametrize("sequences", [0, 3, 4.0, True, "8"])
def test_fewer_sequences_than_a_batch_are_refused(sequences):
    with pytest.raises(ValueError, match=r"sequences=.* must be a whole number of at least batch=4"):
        Settings(batch=4, sequences=sequences)
