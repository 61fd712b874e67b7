"""The tiny checkpoints are what their names say: the tests of loading stand on them."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from tests.families import EOS, FAMILIES, NUM_EXPERTS, PAD, VOCAB_SIZE, tensors_on_disk, write_checkpoint

# Where a layer's experts are on the hub, written by hand from the published repositories: the regular
# expression of a tensor's name, and its shape here. D = 32, E = 8; a packed tensor has E in front.
QWEN_STYLE = {
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.gate_proj\.weight": (24, 32),
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj\.weight": (24, 32),
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj\.weight": (32, 24),
    r"model\.layers\.\d+\.mlp\.gate\.weight": (8, 32),
}
MIXTRAL_STYLE = {
    r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w1\.weight": (48, 32),
    r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w2\.weight": (32, 48),
    r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w3\.weight": (48, 32),
    r"model\.layers\.\d+\.block_sparse_moe\.gate\.weight": (8, 32),
}
OLMO_STYLE = {
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.gate_proj\.weight": (48, 32),
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj\.weight": (48, 32),
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj\.weight": (32, 48),
    r"model\.layers\.\d+\.mlp\.gate\.weight": (8, 32),
}
CORRECTION_BIAS = {r"model\.layers\.\d+\.mlp\.gate\.e_score_correction_bias": (8,)}
SWITCH_STYLE = {
    r"(encoder|decoder)\.block\.[13]\.layer\.[12]\.mlp\.experts\.expert_\d+\.wi\.weight": (48, 32),
    r"(encoder|decoder)\.block\.[13]\.layer\.[12]\.mlp\.experts\.expert_\d+\.wo\.weight": (32, 48),
    r"(encoder|decoder)\.block\.[13]\.layer\.[12]\.mlp\.router\.classifier\.weight": (8, 32),
}
PUBLISHED: dict[str, dict[str, tuple[int, ...]]] = {
    "switch": SWITCH_STYLE,
    "switch_safetensors": SWITCH_STYLE,
    "nllb_moe": {
        r"model\.(encoder|decoder)\.layers\.[13]\.ffn\.experts\.expert_\d+\.fc1\.weight": (48, 32),
        r"model\.(encoder|decoder)\.layers\.[13]\.ffn\.experts\.expert_\d+\.fc1\.bias": (48,),
        r"model\.(encoder|decoder)\.layers\.[13]\.ffn\.experts\.expert_\d+\.fc2\.weight": (32, 48),
        r"model\.(encoder|decoder)\.layers\.[13]\.ffn\.experts\.expert_\d+\.fc2\.bias": (32,),
        r"model\.(encoder|decoder)\.layers\.[13]\.ffn\.router\.classifier\.weight": (8, 32),
    },
    "mixtral": MIXTRAL_STYLE,
    "qwen2_moe": QWEN_STYLE | {r"model\.layers\.\d+\.mlp\.shared_expert_gate\.weight": (1, 32)},
    "deepseek_moe": QWEN_STYLE | {r"model\.layers\.\d+\.mlp\.shared_experts\.gate_proj\.weight": (48, 32)},
    "qwen3_moe": QWEN_STYLE,
    "olmoe": OLMO_STYLE,
    "deepseek_v2": QWEN_STYLE | {r"model\.layers\.\d+\.mlp\.shared_experts\.gate_proj\.weight": (48, 32)},
    "deepseek_v3": QWEN_STYLE | CORRECTION_BIAS,
    "deepseek_v3_mtp": QWEN_STYLE | CORRECTION_BIAS,
    "gpt_oss": {
        r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj": (8, 32, 96),
        r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj_bias": (8, 96),
        r"model\.layers\.\d+\.mlp\.experts\.down_proj": (8, 48, 32),
        r"model\.layers\.\d+\.mlp\.experts\.down_proj_bias": (8, 32),
        r"model\.layers\.\d+\.mlp\.router\.weight": (8, 32),
    },
    "glm4_moe": QWEN_STYLE | CORRECTION_BIAS,
    "granitemoe": {
        r"model\.layers\.\d+\.block_sparse_moe\.input_linear\.weight": (8, 96, 32),
        r"model\.layers\.\d+\.block_sparse_moe\.output_linear\.weight": (8, 32, 48),
        r"model\.layers\.\d+\.block_sparse_moe\.router\.layer\.weight": (8, 32),
    },
    "phimoe": MIXTRAL_STYLE,
    "ernie4_5_moe": QWEN_STYLE | {r"model\.layers\.\d+\.mlp\.moe_statics\.e_score_correction_bias": (1, 8)},
    "minimax_m2": MIXTRAL_STYLE | {r"model\.layers\.\d+\.block_sparse_moe\.e_score_correction_bias": (8,)},
    "flex_olmo": OLMO_STYLE,
    "hunyuan_v1_moe": {k.replace(r"gate\.weight", r"gate\.wg\.weight"): v for k, v in OLMO_STYLE.items()},
    "lfm2_moe": {
        r"model\.layers\.[12]\.feed_forward\.experts\.\d+\.w1\.weight": (24, 32),
        r"model\.layers\.[12]\.feed_forward\.experts\.\d+\.w2\.weight": (32, 24),
        r"model\.layers\.[12]\.feed_forward\.experts\.\d+\.w3\.weight": (24, 32),
        r"model\.layers\.[12]\.feed_forward\.expert_bias": (8,),
    },
    "qwen3_next": QWEN_STYLE | {r"model\.layers\.\d+\.mlp\.shared_expert_gate\.weight": (1, 32)},
    "jamba": {
        r"model\.layers\.[13]\.feed_forward\.experts\.\d+\.gate_proj\.weight": (48, 32),
        r"model\.layers\.[13]\.feed_forward\.experts\.\d+\.up_proj\.weight": (48, 32),
        r"model\.layers\.[13]\.feed_forward\.experts\.\d+\.down_proj\.weight": (32, 48),
        r"model\.layers\.[13]\.feed_forward\.router\.weight": (8, 32),
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory) -> tuple[str, Path]:
    """Each family's name and folder, written once for all tests here."""
    return request.param, write_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def load(name: str, folder: Path) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    return FAMILIES[name].auto_class.from_pretrained(folder, output_loading_info=True)


