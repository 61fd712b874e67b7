"""DiskStore: the bytes of every expert, whatever the file system and the disk do meanwhile."""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import expert_parts, expert_tensors, part_of, read_span, write_sharded
from safetensors.torch import save_file

from expertflow.core import ExpertId
from expertflow.store.checkpoint import Checkpoint, open_checkpoint
from expertflow.store.disk import DiskStore, measure_read_bandwidth
from expertflow.store.layout import PAGE, Part, aligned_buffer, copy_parts, place_packed, tensors
from expertflow.store.ram import RamStore

NUM_EXPERTS = 12


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    save_file(expert_tensors(NUM_EXPERTS), tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


def open_store(checkpoint: Checkpoint, direct: bool | None = None, **options) -> DiskStore:
    return DiskStore(checkpoint, expert_parts(checkpoint, NUM_EXPERTS), direct=direct, **options)


def read_expert(store: DiskStore | RamStore, expert: ExpertId) -> torch.Tensor:
    buffer = aligned_buffer(store.slot_bytes).fill_(0xAA)
    for chunk in store.chunks(expert):
        store.read_chunk(chunk, buffer)
    return buffer


def assert_right_bytes(store: DiskStore | RamStore, checkpoint: Checkpoint) -> None:
    for expert in store.experts:
        seen = tensors(read_expert(store, expert), store.placement(expert))
        e = expert.expert
        gate, up, down = (
            read_span(checkpoint.spans[f"experts.{e}.{name}"]) for name in ("gate", "up", "down")
        )
        assert torch.equal(torch.cat(seen["gate_up_proj"]), torch.cat([gate, up]))
        assert torch.equal(torch.cat(seen["down_proj"]), down)


def short_reads(monkeypatch, limit: int) -> list[int]:
    """os.preadv returns at most `limit` bytes; the list collects the offsets asked for."""
    offsets = []
    preadv = os.preadv

    def short(descriptor, buffers, offset):
        offsets.append(offset)
        return preadv(descriptor, [buffers[0][:limit]], offset)

    monkeypatch.setattr(os, "preadv", short)
    return offsets


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("chunk_bytes", [PAGE, 4 << 20])
def test_every_expert_reads_back(checkpoint, direct, chunk_bytes):
    with open_store(checkpoint, direct, chunk_bytes=chunk_bytes) as store:
        assert_right_bytes(store, checkpoint)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_experts_across_shards(tmp_path, suffix):
    weights = expert_tensors(NUM_EXPERTS)
    names = list(weights)
    write_sharded(tmp_path, [{name: weights[name] for name in names[i::3]} for i in range(3)], suffix)
    checkpoint = open_checkpoint(tmp_path)
    with open_store(checkpoint) as store:
        assert_right_bytes(store, checkpoint)


def test_packed_rows_as_experts(tmp_path):
    """One tensor per layer: an expert is a row of it, with its bias a few bytes of another."""
    weights = {"down": torch.randn(5, 7, 30), "bias": torch.randn(5, 7).bfloat16()}
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)

    def row(name: str, e: int) -> Part:
        span = checkpoint.spans[name]
        nbytes = span.nbytes // 5
        return Part(name, span.path, span.offset + e * nbytes, nbytes, span.dtype, span.shape[1:])

    experts = {ExpertId(0, e): [row("down", e), row("bias", e)] for e in range(5)}
    with DiskStore(checkpoint, experts) as store:
        for expert in experts:
            seen = tensors(read_expert(store, expert), store.placement(expert))
            assert torch.equal(seen["down"][0], weights["down"][expert.expert])
            assert torch.equal(seen["bias"][0], weights["bias"][expert.expert])


