from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from expertflow import read_ahead
from expertflow.read_ahead import read_early
from expertflow.store.checkpoint import open_checkpoint

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no read-ahead hints here"),
    # Nobody waits for the thread: what fails in it would be seen by users only.
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]
DENSE = ("model.embed_tokens.weight", "model.layers.0.mlp.shared_experts.up_proj.weight", "lm_head.weight")
EXPERTS = (
    "model.layers.0.mlp.experts.0.up_proj.weight",
    "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight",
)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, int, int]]:
    """(file, offset, length) of every piece the kernel was asked for."""
    hints: list[tuple[str, int, int]] = []

    def fadvise(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        hints.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, offset, nbytes))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return hints


def read_and_wait(folder: Path) -> None:
    thread = read_early(folder)
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def write_index(folder: Path) -> None:
    places = {
        key: path.name
        for path in folder.glob("*.safetensors")
        for key in safe_open(path, "pt").keys()  # noqa: SIM118 - not a dict
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_dense_weights_are_asked_for_where_they_lie_and_experts_are_not(tmp_path, asked):
    save_file({key: torch.ones(4, 8) for key in (*DENSE[:2], *EXPERTS)}, tmp_path / "model-1.safetensors")
    last = {DENSE[2]: torch.ones(16), "stack": torch.ones(2, 3, 4)}
    save_file(last, tmp_path / "model-2.safetensors", metadata={"format": "pt"})
    write_index(tmp_path)
    spans = open_checkpoint(tmp_path).spans
    read_and_wait(tmp_path)
    expected = [(spans[key].path.name, spans[key].offset, spans[key].nbytes) for key in DENSE]
    assert sorted(asked) == sorted(expected)


def test_a_large_tensor_is_asked_for_in_pieces(tmp_path, asked):
    """Linux reads no more than the device's read-ahead of each wish."""
    save_file({DENSE[0]: torch.ones(100_000)}, tmp_path / "model.safetensors")
    (span,) = open_checkpoint(tmp_path).spans.values()
    read_and_wait(tmp_path)
    assert [nbytes for _, _, nbytes in asked] == [131072, 131072, 131072, 400_000 - 3 * 131072]
    assert [offset - span.offset for _, offset, _ in asked] == [0, 131072, 262144, 393216]


def test_it_stops_at_its_limit(tmp_path, asked, monkeypatch):
    save_file({DENSE[0]: torch.ones(100)}, tmp_path / "model-1.safetensors")
    save_file({DENSE[2]: torch.ones(100)}, tmp_path / "model-2.safetensors")
    monkeypatch.setattr(read_ahead, "MOST_BYTES", 700)
    read_and_wait(tmp_path)
    assert [name for name, _, _ in asked] == ["model-1.safetensors"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 20,
        header("[]"),
        header('{"a":{"b":1}}'),
        header("[" * 200_000),
        header('{"a":{"shape":[4],"data_offsets":[18446744073709551616,18446744073709551620]}}'),
        header('{"a":{"shape":[4],"data_offsets":[0.0,1.5]}}'),
        header('{"a":{"shape":[4],"data_offsets":[NaN,NaN]}}'),
        header('{"a":{"shape":[4],"data_offsets":[4,0]}}') + bytes(8),
        header('{"a":{"shape":[4],"data_offsets":[0,9]}}') + bytes(8),
    ],
)
def test_a_damaged_file_is_somebody_elses_complaint(tmp_path, asked, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    read_and_wait(tmp_path)
    assert not asked


@pytest.fixture
def begun(monkeypatch) -> list[int]:
    """Bytes of memory that were asked for early."""
    wishes: list[int] = []
    monkeypatch.setattr(read_ahead.EARLY, "begin", wishes.append)
    return wishes


def test_memory_is_asked_for_dense_weights_each_on_its_pages(tmp_path, asked, begun):
    save_file({key: torch.ones(4, 1000) for key in (DENSE[0], *EXPERTS)}, tmp_path / "model-1.safetensors")
    save_file({key: torch.ones(2) for key in DENSE[1:]}, tmp_path / "model-2.safetensors")
    read_and_wait(tmp_path)
    (nbytes,) = begun
    buffers = nbytes - (-(-16_000 // mmap.PAGESIZE) + 2) * mmap.PAGESIZE
    assert 0 < buffers <= 1 << 20


@pytest.mark.parametrize(("available", "asks"), [(2 * 400, True), (2 * 400 - 1, False)])
def test_memory_is_asked_for_where_there_is_twice_as_much(
    tmp_path, asked, begun, monkeypatch, available, asks
):
    save_file({DENSE[0]: torch.ones(100)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(read_ahead, "process_bytes", lambda: 1000)
    monkeypatch.setattr(read_ahead, "free_bytes", lambda: 1000 + available)
    read_and_wait(tmp_path)
    assert len(begun) == asks
    assert len(asked) == 1


def test_no_memory_beyond_its_limit(tmp_path, asked, begun, monkeypatch):
    save_file({DENSE[0]: torch.ones(100)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(read_ahead, "MOST_BYTES", 399)
    read_and_wait(tmp_path)
    assert not begun


def test_a_hub_id_is_no_folder(asked):
    assert read_early(Path("Qwen/Qwen1.5-MoE-A2.7B")) is None


def test_it_needs_none_of_the_imports_it_runs_before():
    code = "import sys, expertflow.read_ahead; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
