"""RamStore: indistinguishable from the disk it was filled from."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from checkpoints import expert_parts, expert_tensors
from safetensors.torch import save_file

from expertflow.core import ExpertId
from expertflow.store.checkpoint import Checkpoint, open_checkpoint
from expertflow.store.disk import DiskStore
from expertflow.store.layout import PAGE, aligned_buffer
from expertflow.store.ram import RamStore

NUM_EXPERTS = 5


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    save_file(expert_tensors(NUM_EXPERTS), tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


def disk(checkpoint: Checkpoint, **options) -> DiskStore:
    return DiskStore(checkpoint, expert_parts(checkpoint, NUM_EXPERTS), **options)


def read_expert(store: DiskStore | RamStore, expert: ExpertId) -> list[torch.Tensor]:
    """The bytes of each chunk as far as the file reaches; what lies behind them in a slot is undefined."""
    buffer = aligned_buffer(store.slot_bytes).fill_(0xAA)
    counts = [store.read_chunk(chunk, buffer) for chunk in store.chunks(expert)]
    return [
        buffer[chunk.slot_offset : chunk.slot_offset + count]
        for chunk, count in zip(store.chunks(expert), counts, strict=True)
    ]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("chunk_bytes", [PAGE, 4 << 20])
def test_slots_equal_those_read_from_disk(checkpoint, chunk_bytes):
    with disk(checkpoint, chunk_bytes=chunk_bytes) as source:
        ram = RamStore(source, pin=False)
        assert ram.slot_bytes == source.slot_bytes
        assert ram.experts == source.experts
        for expert in source.experts:
            assert ram.placement(expert) == source.placement(expert)
            assert ram.chunks(expert) == source.chunks(expert)
            assert same(read_expert(ram, expert), read_expert(source, expert))


def test_disk_is_not_read_again(checkpoint):
    with disk(checkpoint) as source:
        ram = RamStore(source, pin=False)
    checkpoint.files[0].unlink()
    read_expert(ram, ExpertId(0, 0))


def test_resident_bytes_are_those_of_the_placement(checkpoint):
    with disk(checkpoint) as source, RamStore(source, pin=False) as ram:
        for expert in source.experts:
            wanted = torch.cat(read_expert(source, expert))
            resident = ram.resident(expert)
            assert resident.numel() == source.placement(expert).nbytes
            assert resident.data_ptr() % PAGE == 0
            assert torch.equal(resident[: len(wanted)], wanted)


def test_progress_reaches_the_whole(checkpoint):
    seen: list[tuple[int, int]] = []
    with disk(checkpoint) as source:
        ram = RamStore(source, pin=False, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == NUM_EXPERTS
    assert sorted(seen) == seen
    assert seen[-1] == (ram.nbytes, ram.nbytes)
    assert ram.nbytes == sum(ram.placement(expert).nbytes for expert in ram.experts)


def test_read_errors_while_filling_surface(checkpoint, monkeypatch):
    preadv = os.preadv
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", failing)
    with disk(checkpoint) as source, pytest.raises(OSError, match=r"model\.safetensors: reading .* failed"):
        RamStore(source, pin=False)


def test_pinning_without_an_accelerator_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with disk(checkpoint) as source:
        with pytest.raises(ValueError, match=r"pin=True needs an accelerator.*; use pin=None or False"):
            RamStore(source, pin=True)
        assert RamStore(source).io_mode == "ram"


@pytest.mark.parametrize("block_bytes", [PAGE, 3 * PAGE, 1 << 20])
def test_pinned_memory_comes_in_blocks(checkpoint, monkeypatch, block_bytes):
    """With an accelerator, memory is allocated in a few blocks; here they are ordinary ones."""
    blocks = []

    def block(nbytes: int) -> torch.Tensor:
        blocks.append(nbytes)
        return aligned_buffer(nbytes)

    monkeypatch.setattr("expertflow.store.ram.pinned_block", block)
    monkeypatch.setattr("expertflow.store.ram._PINNED_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with disk(checkpoint) as source:
        ram = RamStore(source)
        assert ram.io_mode == "ram (pinned)"
        assert len(blocks) == (1 if block_bytes == 1 << 20 else NUM_EXPERTS)
        for expert in source.experts:
            assert same(read_expert(ram, expert), read_expert(source, expert))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_pinned_on_an_accelerator(checkpoint):
    with disk(checkpoint) as source:
        ram = RamStore(source)
        for expert in source.experts:
            assert ram.resident(expert).is_pinned()
            assert same(read_expert(ram, expert), read_expert(source, expert))


def test_reading_after_close(checkpoint):
    with disk(checkpoint) as source:
        ram = RamStore(source, pin=False)
    ram.close()
    with pytest.raises(ValueError, match="the store was closed"):
        read_expert(ram, ExpertId(0, 0))