def test_misaligned_checkpoint_goes_through_packing(tmp_path):
    """A header of odd length, which safetensors reads and writers other than its own produce."""
    weights = {"w": torch.randn(9, 30)}
    save_file(weights, tmp_path / "even.safetensors")
    raw = (tmp_path / "even.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    odd = (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(odd)
    checkpoint = open_checkpoint(tmp_path)
    expert = ExpertId(0, 0)
    with DiskStore(checkpoint, {expert: [part_of(checkpoint.spans["w"], "w")]}) as store:
        raw_placement, packed = store.placement(expert), place_packed(store.experts[expert], None)
        assert not raw_placement.aligned
        target = aligned_buffer(packed.nbytes)
        copy_parts(read_expert(store, expert), raw_placement, target, packed)
        assert torch.equal(tensors(target, packed)["w"][0], weights["w"])


def test_direct_reads_leave_nothing_in_the_page_cache(checkpoint):
    with open_store(checkpoint) as store:
        read_expert(store, ExpertId(0, 0))
        if store.io_mode != "direct":
            pytest.skip(f"this file system: {store.io_mode}")
        assert all(direct for _, direct in store._descriptors)


def test_slot_bytes_is_the_largest_expert(checkpoint):
    with open_store(checkpoint) as store:
        sizes = [store.placement(expert).nbytes for expert in store.experts]
        assert store.slot_bytes == max(sizes)
        assert store.slot_bytes % PAGE == 0


def test_chunks_cover_the_runs_in_order(checkpoint):
    with open_store(checkpoint, chunk_bytes=PAGE) as store:
        for expert in store.experts:
            wanted = [
                (run.path, run.file_offset + i, run.slot_offset + i)
                for run in store.placement(expert).runs
                for i in range(0, run.nbytes, PAGE)
            ]
            assert [(c.path, c.file_offset, c.slot_offset) for c in store.chunks(expert)] == wanted
            assert {c.nbytes for c in store.chunks(expert)} == {PAGE}


@pytest.mark.parametrize("chunk_bytes", [0, -PAGE, 1000])
def test_chunk_bytes_must_be_pages(checkpoint, chunk_bytes):
    with pytest.raises(ValueError, match=f"chunk_bytes={chunk_bytes} must be a positive multiple of 4096"):
        open_store(checkpoint, chunk_bytes=chunk_bytes)


# --- fallback ---------------------------------------------------------------------------------------


def refuse_open(monkeypatch, code: int) -> None:
    real_open = os.open

    def refusing(path, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)


def refuse_first_read(monkeypatch, code: int) -> None:
    preadv = os.preadv
    refused = []

    def refusing(*args):
        if not refused:
            refused.append(True)
            raise OSError(code, os.strerror(code))
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", refusing)


@pytest.mark.parametrize("refuse", [refuse_open, refuse_first_read])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_refused_direct_reads_fall_back_and_say_so_once(checkpoint, monkeypatch, caplog, refuse, code):
    refuse(monkeypatch, code)
    with caplog.at_level(logging.WARNING), open_store(checkpoint) as store:
        assert_right_bytes(store, checkpoint)
        assert (
            store.io_mode == f"buffered (direct reads refused for {checkpoint.files[0]}: {os.strerror(code)})"
        )
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_systems_without_direct_reads_fall_back(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr("expertflow.store.disk._O_DIRECT", None)
    with open_store(checkpoint) as store:
        assert store.io_mode == "buffered (this system has no O_DIRECT)"
        assert_right_bytes(store, checkpoint)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("refuse", [refuse_open, refuse_first_read])
def test_insisting_on_direct_reads_refuses_to_fall_back(checkpoint, monkeypatch, refuse):
    refuse(monkeypatch, errno.EINVAL)
    with (
        open_store(checkpoint, direct=True) as store,
        pytest.raises(ValueError, match=r"direct=True, but direct reads refused for .*; use direct=None"),
    ):
        read_expert(store, ExpertId(0, 0))


def test_buffered_when_asked_for(checkpoint, caplog):
    with open_store(checkpoint, direct=False) as store:
        read_expert(store, ExpertId(0, 0))
        assert store.io_mode == "buffered (asked for)"
        assert not any(direct for _, direct in store._descriptors)
    assert not caplog.records


def test_buffered_reads_give_their_pages_back(checkpoint, monkeypatch):
    given_back = set()
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _fd, offset, nbytes, advice: given_back.add((offset, nbytes, advice))
    )
    with open_store(checkpoint, direct=False) as store:
        read_expert(store, ExpertId(0, 3))
        wanted = {(c.file_offset, c.nbytes, os.POSIX_FADV_DONTNEED) for c in store.chunks(ExpertId(0, 3))}
    assert wanted <= given_back


# --- trouble ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("limit", [1024, PAGE, PAGE + 512, 3 * PAGE - 512])
def test_short_reads_are_continued(checkpoint, monkeypatch, direct, limit):
    """A direct read can resume at a page boundary only, so there a limit below a page ends in an error."""
    with open_store(checkpoint, direct) as store:
        buffered = store.io_mode != "direct"
        offsets = short_reads(monkeypatch, limit)
        if not buffered and limit < PAGE:
            with pytest.raises(OSError, match=r"only 1024 of \d+ bytes"):
                read_expert(store, ExpertId(0, 0))
            return
        assert_right_bytes(store, checkpoint)
        if not buffered:
            assert all(offset % PAGE == 0 for offset in offsets)


def test_interrupted_reads_are_repeated(checkpoint, monkeypatch):
    preadv = os.preadv
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) % 2:
            raise InterruptedError(errno.EINTR, "interrupted")
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", interrupted)
    with open_store(checkpoint) as store:
        assert_right_bytes(store, checkpoint)


