"""ThrottledStore: when reads end, on a clock that the test winds; and that nothing else changes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import expert_parts, expert_tensors
from safetensors.torch import save_file

from expertflow.config import Settings, format_bandwidth, parse_bandwidth
from expertflow.store.checkpoint import open_checkpoint
from expertflow.store.disk import DiskStore
from expertflow.store.layout import PAGE, aligned_buffer
from expertflow.store.throttled import ThrottledStore

BANDWIDTH = 1e6


class Clock:
    """Time that passes only in sleep, which ends `late_s` late, and where the test says so."""

    def __init__(self, late_s: float = 0.0):
        self.now, self.late_s, self.slept = 0.0, late_s, 0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept += 1
        self.now += seconds + self.late_s


class Inner:
    """Reads as many bytes as it is asked for, in read_s."""

    io_mode = "ram"

    def __init__(self, clock: Clock, read_s: float = 0.0):
        self.clock, self.read_s = clock, read_s

    def read_chunk(self, chunk: Any, buffer: Any) -> int:
        self.clock.now += self.read_s
        return chunk.nbytes


def throttled(clock: Clock, read_s: float = 0.0) -> Any:
    inner: Any = Inner(clock, read_s)
    return ThrottledStore(inner, BANDWIDTH, clock=clock, sleep=clock.sleep)


def read(store: Any, nbytes: int) -> int:
    return store.read_chunk(SimpleNamespace(nbytes=nbytes), None)


def test_a_read_takes_as_long_as_its_bytes_on_the_link():
    clock = Clock()
    store = throttled(clock, read_s=0.0005)
    assert read(store, 2000) == 2000
    assert clock.now == pytest.approx(0.002), "the inner read is part of it"
    clock.now += 1.0
    read(store, 3000)
    assert clock.now == pytest.approx(1.005), "a link that was idle owes nothing"


def test_a_slower_inner_store_stays_slower():
    clock = Clock()
    store = throttled(clock, read_s=0.005)
    for _ in range(10):
        read(store, 1000)
    assert clock.now == pytest.approx(0.050)
    assert clock.slept == 0
    store.inner.read_s = 0.0
    began = clock.now
    for _ in range(3):
        read(store, 1000)
    assert clock.now - began == pytest.approx(0.003), "time that the inner store took was made up for"


@pytest.mark.parametrize("late_s", [0.0, 0.0001, 0.0009, 0.004])
def test_what_sleep_is_late_does_not_accumulate(late_s):
    clock = Clock(late_s)
    store = throttled(clock)
    ends = []
    for _ in range(100):
        read(store, 1000)
        ends.append(clock.now)
    for number, end in enumerate(ends, 1):
        assert number * 0.001 - 1e-12 <= end <= number * 0.001 + late_s + 1e-9


def test_only_a_read_that_follows_at_once_makes_up_for_a_late_sleep():
    clock = Clock(late_s=0.0008)
    store = throttled(clock)
    read(store, 1000)
    assert clock.now == pytest.approx(0.0018)
    clock.now += 0.01
    began = clock.now
    read(store, 1000)
    assert clock.now - began >= 0.001, "earlier than the bytes can have crossed"
    clock.now += 0.0005  # the reader's own time: the link stood idle
    read(store, 1000)
    assert clock.now == pytest.approx(began + 0.001 + 0.0005 + 0.001 + clock.late_s)


@pytest.mark.parametrize("seed", range(20))
def test_no_stretch_of_reads_beats_the_link(seed):
    """Against the definition: from the beginning of any read to the end of any later one, no more bytes than the
    link carries in that time and in what one sleep was late."""
    draw = random.Random(seed)
    clock = Clock()
    store = throttled(clock, read_s=0.0002)
    spans = []
    for _ in range(60):
        clock.late_s = draw.choice([0.0, 0.00005, 0.0007])
        clock.now += draw.choice([0.0, 0.0, 0.0003, 0.02])
        began, nbytes = clock.now, draw.choice([1, 300, 5000])
        read(store, nbytes)
        spans.append((began, clock.now, nbytes))
    for first in range(len(spans)):
        total = 0
        for began_and_after in spans[first:]:
            total += began_and_after[2]
            assert began_and_after[1] - spans[first][0] >= total / BANDWIDTH - 0.0007 - 1e-9


def test_readers_at_once_share_the_link():
    """A read that begins while another is under way waits for both: its bytes come behind the other's."""
    clock = Clock()
    store = throttled(clock)
    ends: list[float] = []

    def sleep_while_another_reads(seconds: float) -> None:
        store._sleep = clock.sleep
        began = clock.now
        read(store, 1000)
        ends.append(clock.now)
        clock.now = max(clock.now, began + seconds)

    store._sleep = sleep_while_another_reads
    read(store, 4000)
    assert ends == [pytest.approx(0.005)]


