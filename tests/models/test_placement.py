"""Where a model computes. torch's view of accelerators is replaced; whole models run on the fake device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import ModelOutput

from expertflow import budget
from expertflow.cache.device import AcceleratorDevice, HostDevice
from expertflow.cache.host_cache import HostCache
from expertflow.config import Settings
from expertflow.models import attach, placement
from expertflow.models.attach import ExpertFlowConfig
from expertflow.models.placement import choose_device, device_memory, slot_device, take_inputs_from_anywhere
from expertflow.store.ram import RamStore
from tests.cache.fake_device import FakeStreams, fake_device
from tests.families import write_checkpoint

GIB = 2**30


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees cuda:0 and cuda:1, and the second is current."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)


@pytest.mark.parametrize(
    ("device", "device_map", "chosen"),
    [
        ("auto", None, "cpu"),
        ("auto", "auto", "cpu"),
        ("cpu", None, "cpu"),
        ("cuda", None, "cuda:1"),
        ("cuda:0", None, "cuda:0"),
        ("auto", "cuda:0", "cuda:0"),
        ("auto", {"": "cpu"}, "cpu"),
        ("auto", {"": torch.device("cuda", 0), "lm_head": torch.device("cuda", 0)}, "cuda:0"),
        ("cuda:0", {"": "cuda:0"}, "cuda:0"),
        ("cuda", "cuda:1", "cuda:1"),
    ],
)
def test_the_device_that_is_named_or_seen(two_gpus, device, device_map, chosen):
    assert choose_device(Settings(device=device), device_map) == torch.device(chosen)


@pytest.mark.parametrize(
    ("device", "device_map", "message"),
    [
        (
            "cuda:2",
            None,
            r"device='cuda:2' is no device that torch can use: torch .* sees cpu, cuda:0, cuda:1",
        ),
        ("xpu", None, r"device='xpu' is no device .* sees cpu, cuda:0, cuda:1"),
        ("meta", None, r"device='meta' is no device"),
        ("gpu", None, r"device='gpu' is no device"),
        ("auto", "balanced", r"device_map='balanced' is no device"),
        ("auto", {"": "disk"}, r"is no device"),
        (
            "auto",
            {"a": "cuda:0", "b": "cuda:1"},
            r"several devices, and expertflow computes on one; name one",
        ),
        ("cpu", "cuda", r"device_map='cuda' and device='cpu' name two devices; give one of them"),
    ],
)
def test_another_device_is_refused_naming_what_torch_sees(two_gpus, device, device_map, message):
    with pytest.raises(ValueError, match=message):
        choose_device(Settings(device=device), device_map)


@pytest.mark.parametrize("settings", [{"device": "cuda:99"}, {"host_memory": "1GiB", "device": "cpu"}])
def test_a_model_is_refused_a_device_that_is_not_there(mixtral, settings):
    with pytest.raises(ValueError, match=r"torch .* sees"):
        load(mixtral, **settings)


def test_without_an_accelerator_it_is_the_cpu(no_gpu):
    assert choose_device(Settings()) == torch.device("cpu")
    assert isinstance(slot_device(Settings()), HostDevice)
    with pytest.raises(ValueError, match=r"device='cuda' .* torch .* sees no accelerator, only cpu"):
        choose_device(Settings(device="cuda"))


def test_slots_go_to_the_device(two_gpus, monkeypatch):
    monkeypatch.setattr("expertflow.cache.device.TorchStreams", lambda device: FakeStreams(0))
    device = slot_device(Settings(device="cuda:0"))
    assert isinstance(device, AcceleratorDevice)
    assert device.torch_device == torch.device("cuda:0")
    assert isinstance(slot_device(Settings(device="cpu")), HostDevice)


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_host_memory_without_an_accelerator_is_refused(no_gpu, device):
    with pytest.raises(ValueError, match=r"host_memory='4GiB' is RAM between .* use memory= instead"):
        choose_device(Settings(device=device, host_memory="4GiB"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host_memory": "4"}, "host_memory='4' has no unit; write '4GiB'"),
        (
            {"host_memory": "4GiB", "store": "ram"},
            "host_memory='4GiB' holds some experts in RAM and store='ram' all",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


@pytest.mark.parametrize("settings", [{"device": "cuda"}, {"host_memory": "4GiB"}])
def test_commands_about_the_cpu_say_so(settings):
    name = next(iter(settings))
    with pytest.raises(
        ValueError, match=rf"{name}='.*': `expertflow plan` is about the CPU so far; leave it out"
    ):
        Settings(**settings).on_cpu("plan")
    assert Settings().on_cpu("check").device == "cpu"


def test_plan_and_check_are_about_the_cpu(mixtral):
    from expertflow.check import check_model
    from expertflow.forecast import plan_model

    with pytest.raises(ValueError, match="`expertflow plan` is about the CPU"):
        plan_model(str(mixtral), Settings(device="cuda"))
    with pytest.raises(ValueError, match="`expertflow check` is about the CPU"):
        check_model(mixtral, Settings(device="cuda"))


# The budget.


def test_memory_of_a_device_is_what_torch_holds_and_most_of_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (10 * GIB, 16 * GIB))
    assert device_memory(torch.device("cuda:0")) == (3 * GIB, 12 * GIB)


def test_ram_for_experts_must_be_free(monkeypatch):
    monkeypatch.setattr(budget, "process_bytes", lambda: GIB)
    monkeypatch.setattr(budget, "free_bytes", lambda: 5 * GIB)
    budget.check_host_memory(4 * GIB, "store='ram'")
    with pytest.raises(
        ValueError, match=r"store='ram' takes 4.5 GiB of RAM, and 4 GiB are free; use .*=4096MiB"
    ):
        budget.check_host_memory(9 * GIB // 2, "store='ram'")


# Whole models, on the fake device.


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return write_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def switch(tmp_path_factory) -> Path:
    return write_checkpoint("switch", tmp_path_factory.mktemp("switch"))


def load(folder: Path, auto: Any = AutoModelForCausalLM, **settings: Any) -> PreTrainedModel:
    return auto.from_pretrained(
        folder, quantization_config=ExpertFlowConfig(**({"cache_size": 1.5} | settings))
    )


@pytest.fixture
def on_fake_device(monkeypatch):
    """Models that are loaded from here on have their slots on a fake device of 8 GiB."""
    made = []

    def load_on_device(folder: Path, auto: Any = AutoModelForCausalLM, seed: int = 0, **settings: Any):
        device = fake_device(FakeStreams(seed, immediate=True))
        monkeypatch.setattr(attach, "slot_device", lambda settings, device_map: device)
        monkeypatch.setattr(attach, "device_memory", lambda torch_device: (1000, 8 * GIB))
        model = load(folder, auto, **settings)
        device.slot = model.expertflow.cache.memory.slot
        made.append(model)
        return model

    yield load_on_device
    for model in made:
        model.expertflow.close()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=torch.arange(4, 24)[None]).logits


TIERS: dict[str, dict[str, Any]] = {
    "disk": {},
    "ram": {"store": "ram"},
    "three": {"host_memory": "1MiB"},
    "predicted": {"predictor": "online"},
    "ahead": {"look_ahead": True},
    "serial": {"overlap": False},
}


@pytest.mark.parametrize("tiers", TIERS)
def test_a_model_on_a_late_device_says_the_same(mixtral, on_fake_device, tiers):
    """Slots are packed there, so products may round otherwise than in place; but alike in all tiers and sizes."""
    reference = load(mixtral)
    expected = logits(reference)
    whole = logits(on_fake_device(mixtral, cache_size=8))
    model = on_fake_device(mixtral, seed=1, **TIERS[tiers])
    for _ in range(3):
        assert torch.equal(logits(model), whole)
    torch.testing.assert_close(whole, expected)
    text = model.generate(torch.arange(4, 9)[None], max_new_tokens=5, do_sample=False)
    assert torch.equal(text, reference.generate(torch.arange(4, 9)[None], max_new_tokens=5, do_sample=False))
    assert model.expertflow.cache.stats.bytes_read > 0
    reference.expertflow.close()


def test_an_encoder_and_its_decoder_on_a_late_device(switch, on_fake_device):
    ids = torch.arange(4, 12)[None]
    reference = load(switch, AutoModelForSeq2SeqLM)
    model = on_fake_device(switch, AutoModelForSeq2SeqLM)
    expected, got = (one.generate(ids, max_new_tokens=6, do_sample=False) for one in (reference, model))
    assert torch.equal(got, expected)
    reference.expertflow.close()


def test_settings_choose_the_tiers(mixtral, on_fake_device):
    three = on_fake_device(mixtral, host_memory="1MiB").expertflow
    assert isinstance(three.cache.store, HostCache)
    assert three.cache.store.num_slots * three.cache.store.slot_bytes <= 2**20
    assert three.cache.stats.io_mode.startswith("ram for ")
    assert isinstance(on_fake_device(mixtral, store="ram").expertflow.cache.store, RamStore)


def test_the_budget_is_the_devices(mixtral, on_fake_device, monkeypatch):
    """Of the device's memory nothing goes to the interpreter, nor to experts that are in RAM."""
    plan = on_fake_device(mixtral, cache_size=None, store="ram").expertflow.plan
    assert (plan.budget_bytes, plan.process_bytes) == (8 * GIB, 1000)
    assert plan.rows()[0][0] == "held on the device before"
    assert plan.model.staging_bytes > 0
    assert on_fake_device(mixtral, predictor="online").expertflow.plan.predictor_bytes == 0
    with pytest.raises(ValueError, match=r"memory=1MiB .* is too small(.|\n)*held on the device before"):
        on_fake_device(mixtral, cache_size=None, memory="1MiB")
    monkeypatch.setattr(budget, "free_bytes", lambda: budget.process_bytes() + 1)
    with pytest.raises(ValueError, match="store='ram' takes"):
        on_fake_device(mixtral, store="ram")
    with pytest.raises(ValueError, match="host_memory='1MiB' takes"):
        on_fake_device(mixtral, host_memory="1MiB")
    with pytest.raises(ValueError, match="host_memory of 4 KiB holds 0 experts"):
        on_fake_device(mixtral, host_memory="4KiB")