@pytest.mark.parametrize("direct", [None, False])
def test_read_error_half_way_names_file_and_offset(checkpoint, monkeypatch, direct):
    preadv = os.preadv
    with open_store(checkpoint, direct, chunk_bytes=PAGE) as store:
        *_, last = store.chunks(ExpertId(0, 5))

        def failing(descriptor, buffers, offset):
            if offset >= last.file_offset:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", failing)
        message = (
            rf"model\.safetensors: reading \d+ bytes at offset {last.file_offset} failed \(Input.*; check"
        )
        with pytest.raises(OSError, match=message) as raised:
            read_expert(store, ExpertId(0, 5))
        assert raised.value.errno == errno.EIO
        monkeypatch.undo()
        assert_right_bytes(store, checkpoint)  # the store survives a passing fault


def test_the_last_page_of_a_file_is_short(checkpoint):
    with open_store(checkpoint) as store:
        size = checkpoint.files[0].stat().st_size
        assert size % PAGE
        found = 0
        for expert in store.experts:
            for chunk in store.chunks(expert):
                if chunk.file_offset + chunk.nbytes > size:
                    count = store.read_chunk(chunk, aligned_buffer(store.slot_bytes))
                    assert count == size - chunk.file_offset
                    found += 1
        assert found


def last_expert(store: DiskStore) -> ExpertId:
    return max(store.experts, key=lambda expert: max(run.exact_end for run in store.placement(expert).runs))


@pytest.mark.parametrize("direct", [None, False])
def test_file_truncated_while_open(checkpoint, direct):
    with open_store(checkpoint, direct) as store:
        read_expert(store, last_expert(store))
        os.truncate(checkpoint.files[0], checkpoint.files[0].stat().st_size - 2 * PAGE)
        with pytest.raises(
            OSError, match=r"model\.safetensors: only \d+ of \d+ bytes at offset \d+ came; .*download"
        ):
            read_expert(store, last_expert(store))


