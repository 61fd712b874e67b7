"""The stand-ins for Switch's and NLLB's experts give what transformers' own modules give."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, NllbMoeConfig, SwitchTransformersConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts, NllbMoeTop2Router
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
    SwitchTransformersTop1Router,
)

from expertflow.models.attach import ExpertFlowConfig
from expertflow.models.experts import Attachment
from expertflow.models.switch import (
    OffloadedExperts,
    check_nllb_reads_its_mask_as_expert_numbers,
    find_modulelist_experts,
)
from tests.families import FAMILIES, tensors_on_disk, write_checkpoint

EXPERTS = 6


class AllInMemory:
    """A cache that has every expert, hands them out last first, and notes which were asked for."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.asked: set[int] = set()

    def open_layer(self, layer, experts, meanwhile=None):
        self.asked |= set(experts)
        for expert in reversed(experts):
            parameters = self.module[f"expert_{expert}"].named_parameters()
            yield expert, {role: (parameter,) for role, parameter in parameters}


def stand_in(module: nn.Module) -> tuple[OffloadedExperts, AllInMemory]:
    offloaded, cache = OffloadedExperts.replacing(module), AllInMemory(module)
    offloaded.expertflow = Attachment(cache, 0, EXPERTS)
    return offloaded.eval(), cache


