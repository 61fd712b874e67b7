"""What the seam to transformers refuses, and what it leaves behind: nothing."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
)

from expertflow import budget
from expertflow.models import attach
from expertflow.models.attach import ExpertFlowConfig
from expertflow.store.throttled import ThrottledStore
from tests.families import write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return write_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def copy(mixtral, tmp_path) -> Path:
    """The checkpoint, for tests that damage it."""
    return Path(shutil.copytree(mixtral, tmp_path / "mixtral"))


def load(folder: Path, device_map: Any = None, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=device_map,
        quantization_config=ExpertFlowConfig(**({"cache_size": 1.5} | settings)),
    )


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=torch.arange(4, 24)[None]).logits


def loader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("expertflow")}


def open_weight_files() -> list[str]:
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # the listing's own
            continue
    return [name for name in names if name.endswith((".safetensors", ".bin"))]


# Refusals.


def test_a_dense_model_is_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(model_type 'llama'\) has no experts"):
        load(tmp_path)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


QUANTIZED = {
    "FP8 or MXFP8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "MXFP4": {"quant_method": "mxfp4"},
    "BITSANDBYTES 4BIT or BITSANDBYTES 8BIT": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "GPTQ": {"quant_method": "gptq", "bits": 4},
}


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, MixtralForCausalLM])
def test_a_quantized_checkpoint_is_refused_in_our_words(copy, method, model_class):
    """transformers' own refusal asks for "the same quantization config class", which is no way out here."""
    edit_config(copy, quantization_config=QUANTIZED[method])
    with pytest.raises(ValueError, match=rf"is quantized \({method}, .* use an unquantized \(bf16\) copy"):
        model_class.from_pretrained(copy, quantization_config=ExpertFlowConfig(cache_size=1.5))


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_a_format_that_transformers_skips_is_refused_too(copy, field):
    """It warns of an unknown method and goes on; quantized dense weights would pass for plain ones."""
    edit_config(copy, **{field: {"quant_method": "ternary"}})
    with pytest.raises(ValueError, match=r"mixtral is quantized \(TERNARY, .* use an unquantized"):
        load(copy)


def test_the_name_of_our_config_is_a_name():
    """A second load meets the first one's config: that is no other format."""
    attach.register()
    name = ExpertFlowConfig.__name__
    assert name == "ExpertFlowConfig"
    assert {name: 1}["ExpertFlowConfig"] == 1
    assert not (name != "ExpertFlowConfig")  # noqa: SIM202 - it is the operator that is tested
    assert name != "LlamaConfig"


def edit_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


W2 = "model.layers.1.block_sparse_moe.experts.5.w2.weight"


def test_an_expert_that_is_missing_is_named(copy):
    edit_weights(copy, lambda weights: weights.pop(W2))
    with pytest.raises(
        ValueError, match=r"7 tensors like .*w2.weight for the 8 experts .* download it again"
    ):
        load(copy)


def test_a_layer_without_experts_is_named(copy):
    def drop(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if ".layers.1.block_sparse_moe.experts" in key]:
            del weights[key]

    edit_weights(copy, drop)
    with pytest.raises(ValueError, match=r"no tensor for model.layers.1.mlp.experts.*'?mixtral"):
        load(copy)


def test_a_wrong_shape_is_named_with_its_file(copy):
    edit_weights(copy, lambda weights: weights.update({W2: torch.zeros(32, 40)}))
    with pytest.raises(
        ValueError, match=r"model.safetensors: tensor .*5.w2.weight has shape \(32, 40\).*\(32, 48\)"
    ):
        load(copy)


