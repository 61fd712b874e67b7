"""Full-size runs: what they cannot do they say, and what they report follows from what they measured."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import full_size
from benchmarks.paper import full_size as item
from benchmarks.paper import page, results
from benchmarks.paper.item import Settings
from benchmarks.shapes import PUBLISHED

_Usage = namedtuple("_Usage", "total used free")
RUN: dict[str, Any] = {
    "model": "qwen1.5-moe", "layers": 24, "published_layers": 24, "system": "ours", "batch": 1, "tokens_per_s": 4.0,
    "peak_bytes": 6_400_000_000, "limit_bytes": 6_520_000_000, "checkpoint_bytes": 28_600_000_000, "hit_ratio": 0.25,
    "bytes_per_step": 1.2e9, "bound_tokens_per_s": 5.0, "major_faults": 1, "disturbed": False, "others": 0.0,
    "stolen": 0.0,
}  # fmt: skip


def options(**given: Any) -> argparse.Namespace:
    defaults = {"layers": None, "dtype": None, "memory": None, "keep": False, "quick": False}
    return argparse.Namespace(**(defaults | given))


def test_a_model_without_room_is_skipped_and_says_how_much_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(40e9, 30e9, 10e9))
    monkeypatch.setattr(sys, "argv", ["full_size", "--folder", str(tmp_path), "--models", "deepseek-moe"])
    full_size.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "needs 32.8 GB of disk" in result["metrics"]["skipped"]["deepseek-moe"]
    assert result["metrics"]["runs"] == []
    assert result["targets"] == {}
    assert not list(tmp_path.iterdir())


def test_memory_is_the_papers_and_falls_with_the_layers() -> None:
    qwen, switch = PUBLISHED["qwen1.5-moe"], PUBLISHED["switch-128"]
    assert full_size.memory_for(qwen, options()) == 6_520_000_000
    assert full_size.memory_for(qwen, options(layers=12)) == (6_520_000_000 + 1_200_000_000) // 2
    assert full_size.memory_for(switch, options(dtype="float32")) == 2 * 1_100_000_000
    assert full_size.shape_of(switch, options(dtype="float32")).dtype == "float32"
    assert full_size.shape_of(qwen, options(dtype="float32")).dtype == "bfloat16"


def test_only_whole_models_count_for_the_papers_memory() -> None:
    rival = RUN | {"system": "llama.cpp", "tokens_per_s": 0.5}
    found = full_size.judge([RUN, rival])
    assert found["peak bytes, qwen1.5-moe, batch 1"] == {
        "asked": 6_520_000_000, "got": 6_400_000_000, "met": True,
    }  # fmt: skip
    assert found["over llama.cpp, qwen1.5-moe, batch 1"]["got"] == 8.0
    assert full_size.judge([RUN | {"layers": 12}]) == {}
    assert full_size.judge([{"system": "ours", "model": "qwen1.5-moe", "batch": 1, "not_run": "no"}]) == {}


def test_a_checkpoint_goes_after_its_runs_even_when_they_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "qwen1.5-moe-24"

    def written(*args: Any, **kwargs: Any) -> Path:
        folder.mkdir()
        return folder

    def fails(*args: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(full_size, "write_checkpoint", written)
    monkeypatch.setattr(full_size, "run_system", fails)
    asked = options(folder=tmp_path, task="chat", batches=[1], only=["ours"])
    with pytest.raises(KeyboardInterrupt):
        full_size.run_model("qwen1.5-moe", asked)
    assert not folder.exists()
    asked.keep = True
    with pytest.raises(KeyboardInterrupt):
        full_size.run_model("qwen1.5-moe", asked)
    assert folder.exists()


def test_the_page_keeps_disturbed_speeds_and_skipped_models_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        "qwen1.5-moe": {
            "runs": [
                RUN | {"disturbed": True, "others": 0.5},
                RUN | {"system": "llama.cpp", "tokens_per_s": 0.5},
                RUN | {"system": "resident", "limit_bytes": None, "peak_bytes": None},
            ],
            "skipped": {},
        },
        "deepseek-moe": {"runs": [], "skipped": {"deepseek-moe": "needs 32.8 GB of disk"}},
        "switch-128": {"runs": [], "skipped": {}},
    }  # fmt: skip

    def ran(command: list[str], **_: Any) -> SimpleNamespace:
        name = command[command.index("--models") + 1]
        assert command[command.index("--llama-cpp") + 1] == str(tmp_path / "llama.cpp")
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"metrics": answers[name]}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", ran)
    monkeypatch.setattr(results, "commit", lambda: "unknown")  # it asks git by subprocess
    monkeypatch.setattr(results, "machine", dict)
    result = results.run(item.ITEM, Settings(out=tmp_path, llama_cpp=tmp_path / "llama.cpp"), print)
    section = item.section(result)
    assert section.tables[0].rows[0][4] == "4.00 (disturbed)"
    assert section.tables[0].rows[1][4] == "0.50"
    text = " ".join(section.notes)
    assert "1 of 3 runs were disturbed, others having up to 50% of the processors" in text
    assert "llama.cpp cannot be told what to route" in text
    assert "deepseek-moe, all: not run: needs 32.8 GB of disk" in text
    peak, faster = section.targets
    assert (peak.asked, peak.got, peak.met) == (6.52, 6.4, True)
    assert (faster.asked, faster.got, faster.met, faster.in_paper) == (7.0, 8.0, True, False)
    assert page.verdict(replace(faster, got=2.0)).startswith(
        "2.00x where we aimed at 7.00x, so we fall short (batch 1, "
    )


def test_a_quick_run_writes_no_checkpoint(tmp_path: Path) -> None:
    result = results.run(item.ITEM, Settings(out=tmp_path, quick=True), print)
    assert result.skipped is not None
    assert "leave --quick out" in result.skipped