def switch_case(seed: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Switch's experts module and its arguments, from its own router with a capacity of 2 per sequence."""
    torch.manual_seed(seed)
    config = SwitchTransformersConfig(d_model=16, d_ff=24, num_experts=EXPERTS, expert_capacity=2)
    module = SwitchTransformersExperts(config).eval().to(dtype)
    hidden_BTD = torch.randn(2, 11, 16, dtype=dtype)
    mask_BTE, weight_BT1, _ = SwitchTransformersTop1Router(config).eval()(hidden_BTD)
    return module, (hidden_BTD.view(-1, 16), mask_BTE.view(-1, 1, EXPERTS), weight_BT1.view(-1, 1))


def nllb_case(
    seed: int, dtype: torch.dtype = torch.float32, **fields: float
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """NLLB's experts module and its arguments; of 20 tokens 3 are padding and many over capacity."""
    torch.manual_seed(seed)
    defaults = {"moe_eval_capacity_token_fraction": 0.2}
    config = NllbMoeConfig(d_model=16, num_experts=EXPERTS, activation_function="gelu", **(defaults | fields))
    module = NllbMoeExperts(config, ffn_dim=24).eval().to(dtype)
    hidden_TD = torch.randn(20, 16, dtype=dtype)
    padding_T = torch.arange(20) < 3
    mask_TE, weight_TE, _ = NllbMoeTop2Router(config).eval()(hidden_TD, padding_T)
    return module, (hidden_TD, mask_TE, weight_TE)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(10))
def test_switch_equals_transformers(seed):
    module, arguments = switch_case(seed)
    offloaded, _ = stand_in(module)
    torch.testing.assert_close(offloaded(*arguments), module(*arguments))


@torch.no_grad()
def test_switch_tokens_over_capacity_get_exactly_zero():
    module, (hidden_TD, mask_T1E, weight_T1) = switch_case(seed=0)
    dropped_T = mask_T1E.sum(dim=(1, 2)) == 0
    assert 0 < dropped_T.sum() < len(dropped_T)
    weight_T1[dropped_T] = torch.inf  # transformers never looks at it, and zero times infinity is NaN
    offloaded, cache = stand_in(module)
    out_TD = offloaded(hidden_TD, mask_T1E, weight_T1)
    assert torch.equal(out_TD[dropped_T], torch.zeros_like(out_TD[dropped_T]))
    assert (out_TD[~dropped_T] != 0).any(dim=-1).all()
    assert cache.asked == set(mask_T1E[~dropped_T].argmax(dim=-1).flatten().tolist())


@torch.no_grad()
@pytest.mark.parametrize("token_dropout", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(10))
def test_nllb_equals_transformers(seed, token_dropout):
    module, arguments = nllb_case(seed, moe_token_dropout=token_dropout)
    offloaded, _ = stand_in(module)
    expected_TD = module(*arguments)
    assert expected_TD.abs().max() > 0.01
    torch.testing.assert_close(offloaded(*arguments), expected_TD)


@torch.no_grad()
@pytest.mark.parametrize("case", [switch_case, nllb_case])
def test_bf16_equals_transformers_within_its_rounding(case):
    module, arguments = case(0, dtype=torch.bfloat16)
    offloaded, _ = stand_in(module)
    out_TD, expected_TD = offloaded(*arguments), module(*arguments)
    assert out_TD.dtype == torch.bfloat16
    torch.testing.assert_close(out_TD, expected_TD, rtol=2**-6, atol=1e-3)


@torch.no_grad()
def test_nllb_runs_experts_0_and_1_whatever_the_router_chose():
    """transformers takes the values of its one-hot mask for expert numbers; so do we, to say the same.

    Running the experts that the router meant would be another model than transformers', and a silent one: the
    text would still look like text. The router here chooses others too, so equality cannot be luck.
    """
    module, (hidden_TD, mask_TE, weight_TE) = nllb_case(seed=0)
    assert set(weight_TE.nonzero()[:, 1].tolist()) - {0, 1}
    offloaded, cache = stand_in(module)
    out_TD = offloaded(hidden_TD, mask_TE, weight_TE)
    assert cache.asked == {0, 1}
    meant_TD = sum(module[f"expert_{e}"](hidden_TD) * weight_TE[:, e : e + 1] for e in range(EXPERTS))
    assert (out_TD - meant_TD * 0.8).abs().max() > 0.01
    assert torch.equal(out_TD[:3], torch.zeros(3, 16))  # padding


@torch.no_grad()
def test_nllb_fetches_no_expert_for_a_weight_of_zero():
    module, (hidden_TD, mask_TE, weight_TE) = nllb_case(seed=0)
    offloaded, cache = stand_in(module)
    offloaded(hidden_TD, mask_TE, weight_TE * mask_TE)  # no second experts
    assert cache.asked == {1}


def test_a_transformers_that_runs_other_nllb_experts_is_refused(monkeypatch):
    """The day transformers runs the experts that the router chose, our output would silently differ."""
    check_nllb_reads_its_mask_as_expert_numbers()

    def mended(self, hidden_states, router_mask, router_probs):
        experts = range(self.num_experts)
        return sum(self[f"expert_{e}"](hidden_states) * router_probs[:, e, None] for e in experts)

    monkeypatch.setattr(NllbMoeExperts, "forward", mended)
    with pytest.raises(ValueError, match=r"install transformers==5\.23"):
        check_nllb_reads_its_mask_as_expert_numbers()


def test_the_check_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    check_nllb_reads_its_mask_as_expert_numbers()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("case", [switch_case, nllb_case])
def test_training_is_refused(case):
    module, arguments = case(0)
    offloaded, _ = stand_in(module)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        offloaded.train()(*arguments)


@pytest.mark.parametrize("name", ["switch", "switch_safetensors", "nllb_moe"])
def test_a_whole_model_says_what_transformers_says(name, tmp_path):
    write_checkpoint(name, tmp_path, shards=2)
    family = FAMILIES[name]
    reference = family.auto_class.from_pretrained(tmp_path)
    offloaded = family.auto_class.from_pretrained(
        tmp_path, quantization_config=ExpertFlowConfig(cache_size=1, batch=4, context=128)
    )
    batch = AutoTokenizer.from_pretrained(tmp_path)(
        ["aaaaaaaaaaaaaaaaaaaaaaaa To be or not", "that is"],
        return_tensors="pt",
        padding=True,
        return_token_type_ids=False,
    )
    try:
        expected = reference.generate(**batch, max_new_tokens=20, do_sample=False)
        assert torch.equal(offloaded.generate(**batch, max_new_tokens=20, do_sample=False), expected)
        with torch.no_grad():
            logits = offloaded(**batch, decoder_input_ids=expected).logits
            torch.testing.assert_close(
                logits, reference(**batch, decoder_input_ids=expected).logits, rtol=1e-4, atol=1e-4
            )
    finally:
        offloaded.expertflow.close()


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("switch", {0: "encoder.block.1.layer.1.mlp", 3: "decoder.block.3.layer.2.mlp"}),
        ("nllb_moe", {1: "model.encoder.layers.3.ffn", 2: "model.decoder.layers.1.ffn"}),
    ],
)
def test_the_encoders_layers_are_numbered_before_the_decoders(name, places, tmp_path):
    tensors = tensors_on_disk(write_checkpoint(name, tmp_path))
    names = [
        found for found, _ in find_modulelist_experts(FAMILIES[name].auto_class.from_pretrained(tmp_path))
    ]
    model = FAMILIES[name].auto_class.from_pretrained(
        tmp_path, quantization_config=ExpertFlowConfig(cache_size=2)
    )
    try:
        for layer, place in places.items():
            assert names[layer] == f"{place}.experts"
            for expert, weights in model.expertflow.cache.open_layer(layer, [5, 2]):
                for role, (tensor,) in weights.items():
                    assert torch.equal(tensor, tensors[f"{place}.experts.expert_{expert}.{role}"])
    finally:
        model.expertflow.close()