def test_a_wrong_dtype_is_named(copy):
    edit_weights(copy, lambda weights: weights.update({W2: torch.zeros(32, 48, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"5.w2.weight is int8; experts must be .* unquantized copy"):
        load(copy)


def test_two_tensors_for_one_parameter_are_named(tmp_path):
    folder = write_checkpoint("gpt_oss", tmp_path)
    packed = "model.layers.0.mlp.experts.down_proj"
    edit_weights(
        folder, lambda weights: weights.update({packed.removeprefix("model."): weights[packed].clone()})
    )
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj and .* are both .*delete the one"):
        load(folder)


@pytest.mark.parametrize(
    "fields", [{"intermediate_size": 64}, {"num_local_experts": 16}, {"hidden_size": 64}]
)
def test_a_config_of_another_model_is_refused(copy, fields):
    edit_config(copy, **fields)
    with pytest.raises(ValueError, match=r"do not belong together|checkpoint is incomplete"):
        load(copy)


def test_too_little_memory_is_refused_with_the_least_that_works(mixtral, monkeypatch):
    monkeypatch.setattr(budget, "process_bytes", lambda: 300 * 2**20)
    with pytest.raises(ValueError, match="is too small") as refusal:
        load(mixtral, cache_size=None, memory="301MiB")
    text = str(refusal.value)
    for part in ("interpreter and libraries", "dense weights", "KV cache", "scratch", "2 expert slots"):
        assert part in text
    smallest = int(text.rsplit("smallest budget that works is ", 1)[1].split("MiB")[0])
    with pytest.raises(ValueError, match=f"smallest budget that works is {smallest}MiB"):
        load(mixtral, cache_size=None, memory=f"{smallest - 1}MiB")
    model = load(mixtral, cache_size=None, memory=f"{smallest}MiB")
    assert model.expertflow.plan.total_bytes <= smallest * 2**20
    assert torch.isfinite(logits(model)).all()
    model.expertflow.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memry": "6GiB"}, "no setting 'memry'; it has: memory, cache_size"),
        ({"policy": "best"}, "policy='best' is unknown; it can be: .*lru"),
        ({"store": "cloud"}, "store='cloud' is unknown"),
        ({"link": "2GB"}, "link='2GB' is not per second"),
        ({"memory": "6GiB"}, "both set the number of slots"),
    ],
)
def test_settings_are_checked_before_anything_is_read(settings, message):
    with pytest.raises(ValueError, match=message):
        load(Path("there-is-no-such-folder"), **settings)


@pytest.mark.parametrize("store", ["disk", "ram"])
def test_experts_come_over_the_link_that_was_asked_for(mixtral, monkeypatch, store):
    slept: list[float] = []
    held = partial(ThrottledStore, clock=lambda: 100.0 + sum(slept), sleep=slept.append)
    monkeypatch.setattr(attach, "ThrottledStore", held)
    unhindered, hindered = (load(mixtral, store=store, link=link) for link in (None, "1MB/s"))
    try:
        assert torch.equal(logits(unhindered), logits(hindered))
        hindered.expertflow.cache.wait_idle()
        stats = hindered.expertflow.cache.stats
        assert stats.bytes_read > 0
        # The clock stands still but for sleep, so every read but one that begins later waits for its bytes.
        assert sum(slept) == pytest.approx(stats.bytes_read / 1e6, rel=1e-6)
        assert stats.io_mode.endswith("held to 1 MB/s")
        assert not unhindered.expertflow.cache.stats.io_mode.endswith("/s")
    finally:
        unhindered.expertflow.close()
        hindered.expertflow.close()


@pytest.mark.parametrize("device_map", ["cuda:99", {"": 99}, "balanced", {"": "disk"}])
def test_another_device_is_refused(mixtral, device_map):
    with pytest.raises(ValueError, match=r"device_map=.* is no device that torch can use: torch .* sees"):
        load(mixtral, device_map=device_map)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_the_cpu_may_be_named(mixtral, device_map):
    load(mixtral, device_map=device_map).expertflow.close()


def test_saving_is_refused_with_the_reason(mixtral, tmp_path, caplog):
    model = load(mixtral)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "copy")
    assert f"the experts are in {mixtral}" in caplog.text
    assert not list((tmp_path / "copy").glob("*.safetensors"))
    model.expertflow.close()


# Sharing, and cleaning up.


def test_two_models_on_one_checkpoint(mixtral):
    """Interleaved, one layer here and one there: neither sees the other."""
    alone = load(mixtral)
    expected = logits(alone)
    alone.expertflow.close()
    first, second = load(mixtral), load(mixtral, cache_size=4)
    running: list[Tensor] = []

    def run_the_other(*_: Any) -> None:
        running.append(logits(second))

    first.get_submodule(first.expertflow.moe_layers[1].name).register_forward_pre_hook(run_the_other)
    assert torch.equal(logits(first), expected)
    assert torch.equal(running[0], expected)
    second.expertflow.close()
    assert torch.equal(logits_without_hooks(first), expected)
    first.expertflow.close()


def logits_without_hooks(model: PreTrainedModel) -> Tensor:
    model.get_submodule(model.expertflow.moe_layers[1].name)._forward_pre_hooks.clear()
    return logits(model)


def test_two_processes_on_one_checkpoint(mixtral, tmp_path):
    """The other starts, runs and ends while this one has the files open."""
    model = load(mixtral)
    expected = logits(model)
    program = (
        "import sys, torch; from pathlib import Path; from tests.models.test_attach import load, logits; "
        "torch.save(logits(load(Path(sys.argv[1]))), sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", program, mixtral, tmp_path / "logits.pt"], cwd=ROOT, check=True, timeout=240
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    assert torch.equal(logits(model), expected)
    model.expertflow.close()


def test_the_last_reference_gone_stops_the_thread_and_closes_the_files(mixtral):
    gc.collect()
    before = loader_threads(), open_weight_files()
    model = load(mixtral)
    logits(model)
    assert len(loader_threads() - before[0]) == 1
    assert len(open_weight_files()) > len(before[1])
    del model
    gc.collect()
    assert loader_threads() == before[0]
    assert open_weight_files() == before[1]


def test_a_closed_model_says_so(mixtral):
    model = load(mixtral)
    model.expertflow.close()
    model.expertflow.close()
    with pytest.raises(RuntimeError, match="closed; load the model again"):
        logits(model)


def test_a_failed_load_leaves_nothing_behind(mixtral, copy, monkeypatch):
    gc.collect()
    before = loader_threads(), open_weight_files()

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the disk is on fire")

    with monkeypatch.context() as patch:  # after the dense weights, before the cache
        patch.setattr(attach, "RamStore", broken)
        with pytest.raises(OSError, match="on fire"):
            load(mixtral, store="ram")
    edit_weights(copy, lambda weights: weights.pop(W2))
    with pytest.raises(ValueError, match="7 tensors"):
        load(copy)
    gc.collect()
    assert loader_threads() == before[0]
    assert open_weight_files() == before[1]


def test_the_same_checkpoint_loads_plainly_afterwards(mixtral):
    """Registration and patterns of ignored keys must not leak into models loaded without us."""
    load(mixtral).expertflow.close()
    model, info = AutoModelForCausalLM.from_pretrained(mixtral, output_loading_info=True)
    assert not any(info.values())
    assert not hasattr(model, "expertflow")
    assert model.config._experts_implementation != "expertflow"
    assert model.get_submodule("model.layers.0.mlp.experts").down_proj.shape == (8, 32, 48)
