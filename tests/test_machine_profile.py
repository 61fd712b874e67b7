"""`expertflow measure`: this machine's figures, as the simulator takes them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from expertflow import machine_profile, measure
from expertflow.cli import app
from expertflow.disturbance import Disturbance, Watch
from expertflow.machine_profile import DEFAULT_SHAPE, profile_machine, save_profile
from expertflow.sim.hardware import costs, hardware
from expertflow.step_time import Machine, Multiplication
from tests.families import write_checkpoint

PER_BYTE = Multiplication((1,), (1e-10,))
MACHINE = Machine(PER_BYTE, PER_BYTE, 2e9, 1e-4, 3e-3, 2e-4, 0.0, 2)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """MACHINE without measuring; what was asked for."""
    asked: list[dict] = []

    def give(**conditions: object) -> Machine:
        asked.append(conditions)
        return Machine(
            PER_BYTE, PER_BYTE, float(str(conditions["load_bytes_per_s"])), 1e-4, 3e-3, 2e-4, 0.0, 2
        )

    monkeypatch.setattr(machine_profile, "measure_machine", give)
    monkeypatch.setattr(machine_profile, "measure_disk", lambda *_: 1.5e9)
    monkeypatch.setattr(machine_profile, "measure_copy_bandwidth", lambda: 8e9)
    monkeypatch.setattr(Watch, "so_far", lambda self: Disturbance(0.0, 0.01))
    return asked


def test_a_profile_comes_back_as_the_hardware_it_describes(measured: list[dict], tmp_path: Path) -> None:
    profile = profile_machine(None)
    save_profile(profile, tmp_path / "mine.json")
    found = hardware(str(tmp_path / "mine.json"))
    assert (found.name, found.link_bytes_per_s) == ("mine", 1.5e9)
    assert (found.memory_bytes_per_s, found.call_seconds, found.layer_seconds) == (
        pytest.approx(1e10),
        2e-4,
        3e-3,
    )
    assert profile.shape == DEFAULT_SHAPE
    assert measured[0]["expert_matrix"] == (1408, 2048)
    cost = costs(found, expert_bytes=10_000_000, dense_bytes=0)
    assert cost.dense_s == 3e-3, "a layer takes its time even where its weights are not known"
    assert cost.expert_s == pytest.approx(2e-4 + 1e-3)
    said = json.loads((tmp_path / "mine.json").read_text())
    assert said["measured"]["disturbance"] == {"stolen": 0.0, "others": 0.01, "disturbed": False}


@pytest.mark.parametrize(
    ("store", "link", "bandwidth", "where"),
    [
        ("ram", None, 8e9, "RAM"),
        ("ram", "5GB/s", 5e9, "RAM, held to 5 GB/s"),
        ("ram", "25GB/s", 8e9, "RAM, held to 25 GB/s"),
        ("disk", "1GB/s", 1e9, ", held to 1 GB/s"),
    ],
)
def test_where_experts_come_from(
    measured: list[dict], store: str, link: str, bandwidth: float, where: str
) -> None:
    profile = profile_machine(None, store, link)
    assert profile.hardware.link_bytes_per_s == bandwidth
    assert profile.link.endswith(where)


def test_a_models_shapes_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_WORKING_SET_BYTES", 4 << 20)
    folder = write_checkpoint("qwen2_moe", tmp_path / "qwen2_moe")
    profile = profile_machine(str(folder))
    assert profile.hardware.link_bytes_per_s > 0
    assert profile.machine.expert.rows[0] == 1
    assert f"experts of {folder}" in profile.shape
    assert f"disk of {folder}" in profile.link


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["measure", *arguments])


def test_the_command(measured: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mine.json"
    done = invoke("-o", str(out))
    assert done.exit_code == 0, done.output
    assert "1.5 GB/s" in done.stdout
    assert "layer_seconds" in done.stdout
    assert "not to be trusted" not in done.output
    assert out.exists()
    monkeypatch.setattr(Watch, "so_far", lambda self: Disturbance(0.3, 0.0))
    done = invoke()
    assert "not to be trusted: 30% of the processors' time stolen" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "profile.txt"], "a profile is a .json file"),
        (["-o", "nowhere/mine.json"], "in a folder that exists"),
        (["--store", "tape"], "store='tape' is unknown"),
        (["--link", "2GB"], "link='2GB' is not per second"),
    ],
)
def test_what_users_get_wrong(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_products_go_on_within_the_block_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_WORKING_SET_BYTES", 1 << 24)
    multiplied = threading.Event()
    monkeypatch.setattr(torch, "mv", lambda *_: multiplied.set())
    with measure._products_meanwhile():
        assert multiplied.wait(60)
    assert "expertflow-measure" not in [thread.name for thread in threading.enumerate()]


def test_ctrl_c_while_the_products_begin_is_no_other_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that was never started cannot be joined."""
    monkeypatch.setattr(measure, "_WORKING_SET_BYTES", 1 << 24)

    def interrupted(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), measure._products_meanwhile():
        pytest.fail("it never began")
