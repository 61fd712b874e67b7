"""Adapters: each runs what its name says, says so, and says why it cannot where it cannot."""

from __future__ import annotations

import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import rivals
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.rivals import Limits, gguf_of, llama_cpp
from tests.benchmarks.test_route_replay import SHAPES

_Usage = namedtuple("_Usage", "total used free")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "qwen", SHAPES["qwen"])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    binary = tmp_path / "llama.cpp" / "build" / "bin" / "llama-bench"
    binary.parent.mkdir(parents=True)
    helps(binary, "-mmp, --mmap <0|1>")
    return tmp_path / "llama.cpp"


def helps(binary: Path, text: str) -> None:
    binary.write_text(f"#!/bin/sh\necho '{text}'\n")
    binary.chmod(0o755)


@pytest.mark.parametrize(
    ("knows", "flag", "mapped", "read"),
    [
        ("-mmp, --mmap <0|1>", "--mmap", "1", "0"),
        ("-lm, --load-mode <auto|none|mmap>", "--load-mode", "mmap", "none"),
    ],
)
def test_llama_cpp_is_told_to_decode_alone(
    tree: Path, tmp_path: Path, knows: str, flag: str, mapped: str, read: str
) -> None:
    helps(tree / "build" / "bin" / "llama-bench", knows)
    asked = llama_cpp.command(tree, tmp_path / "m.gguf", steps=24, threads=2)
    assert asked[0].endswith("build/bin/llama-bench")
    assert dict(zip(asked[1::2], asked[2::2], strict=True)) == {
        "-m": str(tmp_path / "m.gguf"),
        **{"-p": "0", "-n": "24", "-r": "1", "-t": "2", flag: mapped, "-o": "json"},
    }
    assert llama_cpp.command(tree, tmp_path, 1, 1, mmap=False)[-3] == read


def test_a_checkpoint_that_cannot_be_converted_is_an_error_of_llama_cpp_alone(
    tree: Path, checkpoint: Path
) -> None:
    """The converter fails in the middle of its output: what other systems did is not lost, and nothing is left."""
    (tree / "convert_hf_to_gguf.py").write_text(
        "import sys\nclass TextModel: pass\n"
        "def main():\n    open(sys.argv[-1], 'w').write('half')\n    raise OSError('no space left on device')\n"
    )
    found = llama_cpp.converted_and_decoded(tree, checkpoint, None, 1, 1)
    assert "converter of llama.cpp failed" in found["error"]
    assert "no space left on device" in found["error"]
    assert not list(checkpoint.parent.glob("*.part"))
    assert not list(checkpoint.parent.glob("*.gguf"))


def test_a_converted_checkpoint_keeps_its_whole_name(tree: Path, tmp_path: Path) -> None:
    """qwen1.5-moe-24 became qwen1.gguf once, which qwen1.9 would have taken for its own."""
    (tree / "convert_hf_to_gguf.py").write_text(
        "import sys\nclass TextModel: pass\ndef main():\n    open(sys.argv[-1], 'w').write('whole')\n"
    )
    folder = tmp_path / "qwen1.5-moe-24"
    folder.mkdir()
    assert llama_cpp.convert(tree, folder) == tmp_path / "qwen1.5-moe-24.gguf" == gguf_of(folder)
    assert gguf_of(folder).read_text() == "whole"


def test_llama_cpp_says_what_it_ran(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"weights")
    answer = '[{"avg_ts": 0.5, "build_commit": "abc"}]'
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0, stdout=answer))
    result = llama_cpp.decode(tree, gguf, None, steps=8, threads=1)
    assert result["tokens_per_s"] == 0.5
    assert result["ran"]["version"] == "commit abc"
    assert result["ran"]["flags"]["arguments"] == "llama-bench -p 0 -n 8 -r 1 -t 1 --mmap 1 -o json"


def test_a_tree_without_a_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"build llama\.cpp in"):
        llama_cpp.command(tmp_path, tmp_path, 1, 1)


@pytest.mark.parametrize("name", ["ours", "on-demand", "online"])
def test_our_modes_differ_in_what_they_are_told(name: str, checkpoint: Path) -> None:
    model, ran = rivals.load(name, checkpoint, Limits(memory=None, batch=2, context=32))
    settings = model.expertflow.settings
    assert ran.name == f"expertflow ({name})"
    assert "transformers" in ran.version
    assert (settings.overlap, settings.predictor) == (
        name != "on-demand",
        "online" if name == "online" else "none",
    )
    assert (settings.batch, settings.context) == (2, 32)
    assert ran.flags.items() <= vars(settings).items()
    model.expertflow.close()


def test_resident_has_a_slot_for_every_expert(checkpoint: Path) -> None:
    model, _ = rivals.load("resident", checkpoint, Limits(memory=10**9, batch=1))
    assert model.expertflow.cache.num_slots == model.expertflow.cache.shape.num_experts
    model.expertflow.close()


def test_transformers_runs_the_experts_it_names(checkpoint: Path) -> None:
    model, ran = rivals.load("eager", checkpoint, Limits(None, 1))
    assert model.config._experts_implementation == "eager"
    assert ran.flags == {"experts_implementation": "eager"}


def test_accelerate_keeps_its_share_outside_the_limit(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"memory=1000: accelerate's offload needs a limit above 1\.6 GB"):
        rivals.load("accelerate", checkpoint, Limits(1000, 1))
    _, ran = rivals.load("accelerate", checkpoint, Limits(2_000_000_000, 1))
    assert ran.flags["max_memory"] == {"cpu": 400_000_000}
    assert ran.flags["device_map"] == "auto"


def test_who_cannot_run_says_why(checkpoint: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rivals.missing("ours", checkpoint, 1) is None
    assert rivals.missing("resident", checkpoint, 10**9) is None
    assert "of memory and the machine has 0.0" in (rivals.missing("resident", checkpoint, 1000) or "")
    assert "--llama-cpp DIR" in (rivals.missing("llama.cpp", checkpoint, 10**9) or "")
    assert rivals.missing("llama.cpp", checkpoint, 10**9, tree) is None
    assert "is to have 1.10" in (rivals.missing("accelerate", checkpoint, 10**9, tree, 1_100_000_000) or "")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10, 10, 0))
    for name in ("llama.cpp", "accelerate"):
        assert "more of disk" in (rivals.missing(name, checkpoint, 10**9, tree) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install accelerate" in (rivals.missing("accelerate", checkpoint, 10**9) or "")


def test_an_unknown_system_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="unknown system 'vllm'; known: ours, on-demand"):
        rivals.load("vllm", checkpoint, Limits(None, 1))