def test_it_is_the_inner_store_but_for_time(tmp_path):
    save_file(expert_tensors(3), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    clock = Clock()
    with DiskStore(checkpoint, expert_parts(checkpoint, 3), chunk_bytes=PAGE) as disk:
        store = ThrottledStore(disk, BANDWIDTH, clock=clock, sleep=clock.sleep)
        assert store.io_mode == f"{disk.io_mode}, held to 1 MB/s"
        assert (store.experts, store.slot_bytes) == (disk.experts, disk.slot_bytes)
        total = 0
        for expert in store.experts:
            assert store.placement(expert) == disk.placement(expert)
            assert store.chunks(expert) == disk.chunks(expert)
            ours, theirs = (aligned_buffer(store.slot_bytes).fill_(0) for _ in range(2))
            for chunk in store.chunks(expert):
                count = store.read_chunk(chunk, ours)
                assert count == disk.read_chunk(chunk, theirs)
                total += count
            assert torch.equal(ours, theirs)
        assert clock.now == pytest.approx(total / BANDWIDTH)
        with store:
            pass
        with pytest.raises(ValueError, match="the store was closed"):
            disk.read_chunk(chunk, ours)


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan"), float("inf")])
def test_a_link_that_is_none(bandwidth):
    with pytest.raises(ValueError, match="carries nothing; give a finite number above 0"):
        ThrottledStore(Inner(Clock()), bandwidth)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "bytes_per_second"),
    [("2GB/s", 2 * 10**9), ("900 MiB/s", 900 * 2**20), (" 1.5 kB / s ", 1500), (7, 7), ("100B/s", 100)],
)
def test_bandwidths(said, bytes_per_second):
    assert parse_bandwidth(said) == bytes_per_second
    assert Settings(link=said).link == said


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("2GB", r"link='2GB' is not per second; write for example '2GB/s'"),
        ("fast", r"link='fast' is not per second"),
        ("fast/s", r"link='fast/s' is not a size; write for example '2GB/s'"),
        ("2/s", r"link='2/s' has no unit; write '2GB/s' if you mean gigabytes per second"),
        ("2XB/s", r"link='2XB/s': unknown unit 'xb'"),
        ("10Gb/s", r"link='10Gb/s' is in bits or bytes\? Divide bits by 8"),
        ("10Gbit/s", r"link='10Gbit/s' is in bits or bytes"),
        ("0GB/s", r"link='0GB/s' must be above zero"),
        ("-1GB/s", r"link='-1GB/s' must be above zero"),
        ("0.5B/s", r"link='0\.5B/s' is less than a byte"),
        (0, r"link=0 must be above zero"),
        (True, r"link=True is neither text such as '2GB/s' nor a whole number of bytes per second"),
        (2.5, r"link=2\.5 is neither"),
    ],
)
def test_bandwidths_that_are_none(said, message):
    with pytest.raises(ValueError, match=message):
        Settings(link=said)


def test_bandwidths_for_people():
    assert [format_bandwidth(b) for b in (2e9, 812.4e6, 950, 25e9)] == [
        "2 GB/s",
        "812 MB/s",
        "950 B/s",
        "25 GB/s",
    ]
