"""DeepSeek-MoE-16B against a slow reference, written token by token from the published modelling code."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

from expertflow.models.deepseek_moe import (
    DeepseekConfig,
    DeepseekForCausalLM,
    balance_loss,
    has_experts,
    register,
)
from tests.families import VOCAB_SIZE, tensors_on_disk, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint("deepseek_moe", tmp_path_factory.mktemp("deepseek_moe"))


@pytest.fixture
def model(folder) -> DeepseekForCausalLM:
    register()
    return AutoModelForCausalLM.from_pretrained(folder)


def token_ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, tokens), generator=torch.Generator().manual_seed(seed))


class Reference:
    """The published semantics in float64, one token at a time, on the tensors under their published names."""

    def __init__(self, folder: Path):
        self.weights = {key: tensor.double() for key, tensor in tensors_on_disk(folder).items()}
        self.config = json.loads((folder / "config.json").read_text())

    def logits(self, ids_T: Tensor) -> Tensor:
        hidden_TD = self.weights["model.embed_tokens.weight"][ids_T]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            hidden_TD = hidden_TD + self.attention(
                name + "self_attn.", self.norm(name + "input_layernorm.", hidden_TD)
            )
            normed_TD = self.norm(name + "post_attention_layernorm.", hidden_TD)
            mixed = self.dense if layer < self.config["first_k_dense_replace"] else self.experts
            hidden_TD = hidden_TD + torch.stack([mixed(name + "mlp.", token_D) for token_D in normed_TD])
        return self.norm("model.norm.", hidden_TD) @ self.weights["lm_head.weight"].T

    def norm(self, name: str, hidden_TD: Tensor) -> Tensor:
        mean_square = hidden_TD.pow(2).mean(-1, keepdim=True)
        scale = self.weights[name + "weight"]
        return scale * hidden_TD / torch.sqrt(mean_square + self.config["rms_norm_eps"])

    def attention(self, name: str, hidden_TD: Tensor) -> Tensor:
        heads, tokens = self.config["num_attention_heads"], len(hidden_TD)
        query, key, value = (
            (hidden_TD @ self.weights[f"{name}{part}_proj.weight"].T).view(tokens, heads, -1)
            for part in "qkv"
        )
        query, key = self.rotate(query), self.rotate(key)
        rows = []
        for t in range(tokens):
            scores_HT = torch.einsum("hd,thd->ht", query[t], key[: t + 1]) / query.shape[-1] ** 0.5
            rows.append(torch.einsum("ht,thd->hd", scores_HT.softmax(-1), value[: t + 1]).reshape(-1))
        return torch.stack(rows) @ self.weights[name + "o_proj.weight"].T

    def rotate(self, x_THd: Tensor) -> Tensor:
        half = x_THd.shape[-1] // 2
        out = torch.empty_like(x_THd)
        for t in range(len(x_THd)):
            for i in range(half):
                angle = torch.tensor(t / self.config["rope_theta"] ** (i / half), dtype=torch.float64)
                a, b = x_THd[t, :, i], x_THd[t, :, half + i]
                out[t, :, i] = a * angle.cos() - b * angle.sin()
                out[t, :, half + i] = b * angle.cos() + a * angle.sin()
        return out

    def dense(self, name: str, token_D: Tensor) -> Tensor:
        gate = self.weights[name + "gate_proj.weight"] @ token_D
        up = self.weights[name + "up_proj.weight"] @ token_D
        return self.weights[name + "down_proj.weight"] @ (gate * gate.sigmoid() * up)

    def experts(self, name: str, token_D: Tensor) -> Tensor:
        probability_E = (self.weights[name + "gate.weight"] @ token_D).softmax(-1)
        chosen = sorted(range(len(probability_E)), key=lambda e: -probability_E[e].item())
        out_D = self.dense(name + "shared_experts.", token_D)
        for expert in chosen[: self.config["num_experts_per_tok"]]:
            out_D = out_D + probability_E[expert] * self.dense(f"{name}experts.{expert}.", token_D)
        return out_D


@torch.no_grad()
@pytest.mark.parametrize("experts_implementation", ["eager", "grouped_mm"])
def test_logits_are_those_of_the_slow_reference(folder, model, experts_implementation):
    model.set_experts_implementation(experts_implementation)
    ids_BT = token_ids(2, 12)
    expected = torch.stack([Reference(folder).logits(ids_T) for ids_T in ids_BT])
    assert expected.std() > 1
    torch.testing.assert_close(model(ids_BT).logits.double(), expected, rtol=1e-4, atol=1e-4)
    if experts_implementation == "eager":  # grouped_mm knows no float64
        # The norms and the router compute in float32 whatever the model's dtype.
        torch.testing.assert_close(model.double()(ids_BT).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", ["norm_topk_prob", "num_experts_per_tok", "first_k_dense_replace"])
def test_the_reference_comparison_notices_each_routing_field(folder, model, change):
    """Were a field ignored by both sides, their agreement would prove nothing about it."""
    ids_BT = token_ids(1, 8)
    before = model(ids_BT).logits
    config = model.config
    setattr(config, change, {"norm_topk_prob": True}.get(change, 2))
    other = DeepseekForCausalLM(config).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    assert (other(ids_BT).logits - before).abs().max() > 0.01


@torch.no_grad()
def test_generation_with_and_without_the_kv_cache_agree(model):
    ids_BT = token_ids(3, 9)
    ids_BT[0, :4] = 0
    options = {"attention_mask": (ids_BT != 0).long(), "max_new_tokens": 20, "do_sample": False}
    cached = model.generate(ids_BT, use_cache=True, **options)
    assert cached.shape[1] == 29
    assert torch.equal(model.generate(ids_BT, use_cache=False, **options), cached)


@torch.no_grad()
def test_positions_continue_behind_the_cache(model):
    """generate() passes position_ids; callers of forward, such as training code, need not."""
    ids_BT = token_ids(2, 10)
    past = model(ids_BT[:, :6], use_cache=True).past_key_values
    rest = model(ids_BT[:, 6:], past_key_values=past, use_cache=True).logits
    torch.testing.assert_close(rest, model(ids_BT).logits[:, 6:], rtol=1e-4, atol=1e-4)


def test_remote_code_is_neither_asked_for_nor_run(folder, monkeypatch):
    """config.json names Python files in auto_map; our class is local, so nobody may be asked."""
    assert "auto_map" in json.loads((folder / "config.json").read_text())

    def refuse(*args, **kwargs):
        raise AssertionError("remote code was asked for")

    register()
    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr(dynamic_module_utils, "get_class_from_dynamic_module", refuse)
    monkeypatch.setattr("transformers.models.auto.configuration_auto.get_class_from_dynamic_module", refuse)
    monkeypatch.setattr("transformers.models.auto.auto_factory.get_class_from_dynamic_module", refuse)
    assert type(AutoConfig.from_pretrained(folder)) is DeepseekConfig
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is DeepseekForCausalLM


def test_defaults_are_the_published_config():
    published = {
        "aux_loss_alpha": 0.001,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 28,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06,
        "scoring_func": "softmax",
        "tie_word_embeddings": False,
        "vocab_size": 102400,
    }
    config = DeepseekConfig()
    assert {field: getattr(config, field) for field in published} == published
    assert config.rope_parameters["rope_theta"] == 10000
    assert [has_experts(config, layer) for layer in (0, 1, 27)] == [False, True, True]


@pytest.mark.parametrize(
    ("field", "value"), [("scoring_func", "sigmoid"), ("num_experts_per_tok", 65), ("num_experts_per_tok", 0)]
)
def test_another_router_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        DeepseekConfig(**{field: value})


def test_saving_writes_the_published_names_and_bytes(folder, model, tmp_path):
    model.save_pretrained(tmp_path)
    before, after = tensors_on_disk(folder), tensors_on_disk(tmp_path)
    assert set(after) == set(before)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


def test_gradients_reach_every_parameter(model):
    ids_BT = token_ids(4, 32)
    model.train()
    out = model(ids_BT, labels=ids_BT, output_router_logits=True)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_the_balance_loss_is_the_published_one(model):
    ids_BT = token_ids(2, 6)
    out = model(ids_BT, labels=ids_BT, output_router_logits=True)
    assert len(out.router_logits) == 2
    expected = 0.0
    for logits_NE in out.router_logits:
        for logits_TE in logits_NE.view(2, 6, 8):
            counts, means = [0] * 8, logits_TE.softmax(-1).mean(0)
            for logits_E in logits_TE:
                for expert in logits_E.topk(3).indices.tolist():
                    counts[expert] += 1
            expected += (
                sum(count / (6 * 3 / 8) * mean.item() for count, mean in zip(counts, means, strict=True)) / 2
            )
    assert out.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    plain = model(ids_BT, labels=ids_BT)
    assert plain.aux_loss is None
    assert (out.loss - plain.loss).item() == pytest.approx(0.001 * expected, rel=1e-2)


def test_the_balance_loss_of_an_even_router_is_one_per_layer():
    logits_TE = 9 * F.one_hot(torch.arange(8) % 4, 4).float()
    assert balance_loss((logits_TE, logits_TE), batch_size=2, top_k=1).item() == pytest.approx(2)