def test_names_and_shapes_are_the_published_ones(written):
    name, folder = written
    tensors = tensors_on_disk(folder)
    layers = FAMILIES[name].moe_layers + (name == "deepseek_v3_mtp")
    for pattern, shape in PUBLISHED[name].items():
        found = {key: tuple(t.shape) for key, t in tensors.items() if re.fullmatch(pattern, key)}
        assert set(found.values()) == {shape}, pattern
        one_per_expert = re.search(r"experts\\\.(expert_)?\\d", pattern)
        assert len(found) == layers * (NUM_EXPERTS if one_per_expert else 1), pattern
    unnamed = [
        key
        for key in tensors
        if ".experts." in key and not any(re.fullmatch(p, key) for p in PUBLISHED[name])
    ]
    assert unnamed == []


def test_transformers_loads_it_without_a_remark(written):
    name, folder = written
    model, info = load(name, folder)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    extra = {key for key in info["unexpected_keys"] if not key.startswith("model.layers.3.")}
    assert not extra
    assert bool(info["unexpected_keys"]) == (name == "deepseek_v3_mtp")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_greedy_text_is_lively_and_depends_on_the_prompt(written):
    """A model that repeats one token would agree with a broken copy of itself."""
    name, folder = written
    model, _ = load(name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in ("The quick brown fox", "0123456789"):
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**batch, max_new_tokens=24, do_sample=False)[0, -24:]
        assert not set(ids.tolist()) & {PAD, EOS}
        texts.append(ids.tolist())
    assert texts[0] != texts[1]
    assert len(set(texts[0] + texts[1])) > 5


@pytest.mark.parametrize("name", ["switch", "mixtral", "gpt_oss", "deepseek_v3", "deepseek_moe"])
def test_bf16_over_three_shards_is_the_same_model(name, tmp_path):
    whole, _ = load(name, write_checkpoint(name, tmp_path / "whole", dtype=torch.bfloat16))
    parts, info = load(name, write_checkpoint(name, tmp_path / "parts", dtype=torch.bfloat16, shards=3))
    assert len([*(tmp_path / "parts").glob("*-of-00003.*")]) == 3
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert whole.dtype == parts.dtype == torch.bfloat16
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[key]), key


@pytest.mark.parametrize("name", ["switch_safetensors", "qwen3_next"])
def test_the_seed_decides_every_byte(name, tmp_path):
    first = (write_checkpoint(name, tmp_path / "a") / "model.safetensors").read_bytes()
    torch.rand(3)  # the global generator must not matter
    assert (write_checkpoint(name, tmp_path / "b") / "model.safetensors").read_bytes() == first
    assert (write_checkpoint(name, tmp_path / "c", seed=1) / "model.safetensors").read_bytes() != first


def test_tokenizer_gives_the_text_back(tmp_path):
    write_checkpoint("mixtral", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "To be, or not to be:\n  that is the question [42]~"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < VOCAB_SIZE