def test_file_written_while_open(checkpoint):
    path = checkpoint.files[0]
    with open_store(checkpoint) as store:
        read_expert(store, ExpertId(0, 0))
        with path.open("r+b") as file:
            file.write(b"\0")
        os.utime(path, ns=(0, checkpoint.identities[path].mtime_ns + 1))
        with pytest.raises(ValueError, match=r"model\.safetensors changed while it was open"):
            read_expert(store, ExpertId(0, 1))


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_file_changed_before_its_first_read(checkpoint, tmp_path, change):
    path = checkpoint.files[0]
    with open_store(checkpoint) as store:
        path.rename(tmp_path / "aside")
        if change == "replaced":
            path.write_bytes((tmp_path / "aside").read_bytes())
        with pytest.raises(ValueError, match=r"model\.safetensors changed while it was open"):
            read_expert(store, ExpertId(0, 0))
        assert not store._descriptors


# --- lifetime ---------------------------------------------------------------------------------------


def open_descriptors(path: Path) -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link) == str(path.resolve()) for link in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("ending", ["close", "forget"])
def test_descriptors_are_closed(checkpoint, ending):
    store = open_store(checkpoint)
    assert open_descriptors(checkpoint.files[0]) == 0, "opened before the first read"
    read_expert(store, ExpertId(0, 0))
    assert open_descriptors(checkpoint.files[0]) == 1
    if ending == "close":
        store.close()
        store.close()
    else:
        del store
        gc.collect()
    assert open_descriptors(checkpoint.files[0]) == 0


def test_reading_after_close(checkpoint):
    store = open_store(checkpoint)
    store.close()
    with pytest.raises(ValueError, match="the store was closed; open the checkpoint again"):
        read_expert(store, ExpertId(0, 0))


def in_threads(count: int, work: Callable[[], object]) -> None:
    """Run work in threads and raise the first failure."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_share_a_store(checkpoint):
    with open_store(checkpoint, chunk_bytes=PAGE) as store:
        in_threads(4, lambda: assert_right_bytes(store, checkpoint))


class AnnouncingLock:
    """Sets `crowded` when a second thread arrives, before that waits."""

    def __init__(self, crowded: threading.Event) -> None:
        self.crowded = crowded
        self.lock = threading.Lock()
        self.arrivals = 0

    def __enter__(self) -> None:
        self.arrivals += 1
        if self.arrivals > 1:
            self.crowded.set()
        self.lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.lock.release()


def test_racing_first_reads_open_the_file_once(checkpoint, monkeypatch):
    """The first thread stays in os.open until the second has come to the lock, or into os.open as well."""
    crowded = threading.Event()
    opened = []
    real_open = os.open

    def slow_open(path, *rest, **more):
        opened.append(path)
        if len(opened) > 1:
            crowded.set()
        assert crowded.wait(60)
        return real_open(path, *rest, **more)

    with open_store(checkpoint) as store:
        monkeypatch.setattr(store, "_lock", AnnouncingLock(crowded))
        monkeypatch.setattr(os, "open", slow_open)
        in_threads(2, lambda: read_expert(store, ExpertId(0, 0)))
        assert opened == [checkpoint.files[0]]
        assert len(store._descriptors) == 1


def test_slots_must_be_page_aligned(checkpoint):
    with open_store(checkpoint) as store:
        (chunk, *_) = store.chunks(ExpertId(0, 0))
        with pytest.raises(AssertionError, match="not page-aligned"):
            store.read_chunk(chunk, aligned_buffer(store.slot_bytes + 8)[8:])


# --- bandwidth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [False, True])
def test_bandwidth_is_bytes_over_read_time(checkpoint, monkeypatch, refused):
    if refused:
        refuse_open(monkeypatch, errno.EINVAL)
    assert measure_read_bandwidth(checkpoint.files, seconds=0.0, chunk_bytes=PAGE) > 0


def test_bandwidth_counts_bytes_by_the_clock(checkpoint, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("expertflow.store.disk.time.perf_counter", lambda: next(ticks) * 0.5)
    assert measure_read_bandwidth(checkpoint.files, seconds=3.0, chunk_bytes=PAGE) == 2 * PAGE


def test_bandwidth_of_nothing(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_read_bandwidth([tmp_path / "empty"])
