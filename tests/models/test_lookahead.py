"""Gate look-ahead: what it names, that it is off unless asked for, and that it changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from expertflow import ExpertFlowConfig
from expertflow.models.lookahead import MAX_TOKENS, LookAhead, chosen_experts
from tests.families import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen2_moe", tmp_path_factory.mktemp("qwen2_moe"))


def load(folder: Path, look_ahead: bool = True) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=ExpertFlowConfig(cache_size=3, look_ahead=look_ahead)
    )


def step(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[7]])).logits


def test_it_names_what_the_next_router_would_choose(folder: Path) -> None:
    model = load(folder)
    first, second = (model.get_submodule(layer.name) for layer in model.expertflow.moe_layers[:2])
    router = model.get_submodule(model.expertflow.moe_layers[1].name.rpartition(".")[0]).gate
    hidden = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    predicted = first.expertflow.look_ahead.predict(hidden)
    with torch.no_grad():
        chosen = router(hidden)[-1]
    assert {expert.expert for expert in predicted} == set(chosen.flatten().tolist())
    assert {expert.layer for expert in predicted} == {second.expertflow.layer}
    votes = [(chosen == expert.expert).sum().item() for expert in predicted]
    assert votes == sorted(votes, reverse=True)
    assert first.expertflow.look_ahead.predict(hidden.repeat(MAX_TOKENS, 1)) == []
    model.expertflow.close()


def test_it_prefetches_when_asked_and_changes_no_bit(folder: Path) -> None:
    with_it, without = load(folder), load(folder, look_ahead=False)
    for _ in range(4):
        assert torch.equal(step(with_it), step(without))
    assert with_it.expertflow.cache.stats.prefetches > 0
    assert without.expertflow.cache.stats.prefetches == 0
    with_it.expertflow.close()
    without.expertflow.close()


@pytest.mark.parametrize("name", ["minimax_m2", "lfm2_moe", "glm4_moe", "gpt_oss"])
def test_routers_get_what_they_want_beside_hidden_states(name: str, tmp_path: Path) -> None:
    """What is asked ahead, with the very states that the router gets, is what the router chooses."""
    model = load(write_checkpoint(name, tmp_path))
    before = model.expertflow.moe_layers[0]
    ahead = model.get_submodule(before.name).expertflow.look_ahead
    seen: list[Any] = []
    ahead.router.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(input_ids=torch.tensor([[7, 8, 9]]))
    ((states, output),) = seen
    predicted = ahead.predict(states.reshape(-1, states.shape[-1]))
    assert ahead.failure.cause is None
    assert {expert.expert for expert in predicted} == set(chosen_experts(output).flatten().tolist())
    model.expertflow.close()


def test_what_transformers_records_of_routers_is_each_layer_s_once(folder: Path) -> None:
    """It listens by hooks, and look-ahead asks the same routers."""
    with_it, without = load(folder), load(folder, look_ahead=False)
    ids = torch.tensor([[7, 8, 9]])
    for _ in range(2):  # the second time routers are known
        heard, expected = (model(input_ids=ids, output_router_logits=True) for model in (with_it, without))
        assert len(heard.router_logits) == len(expected.router_logits) == len(with_it.expertflow.moe_layers)
        assert all(map(torch.equal, heard.router_logits, expected.router_logits))
        assert torch.equal(heard.aux_loss, expected.aux_loss)
    with_it.expertflow.close()
    without.expertflow.close()


def test_a_router_that_fails_when_asked_ahead_is_not_asked_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, without = load(folder), load(folder, look_ahead=False)
    asked = []

    def fail(self: LookAhead, hidden: torch.Tensor) -> list:
        asked.append(self.layer)
        raise TypeError("forward() missing 1 required argument")

    monkeypatch.setattr(LookAhead, "_predict", fail)
    for _ in range(3):
        assert torch.equal(step(model), step(without))
    assert asked == [1], "no layer after it, and no second time"
    (told,) = [record.getMessage() for record in caplog.records if "look-ahead" in record.getMessage()]
    assert "TypeError: forward() missing 1 required argument" in told
    assert model.expertflow.cache.stats.prefetches == 0
    model.expertflow.close()
    without.expertflow.close()


def test_models_whose_routers_name_no_experts_run_without(tmp_path: Path) -> None:
    folder = write_checkpoint("switch_safetensors", tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        folder, quantization_config=ExpertFlowConfig(cache_size=3, look_ahead=True)
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([[7]]), decoder_input_ids=torch.tensor([[0]]))
    assert model.expertflow.cache.stats.prefetches == 0
    model.expertflow.close()


def test_whoever_keeps_its_error_does_not_keep_the_layer_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traceback holds the frame that asked, and that frame the open layer: the next pass of this thread was
    refused, and those of other threads waited, for as long as somebody kept the error (a failed request does)."""
    model = load(folder)
    expected = step(model)
    with monkeypatch.context() as patch:
        patch.setattr(LookAhead, "predict", lambda self, hidden_TD: 1 / 0)
        with pytest.raises(ZeroDivisionError) as kept:
            step(model)
    assert torch.equal(step(model), expected)
    assert kept.value.__traceback__ is not None
