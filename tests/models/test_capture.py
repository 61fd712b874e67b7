"""Recorded routes are what transformers' own routers choose, sequence by sequence, padding left out."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from expertflow.models.attach import ExpertFlowConfig
from expertflow.models.capture import capture_routes, count_source_layers, routed_experts_per_token
from expertflow.models.fingerprint import fingerprint
from tests.families import FAMILIES, NUM_EXPERTS, write_checkpoint

PROMPTS = [[40, 41, 42, 43, 44, 45, 46, 47, 48], [60, 61, 62], [99]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("capture")
    return {
        name: write_checkpoint(name, root / name)
        for name in ("qwen2_moe", "switch", "nllb_moe", "deepseek_moe")
    }


def load(folder: Path, name: str, offloaded: bool = True, **settings: Any) -> PreTrainedModel:
    auto = AutoModelForSeq2SeqLM if FAMILIES[name].seq2seq else AutoModelForCausalLM
    config = {"quantization_config": ExpertFlowConfig(cache_size=3, batch=4, **settings)} if offloaded else {}
    return auto.from_pretrained(folder, **config).eval()


def padded(prompts: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids, mask = (
        torch.zeros(len(prompts), longest, dtype=torch.long),
        torch.zeros(len(prompts), longest, dtype=torch.long),
    )
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return ids, mask


@torch.no_grad()
def test_decoder_only_routes_equal_the_routers_own(folders: dict[str, Path]) -> None:
    """Prompts of three lengths, padded on the left, then one step with the KV cache: every kept position."""
    plain = load(folders["qwen2_moe"], "qwen2_moe", offloaded=False)
    hidden: list[Tensor] = []
    gates = [module for name, module in plain.named_modules() if name.endswith("mlp.gate")]
    for gate in gates:
        gate.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach().reshape(-1, 32)))
    model = load(folders["qwen2_moe"], "qwen2_moe")
    ids, mask = padded(PROMPTS, left=True)
    step, longer = torch.tensor([[7], [8], [9]]), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    for each in (plain, model):
        with capture_routes(model) as capture:
            out = each(input_ids=ids, attention_mask=mask)
            each(input_ids=step, attention_mask=longer, past_key_values=out.past_key_values)
    prefill, decode = capture.passes
    for number, (routed, width, keep) in enumerate(
        [(prefill, 9, mask.bool()), (decode, 1, torch.ones(3, 1, dtype=torch.bool))]
    ):
        assert routed.side == "target"
        for layer, gate in enumerate(gates):
            probability = (hidden[2 * number + layer] @ gate.weight.T).softmax(-1).view(3, width, -1)
            for row, sequence in enumerate(routed.sequences()):
                expected = probability[row][keep[row]].topk(3)
                np.testing.assert_array_equal(sequence.routes_TLK[:, layer], expected.indices)
                np.testing.assert_allclose(sequence.weights_TLK[:, layer], expected.values, rtol=1e-4)
    assert [list(sequence.ids_T) for sequence in prefill.sequences()] == PROMPTS
    assert [list(sequence.ids_T) for sequence in decode.sequences()] == [[7], [8], [9]]


@torch.no_grad()
def test_switch_routes_equal_the_routers_own_on_both_sides(folders: dict[str, Path]) -> None:
    """With an expert capacity of 4, tokens are dropped; these are routed nowhere, with no weight."""
    prompts = [[*range(40, 70)], [60, 61, 62]]
    ids, mask = padded(prompts, left=False)
    target = torch.tensor([[0, 50, 51], [0, 70, 71]])
    plain = load(folders["switch"], "switch", offloaded=False)
    masks: list[Tensor] = []
    for name, module in plain.named_modules():
        if name.endswith("mlp.router"):
            module.register_forward_hook(lambda module, args, output: masks.append(output[0].detach()))
    plain(input_ids=ids, attention_mask=mask, decoder_input_ids=target)
    model = load(folders["switch"], "switch")
    assert count_source_layers(model) == 2
    with capture_routes(model) as capture:
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=target)
    source, decoder = capture.take()
    assert capture.take() == []
    assert (source.side, decoder.side) == ("source", "target")
    assert [list(sequence.ids_T) for sequence in source.sequences()] == prompts
    assert [list(sequence.ids_T) for sequence in decoder.sequences()] == target.tolist()
    dropped = 0
    for routed, found in ((source, masks[:2]), (decoder, masks[2:])):
        for layer, mask_BTE in enumerate(found):
            for row, sequence in enumerate(routed.sequences()):
                one_hot_TE = mask_BTE[row].reshape(-1, NUM_EXPERTS)[: len(sequence.ids_T)]
                nowhere = one_hot_TE.sum(-1) == 0
                expected = one_hot_TE.argmax(-1).masked_fill(nowhere, NUM_EXPERTS)
                np.testing.assert_array_equal(sequence.routes_TLK[:, layer, 0], expected)
                assert ((sequence.weights_TLK[:, layer, 0] == 0) == nowhere.numpy()).all()
                dropped += int(nowhere.sum())
    assert dropped > 0


@pytest.mark.parametrize(
    ("name", "top_k"), [("qwen2_moe", 3), ("switch", 1), ("nllb_moe", 2), ("deepseek_moe", 3)]
)
def test_experts_per_token_are_found_by_running_one(folders: dict[str, Path], name: str, top_k: int) -> None:
    assert routed_experts_per_token(load(folders[name], name)) == top_k


@torch.no_grad()
def test_nothing_is_left_behind(folders: dict[str, Path]) -> None:
    model = load(folders["qwen2_moe"], "qwen2_moe")
    ids = torch.tensor([PROMPTS[0]])
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    with contextlib.suppress(KeyError), capture_routes(model) as capture:
        with pytest.raises(ValueError, match="recorded already"), capture_routes(model):
            pass
        model(input_ids=ids)
        raise KeyError
    model(input_ids=ids)
    assert len(capture.passes) == 1
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks


@torch.no_grad()
def test_a_pass_that_failed_is_left_out(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes between two layers: the half pass must not be joined to the next one's routes."""
    model = load(folders["qwen2_moe"], "qwen2_moe")
    ids = torch.tensor([PROMPTS[0]])
    second = model.get_submodule("model.layers.1.mlp")
    hook = second.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with capture_routes(model) as capture:
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids)
        hook.remove()
        model(input_ids=ids)
    (routed,) = capture.passes
    assert len(routed.routes_L) == 2


def test_embeddings_instead_of_tokens_are_refused(folders: dict[str, Path]) -> None:
    model = load(folders["qwen2_moe"], "qwen2_moe")
    with capture_routes(model), pytest.raises(ValueError, match="with input_ids, not embeddings"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


def test_the_fingerprint_knows_a_model_from_another(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same for a moved copy from another transformers; another for other weights or another config."""
    first = fingerprint(load(folders["qwen2_moe"], "qwen2_moe"))
    assert len(first) == 16
    assert int(first, 16) >= 0
    copy = shutil.copytree(folders["qwen2_moe"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9", "_name_or_path": "x/y"})
    )
    assert fingerprint(load(copy, "qwen2_moe", policy="lru", context=99)) == first
    (copy / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 2}))
    assert fingerprint(load(copy, "qwen2_moe")) != first
    other = write_checkpoint("qwen2_moe", tmp_path / "other", seed=1)
    assert fingerprint(load(other, "qwen2_moe")) != first
