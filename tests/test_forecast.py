"""Forecasts: arithmetic against hand-made sums and a brute-force schedule, the rest against tiny models."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from transformers import AutoModelForCausalLM

from expertflow import forecast as forecast_module
from expertflow import measure
from expertflow.cache.plan import CachePlan, Load
from expertflow.cache.policies import POLICIES
from expertflow.cache.slots import SlotTable
from expertflow.config import Settings
from expertflow.core import ExpertId, MoEShape
from expertflow.forecast import Forecast, plan_model, run_plan
from expertflow.models.attach import ExpertFlowConfig
from expertflow.step_time import (
    Machine,
    Multiplication,
    Pass,
    Work,
    distinct_experts,
    expected_layer_seconds,
    forecast_speed,
    layer_seconds,
    prompt_hit_ratio,
    prompt_tokens,
    typical_hit_ratio,
)
from tests.families import write_checkpoint
from tests.test_hub_headers import COMMIT, REPO, online, serve

__all__ = ["online"]  # a fixture

# Two layers of four experts of 10 bytes, top-2; 0.1 s to multiply an expert, 0.6 s to load it.
STEP = Pass(layers=2, experts_per_layer=(4, 4), dense_bytes=100, head_bytes=20)
WORK = Work(STEP, STEP, top_k=2, expert_bytes=10, expert_read_bytes=10, kv_bytes_per_token=0)
PER_BYTE = Multiplication((1, 5), (0.01, 0.01))
MACHINE = Machine(
    PER_BYTE,
    PER_BYTE,
    load_bytes_per_s=20,
    load_latency_s=0.1,
    layer_overhead_s=0.05,
    expert_overhead_s=0.02,
    row_s=0.0,
    threads=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen2_moe", tmp_path_factory.mktemp("tiny") / "qwen2_moe")


# --- arithmetic


def test_decode_step_by_hand() -> None:
    speed = forecast_speed("", WORK, MACHINE, Settings(), hit_ratio=0.5)
    # A layer: no miss .24 (1 of 4), one miss .6 + .12 (2 of 4), two misses 1.2 + .12 (1 of 4): .75 in all.
    # Twice that, dense 1.0 and head .2, two overheads of .05.
    assert speed.decode.seconds == pytest.approx(2 * 0.75 + 1.2 + 0.1)
    assert speed.decode.load_seconds == pytest.approx(2 * 2 * 0.5 * 0.6)
    assert speed.decode.dense_seconds == pytest.approx(1.2)
    assert speed.decode.expert_seconds == pytest.approx(2 * 2 * 0.1)
    assert speed.decode.overhead_seconds == pytest.approx(2 * 2 * 0.02 + 0.1)
    assert speed.decode_tokens_per_s == pytest.approx(1 / 2.8)
    assert speed.bytes_per_token == pytest.approx(20)


def test_decode_step_without_overlap_by_hand() -> None:
    speed = forecast_speed("", WORK, MACHINE, Settings(overlap=False), hit_ratio=0.5)
    assert speed.decode.seconds == pytest.approx(2 * (0.24 + 0.6) + 1.2 + 0.1)


def test_prompt_chunk_by_hand() -> None:
    speed = forecast_speed(
        "", WORK, MACHINE, Settings(prefill_chunk=10), hit_ratio=0.9, prefill_hit_ratio=0.0
    )
    # Ten tokens reach 4 * (1 - .5 ** 10) = 3.996 experts of each layer, which load one after the other. Dense
    # matrices were measured up to 5 rows, so 10 cost twice as much; the head runs on the last token only.
    layer = 3.99609375 * (4 * 0.6 + (0.1 * 5.004887585532747 / 5 + 0.02)) / 4
    assert speed.prefill.seconds == pytest.approx(2 * layer + 2.0 + 0.2 + 0.1)
    assert speed.prefill_tokens_per_s == pytest.approx(10 / speed.prefill.seconds)


@pytest.mark.parametrize("seed", range(200))
def test_layer_seconds_against_a_schedule(seed: int) -> None:
    draw = random.Random(seed)
    hits, misses = draw.randrange(6), draw.randrange(6)
    load_s, multiply_s = draw.uniform(0.1, 2), draw.uniform(0.1, 2)
    arrivals = [0.0] * hits + [load_s * (index + 1) for index in range(misses)]
    now = 0.0
    for arrival in arrivals:
        now = max(now, arrival) + multiply_s
    assert layer_seconds(hits, misses, load_s, multiply_s, overlap=True) == pytest.approx(now)
    serial = misses * load_s + (hits + misses) * multiply_s
    assert layer_seconds(hits, misses, load_s, multiply_s, overlap=False) == pytest.approx(serial)


def test_each_token_of_a_prompt_pays_for_its_rows_in_every_moe_layer() -> None:
    plain, with_rows = (
        forecast_speed("", WORK, replace(MACHINE, row_s=row_s), Settings(), hit_ratio=1.0)
        for row_s in (0.0, 0.001)
    )
    layers = len(WORK.prefill.experts_per_layer)
    added = with_rows.prefill.seconds - plain.prefill.seconds
    assert added == pytest.approx(layers * prompt_tokens(Settings()) * 0.001)
    assert with_rows.decode.seconds - plain.decode.seconds == pytest.approx(layers * 0.001)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_distinct_experts_against_draws(tokens: int) -> None:
    draw = random.Random(0)
    counts = [len({e for _ in range(tokens) for e in draw.sample(range(8), 3)}) for _ in range(4000)]
    assert distinct_experts(8, 3, tokens) == pytest.approx(sum(counts) / len(counts), rel=0.02)


def test_expected_layer_seconds_against_draws() -> None:
    draw = random.Random(0)
    total = 0.0
    for _ in range(20000):
        misses = sum(draw.random() > 0.7 for _ in range(4))
        total += layer_seconds(4 - misses, misses, 1.0, 0.3, overlap=True)
    assert expected_layer_seconds(4.0, 0.7, 1.0, 0.3, overlap=True) == pytest.approx(total / 20000, rel=0.02)


@pytest.mark.parametrize(
    ("num_layers", "num_slots"), [(1, 3), (2, 4), (2, 8), (2, 12), (4, 16), (6, 14), (3, 24)]
)
def test_prompt_hit_ratio_against_the_cache(num_layers: int, num_slots: int) -> None:
    """Each layer finds its share. (It once found nothing: the layer before had taken its slots.)"""
    plan = CachePlan(SlotTable(num_slots), POLICIES["lru"](MoEShape((8,) * num_layers), num_slots))
    hits = []
    for chunk in range(12):
        for layer in range(num_layers):
            opened = plan.open_layer(layer, [ExpertId(layer, expert) for expert in range(8)])
            if chunk > 5:
                hits.append(len(opened.ready) / 8)
            there, loads = list(opened.ready), list(opened.actions)
            while there or loads:
                if there:
                    loads += plan.release(there.pop(0))
                else:
                    load = loads.pop(0)
                    assert isinstance(load, Load)
                    loads += plan.load_finished(load.expert)
                    there.append(load.expert)
    # Slots are whole, so a share of 2.8 is 2 in some layers and 3 in others.
    assert prompt_hit_ratio(num_slots, num_layers, 8) == pytest.approx(sum(hits) / len(hits), abs=0.1)


def test_everything_needed_at_large_batch_and_width_is_finite() -> None:
    wide = replace(WORK, prefill=replace(STEP, experts_per_layer=(512,)))
    speed = forecast_speed("", wide, MACHINE, Settings(prefill_chunk=2048), hit_ratio=0.5)
    assert 0 < speed.prefill_tokens_per_s < float("inf")


def test_past_tokens_cost_reads_of_the_cache() -> None:
    work = replace(WORK, kv_bytes_per_token=2)
    short, long = (forecast_speed("", work, MACHINE, Settings(), 1.0, past=past).decode for past in (0, 10))
    assert long.seconds - short.seconds == pytest.approx(3 * 10 * 2 * 0.01)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"load_bytes_per_s": 1.0}, "loading"),
        ({"load_bytes_per_s": 1e9, "load_latency_s": 0.0}, "arithmetic"),
        ({"load_bytes_per_s": 1e9, "layer_overhead_s": 9.0}, "overhead"),
    ],
)
def test_bound(changes: dict[str, float], bound: str) -> None:
    assert forecast_speed("", WORK, replace(MACHINE, **changes), Settings(), 0.5).decode.bound == bound


def test_multiplication_between_and_beyond_its_points() -> None:
    cost = Multiplication((1, 3, 5), (1.0, 2.0, 6.0))
    assert [cost.seconds(10, rows) for rows in (0.5, 1, 2, 3, 4, 5, 10)] == [10, 10, 15, 20, 40, 60, 120]


@pytest.mark.parametrize("ratio", [-0.1, 1.01, float("nan")])
def test_hit_ratio_out_of_range(folder: Path, ratio: float) -> None:
    with pytest.raises(ValueError, match=r"hit_ratio=.* between 0 .* and 1"):
        plan_model(folder, Settings(memory="2GiB"), hit_ratio=ratio, machine=MACHINE)


# --- a model folder


def plan(folder: Path, **settings: Any) -> Forecast:
    return plan_model(folder, Settings(**settings), machine=MACHINE)


def test_sizes_of_a_folder(folder: Path) -> None:
    found = plan(folder, memory="4GiB")
    # 2 layers of 8 experts of 3 matrices of 24 x 32 float32.
    assert (found.num_experts, found.top_k, found.work.expert_read_bytes) == (16, 3, 3 * 24 * 32 * 4)
    assert found.expert_bytes == 16 * 3 * 24 * 32 * 4
    assert found.total_bytes == (folder / "model.safetensors").stat().st_size
    header_bytes = found.total_bytes - found.expert_bytes - found.dense_bytes
    assert 0 < header_bytes < 20_000
    assert found.fits
    assert found.memory.num_slots == 16


def test_reads_headers_only(folder: Path, tmp_path: Path) -> None:
    """The data is overwritten with a hole of the same size; had anything read it, the sums would be off."""
    copy = Path(shutil.copytree(folder, tmp_path / "hollow"))
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:end])
    with weights.open("r+b") as file:
        file.truncate(len(content))
    assert plan(copy, memory="4GiB").speeds == plan(folder, memory="4GiB").speeds


@pytest.mark.parametrize("name", ["switch", "nllb_moe"])
def test_encoder_reads_prompts_and_decoder_writes(name: str, tmp_path: Path) -> None:
    found = plan(write_checkpoint(name, tmp_path / name), memory="4GiB")
    assert found.work.prefill.experts_per_layer == found.work.decode.experts_per_layer == (8, 8)
    assert found.work.prefill.dense_bytes < found.work.decode.dense_bytes  # no attention across
    assert found.top_k == {"switch": 1, "nllb_moe": 2}[name]


def test_too_small_a_budget_is_a_forecast_for_the_smallest(folder: Path) -> None:
    small = plan(folder, memory="10MiB")
    assert not small.fits
    assert small.memory.num_slots == 2
    assert "does not fit in 10 MiB; the smallest budget that works is" in forecast_module.verdict(small)
    # A test that the named budget is one: nothing between it and the next MiB is refused.
    assert plan(folder, memory=small.smallest_budget + 2**24).fits
    assert small.expected.decode_tokens_per_s > 0


def test_estimate_follows_from_the_share_that_fits(folder: Path) -> None:
    found = plan(folder, cache_size=2)
    assert found.memory.resident_share == 0.25
    assert found.expected.label == "estimate"
    assert found.expected.hit_ratio == pytest.approx(0.25**0.6)
    # Chunks of 512 tokens need all 8 experts of both layers, and there are 4 slots.
    assert found.expected.prefill_hit_ratio == 0.25
    assert [speed.hit_ratio for speed in found.speeds[1:]] == [0.0, 0.25, 0.9, 1.0]
    assert "0.25 ** 0.6" in forecast_module.hit_ratio_note(found)
    assert typical_hit_ratio(1.0) == 1.0


def test_given_hit_ratio(folder: Path) -> None:
    found = plan_model(folder, Settings(cache_size=2), hit_ratio=0.5, machine=MACHINE)
    assert (found.expected.label, found.expected.hit_ratio, found.expected.prefill_hit_ratio) == (
        "given",
        0.5,
        0.25,
    )
    assert "given" in forecast_module.hit_ratio_note(found)


@pytest.mark.parametrize(
    "setting", [{"batch": 4}, {"prefill_chunk": 4}, {"overlap": False}, {"cache_size": 1.0}]
)
def test_settings_have_an_effect(folder: Path, setting: dict[str, Any]) -> None:
    assert plan(folder, **{"cache_size": 4.0, **setting}).expected != plan(folder, cache_size=4.0).expected


def test_a_link_bounds_what_is_loaded(folder: Path) -> None:
    assert plan(folder, cache_size=4, link=7).machine.load_bytes_per_s == 7
    assert plan(folder, cache_size=4, link="1MB/s").machine.load_bytes_per_s == MACHINE.load_bytes_per_s
    assert plan(folder, cache_size=1, link=7).expected.decode.load_seconds > 2 * (
        plan(folder, cache_size=1).expected.decode.load_seconds
    )


def test_experts_in_ram_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module.budget, "process_bytes", lambda: 1000)
    on_disk, in_ram = (
        plan(folder, cache_size=2, store=store).memory.process_bytes for store in ("disk", "ram")
    )
    assert in_ram - on_disk == 16 * 3 * 24 * 32 * 4
    assert 1000 < on_disk <= 1000 + 2**23, "and a little, by which `run` holds more"


def test_the_tokenizer_that_run_holds_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    monkeypatch.setattr(forecast_module.budget, "process_bytes", lambda: 1000 + sum(map(len, held)))

    class Tokenizer(str):
        def __del__(self) -> None:
            held.clear()

    def load(where: Path, **_: Any) -> Tokenizer:
        assert where == folder
        held.append("x" * 10**8)
        return Tokenizer()

    without = plan(folder, cache_size=2).memory.process_bytes
    monkeypatch.setattr(forecast_module.AutoTokenizer, "from_pretrained", load)
    assert plan(folder, cache_size=2).memory.process_bytes == without + 10**8


def test_the_smallest_budget_that_plan_names_works_for_run(folder: Path) -> None:
    """Two processes, as a user has them."""
    command = [sys.executable, "-m", "expertflow.cli"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "200"}
    planned = subprocess.run(
        [*command, "plan", folder, "--memory", "10MiB", "--json"],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert planned.returncode == 1, planned.stderr
    smallest = json.loads(planned.stdout)["smallest_budget"]
    ran = subprocess.run(
        [*command, "run", folder, "Hello", "--max-tokens", "2", "--memory", f"{smallest // 2**20}MiB"],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_a_predictor_takes_memory_and_its_setting_is_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast_module.budget, "process_bytes", lambda: 1000)
    without, online = (plan(folder, cache_size=2, predictor=name).memory for name in ("none", "online"))
    assert (without.predictor_bytes, online.predictor_bytes > 0) == (0, True)
    assert online.total_bytes == without.total_bytes + online.predictor_bytes
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=ExpertFlowConfig(cache_size=2, predictor="online")
    )
    assert model.expertflow.plan.predictor_bytes == online.predictor_bytes
    model.expertflow.close()
    smallest = plan(folder, memory="1B", predictor="online").smallest_budget
    assert smallest >= online.predictor_bytes + plan(folder, memory="1B").smallest_budget - (1 << 20)
    with pytest.raises(ValueError, match="neither 'none', 'online', 'draft' nor a folder"):
        plan(folder, predictor="crystal-ball")


# --- what users get wrong


def edit_config(folder: Path, target: Path, **fields: Any) -> Path:
    copy = Path(shutil.copytree(folder, target))
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return copy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"quantization_config": {"quant_method": "mxfp4"}},
            r"is quantized \(MXFP4, .* use an unquantized \(bf16\)",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantized \(FP8, "),
        (
            {"model_type": "perpetuum_mobile"},
            r"no language model of type 'perpetuum_mobile' .* upgrade transformers",
        ),
        ({"model_type": "vit"}, r"no language model of type 'vit'"),
        ({"model_type": None}, "names no model_type"),
        ({"moe_intermediate_size": 48}, "config and weights do not belong together"),
    ],
)
def test_config_that_cannot_be_served(
    folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(edit_config(folder, tmp_path / "edited", **fields), memory="4GiB")


def test_dense_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no experts .* for a dense model use transformers"):
        plan(tmp_path, memory="4GiB")


def test_config_missing_or_broken(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        plan(copy, memory="4GiB")
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json; download it"):
        plan(copy, memory="4GiB")


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        plan(tmp_path / "nowhere", memory="4GiB")


def test_revision_of_a_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="revision='v1' means nothing for the folder"):
        plan_model(folder, Settings(memory="4GiB"), revision="v1", machine=MACHINE)


@pytest.mark.parametrize("past", [-1, 256])
def test_past_outside_the_context(folder: Path, past: int) -> None:
    with pytest.raises(ValueError, match=r"below the context of 256 tokens"):
        plan_model(folder, Settings(memory="4GiB"), past=past, machine=MACHINE)


def test_offline_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"someone/tiny .* HF_HUB_OFFLINE is set"):
        plan_model("someone/tiny", Settings(memory="4GiB"), machine=MACHINE)


def test_downloaded_hub_model_needs_no_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "1" * 40
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = plan_model("someone/tiny", Settings(memory="4GiB"), machine=MACHINE)
    assert found.num_experts == 16
    assert found.commit is None  # nobody was asked


def test_a_hub_model_of_bin_files_is_planned_as_its_folder(tmp_path: Path, online: None) -> None:
    """It was refused: "whose index cannot be read over the network". Switch and NLLB are published so."""
    server = serve(write_checkpoint("switch", tmp_path / "switch"))
    settings = Settings(cache_size=2, context=64)
    try:
        remote = plan_model(REPO, settings, machine=MACHINE, endpoint=server.url)
    finally:
        server.shutdown()
        server.server_close()
    local = plan_model(server.folder, settings, machine=MACHINE)
    assert remote.commit == COMMIT
    assert remote.fetched_bytes < remote.total_bytes / 4
    for field in (
        "model_type",
        "total_bytes",
        "dense_bytes",
        "expert_bytes",
        "num_experts",
        "work",
        "speeds",
    ):
        assert getattr(remote, field) == getattr(local, field)


# --- measuring, and showing


@pytest.fixture
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_WORKING_SET_BYTES", 4 << 20)
    monkeypatch.setattr(measure, "_PROBE_FILE_BYTES", 8 << 20)


@pytest.mark.parametrize("files", [[], [Path("weights.safetensors")]], ids=["probe", "files"])
def test_a_disk_is_measured_beside_arithmetic_which_ends_with_it(tmp_path, monkeypatch, files):
    def arithmetic() -> bool:
        return "expertflow-measure" in [thread.name for thread in threading.enumerate()]

    def read(paths, chunk_bytes):
        assert arithmetic()
        raise OSError("unplugged")

    monkeypatch.setattr(measure, "measure_read_bandwidth", read)
    with pytest.raises(OSError, match="unplugged"):
        measure.measure_disk(tmp_path, files)
    assert not arithmetic()


def test_disk_probe_leaves_nothing_behind(small_probes: None, tmp_path: Path) -> None:
    assert measure.measure_disk(tmp_path / "not" / "yet" / "there") > 1e6
    assert list(tmp_path.iterdir()) == []


def test_full_disk(small_probes: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 93, 7))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="has 7 bytes free"):
        measure.measure_disk(tmp_path)


def test_machine_is_measured_on_the_models_shapes(small_probes: None, folder: Path) -> None:
    found = plan_model(folder, Settings(memory="4GiB", prefill_chunk=16))
    assert found.machine.expert.rows[0] == found.machine.dense.rows[0] == 1
    assert found.machine.dense.rows[-1] == 16
    # 16 tokens of 3 experts each on 8 experts: 6 rows for each.
    assert 6 in found.machine.expert.rows or 7 in found.machine.expert.rows
    # How the time of a layer divides is a small difference of two measurements, and may come out as nothing.
    assert found.machine.layer_overhead_s + found.machine.expert_overhead_s > 0
    assert 1e-7 < found.machine.load_latency_s < 1


def test_command_prints_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "_measure", lambda *_: MACHINE)
    out = io.StringIO()
    assert run_plan(str(folder), Settings(memory="4GiB"), console=Console(file=out, width=200)) == 0
    text = out.getvalue()
    for word in (
        "fits in 4 GiB",
        "slots",
        "per layer",
        "read per token",
        "estimate",
        "uniform routing",
        "prefill tok/s",
    ):
        assert word in text
    assert run_plan(str(folder), Settings(memory="1MiB"), console=Console(file=io.StringIO())) == 1


def test_command_prints_json(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "_measure", lambda *_: MACHINE)
    out = io.StringIO()
    run_plan(
        str(folder), Settings(memory="4GiB"), hit_ratio=0.7, as_json=True, console=Console(file=out, width=40)
    )
    found = json.loads(out.getvalue())
    assert found["fits"] is True
    assert found["speeds"][0]["hit_ratio"] == 0.7
    assert found["speeds"][0]["decode"]["bound"] in ("loading", "arithmetic", "overhead")
    assert found["memory"]["num_slots"] == 16
    assert found["dtype"] == str(torch.float32).removeprefix("torch.")