def test_dense_weights_go_to_the_device_and_stay_tied(mixtral):
    """To "meta", for which torch must make new parameters, as for devices outside its tree."""
    model = load(mixtral, device="cpu")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    attach.copy_dense_weights(model, model.expertflow.checkpoint, torch.device("meta"))
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.expertflow.close()


# Inputs from elsewhere. "meta" is a device that is not the CPU and there is one everywhere.


class Doubling(nn.Module):
    config = type("Config", (), {"is_encoder_decoder": False})()

    def forward(self, input_ids: Tensor, mask: Any = None, cache: Any = None) -> ModelOutput:
        self.saw = [input_ids.device.type, *(entry.device.type for entry in (mask or {}).values())]
        return ModelOutput(logits=input_ids * 2, hidden=input_ids)


def test_inputs_go_to_the_device_and_logits_where_they_came_from(monkeypatch):
    model: Any = Doubling()
    moves = []
    to = Tensor.to

    def recorded(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moves.append((self.device.type, str(args[0])))
        # Nothing comes back from "meta"; that somebody tries is what counts.
        return torch.zeros(1) if moves[-1] == ("meta", "cpu") else to(self, *args, **kwargs)

    take_inputs_from_anywhere(model, torch.device("meta"))
    monkeypatch.setattr(Tensor, "to", recorded)
    out = model(torch.ones(2), mask={"full": torch.ones(2)})
    assert model.saw == ["meta", "meta"]
    assert moves == [("cpu", "meta"), ("cpu", "meta"), ("meta", "cpu")]
    assert out.logits.device.type == "cpu"
    assert out.hidden.device.type == "meta"
    moves.clear()
    there = torch.ones(2, device="meta")
    assert model(there).logits.is_meta, "a caller on the device stays there"


def test_the_accelerator_that_torch_has_is_asked_for_by_no_name():
    """No torch.cuda anywhere: any torch device runs these lines."""
    root = Path(placement.__file__).parents[1]
    named = [path.name for path in root.rglob("*.py") if "torch.cuda" in path.read_text()]
    assert named == []
