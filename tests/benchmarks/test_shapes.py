"""Checkpoints of published shapes: the released sizes, names that transformers knows, and room for them."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import rivals
from benchmarks.random_checkpoint import NoRoom, write_checkpoint
from benchmarks.shapes import PUBLISHED, QwenShape, checkpoint_bytes, num_parameters, with_layers
from tests.benchmarks.test_route_replay import SHAPES

_Usage = namedtuple("_Usage", "total used free")


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen1.5-moe", 14.30), ("deepseek-moe", 16.40), ("switch-128", 7.41)]
)
def test_parameters_are_those_of_table_1(name: str, billions: float) -> None:
    assert num_parameters(PUBLISHED[name].shape) / 1e9 == pytest.approx(billions, abs=0.03)


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_finds_every_weight_and_no_other(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / name, SHAPES[name])
    _, info = rivals.auto_class(folder).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert written == pytest.approx(checkpoint_bytes(SHAPES[name]), rel=0.2)  # headers, in a model this small


def test_a_whole_checkpoint_is_reused_and_another_seed_written_anew(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "qwen", SHAPES["qwen"])
    (first,) = sorted(folder.glob("model-00002*"))
    before, content = first.stat().st_mtime_ns, load_file(first)
    write_checkpoint(folder, SHAPES["qwen"])
    assert first.stat().st_mtime_ns == before
    write_checkpoint(folder, SHAPES["qwen"], seed=1)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert not torch.equal(load_file(first)[name], content[name])


def test_what_a_kill_left_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.random_checkpoint._to_disk", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "qwen", SHAPES["qwen"])
    assert not (tmp_path / "qwen").exists()
    monkeypatch.undo()
    assert (write_checkpoint(tmp_path / "qwen", SHAPES["qwen"]) / "complete.json").exists()
    assert not (tmp_path / "qwen.part").exists()


def test_no_room_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = PUBLISHED["qwen1.5-moe"].shape
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(40e9, 8e9, 32e9))
    with pytest.raises(
        NoRoom, match=r"needs 28\.6 GB of disk, 4\.0 GB are to stay free, and 32\.0 GB are free"
    ):
        write_checkpoint(tmp_path / "qwen", shape, spare_bytes=4_000_000_000)
    assert not list(tmp_path.iterdir())


def test_experts_differ(tmp_path: Path) -> None:
    """Weights are cut out of a pool: no two experts may be the same bytes, or a disk could hold them once."""
    folder = write_checkpoint(
        tmp_path / "qwen", QwenShape(layers=2, hidden=64, heads=4, experts=8, vocabulary=30)
    )
    weights = [
        t for path in folder.glob("*.safetensors") for name, t in load_file(path).items() if "experts" in name
    ]
    heads = {tuple(weight.flatten()[:16].tolist()) for weight in weights}
    assert len(heads) == len(weights) == 2 * 8 * 3


def test_layers_outside_the_published_are_refused() -> None:
    assert with_layers(PUBLISHED["deepseek-moe"].shape, 4).layers == 4
    with pytest.raises(ValueError, match="--layers 29: the published model has 28"):
        with_layers(PUBLISHED["deepseek-moe"].shape, 29)
