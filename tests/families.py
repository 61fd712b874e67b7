"""Tiny random checkpoints of every supported family, laid out on disk as their authors published them.

A test that loads what `save_pretrained` happened to write proves little: users bring the names, shapes,
packing and file kinds of the hub. The expected names are spelt out in tests/models/test_families.py. Weights
are random but lively: routing varies, and the special tokens are never the greedy choice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion

from expertflow.models import deepseek_moe

VOCAB_SIZE = 128
NUM_EXPERTS = 8
PAD, EOS, UNK = 0, 1, 2
SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]


@dataclass(frozen=True)
class Family:
    """One published architecture: the fields of its config.json and the kind of file its weights came in."""

    config: dict[str, Any]
    moe_layers: int  # encoder and decoder together
    seq2seq: bool = False
    weights: str = "safetensors"  # or "bin": the zip archive of torch.save
    # Tensors that the hub checkpoint has and transformers ignores (multi-token prediction layers).
    extra_tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    # Fields that only the published config.json has, such as pointers to remote code we never run.
    published_fields: dict[str, Any] | None = None

    @property
    def auto_class(self) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
        return AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM


def decoder_only(model_type: str, **fields: Any) -> dict[str, Any]:
    common = {
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    return common | fields


def _next_token_layer(state: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """DeepSeek-V3 and GLM-4.5 ship their multi-token prediction head as one more decoder layer.

    The layer has experts of its own under layer number num_hidden_layers. Models ignore it, so nothing that
    reads names from disk may count it.
    """
    last = f"model.layers.{layer - 1}."
    extra = {
        name.replace(last, f"model.layers.{layer}."): tensor.clone()
        for name, tensor in state.items()
        if name.startswith(last)
    }
    embedding = state["model.embed_tokens.weight"]
    extra |= {
        f"model.layers.{layer}.enorm.weight": state["model.norm.weight"].clone(),
        f"model.layers.{layer}.hnorm.weight": state["model.norm.weight"].clone(),
        f"model.layers.{layer}.eh_proj.weight": embedding.new_ones(
            embedding.shape[1], 2 * embedding.shape[1]
        ),
        f"model.layers.{layer}.embed_tokens.weight": embedding.clone(),
        f"model.layers.{layer}.shared_head.norm.weight": state["model.norm.weight"].clone(),
        f"model.layers.{layer}.shared_head.head.weight": state["lm_head.weight"].clone(),
    }
    return extra


# expert_capacity is 4, not the published 64, so that short prompts overflow an expert and tokens are dropped.
_SWITCH = {
    "model_type": "switch_transformers",
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "expert_capacity": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_heads": 4,
    "num_experts": NUM_EXPERTS,
    "decoder_start_token_id": PAD,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}

_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

_DEEPSEEK_V3 = decoder_only(
    "deepseek_v3", **_LATENT_ATTENTION, q_lora_rank=16, n_shared_experts=1, n_group=4, topk_group=2
)

FAMILIES: dict[str, Family] = {
    "switch": Family(_SWITCH, moe_layers=4, seq2seq=True, weights="bin"),
    "switch_safetensors": Family(_SWITCH, moe_layers=4, seq2seq=True),
    "nllb_moe": Family(
        {
            "model_type": "nllb-moe",
            "vocab_size": VOCAB_SIZE,
            "d_model": 32,
            "encoder_layers": 4,
            "encoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_layers": 4,
            "decoder_ffn_dim": 48,
            "decoder_attention_heads": 4,
            "encoder_layerdrop": 0,
            "decoder_layerdrop": 0,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "max_position_embeddings": 256,
            "num_experts": NUM_EXPERTS,
            "pad_token_id": PAD,
            "bos_token_id": EOS,
            "eos_token_id": EOS,
            "decoder_start_token_id": EOS,
        },
        moe_layers=4,
        seq2seq=True,
        weights="bin",
    ),
    "mixtral": Family(decoder_only("mixtral", num_local_experts=NUM_EXPERTS), moe_layers=2),
    "qwen2_moe": Family(
        decoder_only(
            "qwen2_moe",
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
        ),
        moe_layers=2,
    ),
    "deepseek_moe": Family(
        decoder_only(
            "deepseek",
            num_hidden_layers=3,
            num_key_value_heads=4,
            n_routed_experts=NUM_EXPERTS,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
        ),
        moe_layers=2,
        published_fields={
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekConfig",
                "AutoModel": "modeling_deepseek.DeepseekModel",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
            },
            "rope_theta": 10000,
            "rope_scaling": None,
            "seq_aux": True,
        },
    ),
    "qwen3_moe": Family(
        decoder_only(
            "qwen3_moe",
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            num_hidden_layers=3,
            mlp_only_layers=[0],
            head_dim=8,
        ),
        moe_layers=2,
    ),
    "olmoe": Family(decoder_only("olmoe", num_experts=NUM_EXPERTS, num_experts_per_tok=3), moe_layers=2),
    "deepseek_v2": Family(
        decoder_only("deepseek_v2", **_LATENT_ATTENTION, q_lora_rank=None, n_shared_experts=2), moe_layers=2
    ),
    "deepseek_v3": Family(_DEEPSEEK_V3, moe_layers=2),
    "deepseek_v3_mtp": Family(_DEEPSEEK_V3, moe_layers=2, extra_tensors=partial(_next_token_layer, layer=3)),
    # The published weights are MXFP4; this is the bf16 copy that fine-tuning tools write.
    "gpt_oss": Family(
        decoder_only(
            "gpt_oss",
            num_local_experts=NUM_EXPERTS,
            num_experts_per_tok=3,
            head_dim=8,
            max_position_embeddings=131072,  # the published YaRN factor is checked against it
        ),
        moe_layers=2,
    ),
    "glm4_moe": Family(
        decoder_only(
            "glm4_moe",
            num_hidden_layers=3,
            n_routed_experts=NUM_EXPERTS,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            attention_bias=True,
            use_qk_norm=True,
        ),
        moe_layers=2,
    ),
    "granitemoe": Family(
        decoder_only(
            "granitemoe",
            num_local_experts=NUM_EXPERTS,
            num_experts_per_tok=3,
            embedding_multiplier=1.5,
            residual_multiplier=0.9,
            attention_multiplier=0.4,
            logits_scaling=0.5,
            tie_word_embeddings=True,
        ),
        moe_layers=2,
    ),
    "phimoe": Family(
        decoder_only("phimoe", num_local_experts=NUM_EXPERTS, attention_bias=True, lm_head_bias=True),
        moe_layers=2,
    ),
    "ernie4_5_moe": Family(
        decoder_only(
            "ernie4_5_moe",
            num_hidden_layers=3,
            moe_num_experts=NUM_EXPERTS,
            moe_k=3,
            moe_intermediate_size=24,
            tie_word_embeddings=True,
        ),
        moe_layers=2,
    ),
    # The published weights are FP8; this is a bf16 copy.
    "minimax_m2": Family(
        decoder_only(
            "minimax_m2",
            num_local_experts=NUM_EXPERTS,
            num_experts_per_tok=3,
            head_dim=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        ),
        moe_layers=2,
    ),
    "flex_olmo": Family(
        decoder_only("flex_olmo", num_experts=NUM_EXPERTS, num_experts_per_tok=3), moe_layers=2
    ),
    "hunyuan_v1_moe": Family(
        decoder_only("hunyuan_v1_moe", num_experts=NUM_EXPERTS, moe_topk=3, head_dim=8), moe_layers=2
    ),
    "lfm2_moe": Family(
        decoder_only(
            "lfm2_moe",
            num_hidden_layers=3,
            num_dense_layers=1,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            layer_types=["conv", "full_attention", "full_attention"],
            tie_word_embeddings=True,
        ),
        moe_layers=2,
    ),
    "qwen3_next": Family(
        decoder_only(
            "qwen3_next",
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            head_dim=8,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            layer_types=["linear_attention", "full_attention"],
        ),
        moe_layers=2,
    ),
    "jamba": Family(
        decoder_only(
            "jamba",
            num_hidden_layers=4,
            num_experts=NUM_EXPERTS,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
        ),
        moe_layers=2,
    ),
}


def write_checkpoint(
    name: str, folder: Path, *, dtype: torch.dtype = torch.float32, shards: int = 1, seed: int = 0
) -> Path:
    """Write the tiny checkpoint of FAMILIES[name]: config, weights and tokenizer; one seed, one set of bytes.

    shards: files the weights are split over, in order of name, so that one layer's experts may straddle two.
    Returns folder, which is created when absent.
    """
    family = FAMILIES[name]
    if name == "deepseek_moe":
        deepseek_moe.register()
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(family, seed)
    model.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides nn.Module.to from mypy
    state = revert_weight_conversion(model, model.state_dict())
    # Correction biases are float32 in published bf16 checkpoints.
    state = {key: t.float() if "e_score_correction_bias" in key else t for key, t in state.items()}
    if family.extra_tensors is not None:
        state |= family.extra_tensors(state)
    _write_weights(state, folder, family, shards)
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if family.published_fields is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | family.published_fields
        config["torch_dtype"] = config.pop("dtype")
        del config["rope_parameters"], config["transformers_version"]  # as written before transformers 5
        path.write_text(json.dumps(config, indent=2))
    tiny_tokenizer(seq2seq=family.seq2seq).save_pretrained(folder)
    return folder


def tensors_on_disk(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name in the file, of all its shards."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    for path in folder.glob("*.bin"):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def tiny_tokenizer(*, seq2seq: bool = False) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; decoding gives the text back. seq2seq: input ends in </s>."""
    pieces = [*SPECIAL_TOKENS, "\n", *map(chr, range(32, 127))]
    pieces += [f"<extra_{i}>" for i in range(VOCAB_SIZE - len(pieces))]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    if seq2seq:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def random_model(family: Family, seed: int) -> PreTrainedModel:
    """The model that write_checkpoint writes, float32, in eval mode."""
    config = AutoConfig.for_model(**family.config)
    assert isinstance(config, PreTrainedConfig)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # state-space decay rates keep their initial values
        model = family.auto_class.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted([*model.named_parameters(), *_persistent_buffers(model)]):
            _fill(name, tensor, generator)
        # Greedy text is then never cut short: the special tokens have logit 0 and 125 others compete.
        output = model.get_output_embeddings()
        output.weight[: len(SPECIAL_TOKENS)] = 0
        if getattr(output, "bias", None) is not None:
            output.bias[: len(SPECIAL_TOKENS)] = 0
    return model


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Random values in place, of a size that keeps activations near 1 and routing varied between tokens."""
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith(("A_log", "dt_bias", "dt_proj.bias", ".D")):
        tensor.add_(0.1 * noise)  # state-space decay rates: far from their initial range they overflow
    elif "bias" in name and "relative_attention" not in name:
        tensor.copy_(0.1 * noise)
    elif name.endswith("decoder.layer_norm.weight"):
        tensor.copy_(noise)  # random signs: tied embeddings would otherwise repeat their own input for ever
    elif tensor.ndim == 1:
        centre = 0.0 if name.endswith("sinks") else 1.0
        tensor.copy_(centre + 0.1 * noise)
    elif name == "model.shared.weight":
        tensor.copy_(0.15 * noise)  # NLLB multiplies its embeddings by sqrt(D)
    elif "embed" in name or "shared.weight" in name:
        tensor.copy_(0.5 * noise)
    elif "relative_attention" in name:
        tensor.copy_(noise)
    else:
        tensor.copy_(noise * (_gain(name) / math.sqrt(tensor.shape[-1])))


def _gain(name: str) -> float:
    if ".router." in name or ".gate.weight" in name or "lm_head" in name:
        return 3.0
    if name.startswith("model.decoder.") and name.endswith((".q_proj.weight", ".k_proj.weight")):
        return 3.0  # NLLB: blurred attention sees no difference between one prefix and the next
    if name.endswith((".q.weight", "EncDecAttention.o.weight", "cross_attention.out_proj.weight")):
        # Switch does not scale its scores, and cross attention drowns the token just written: both end in
        # one token for ever.
        return 0.5
    return 1.5


def _write_weights(state: dict[str, Tensor], folder: Path, family: Family, shards: int) -> None:
    stem, suffix = ("pytorch_model", "bin") if family.weights == "bin" else ("model", "safetensors")
    # A .bin keeps every name of a tied tensor, and the storage once; safetensors refuses aliases.
    keys = sorted(state) if suffix == "bin" else _without_aliases(state)
    per_shard = -(-len(keys) // shards)
    groups = [keys[i : i + per_shard] for i in range(0, len(keys), per_shard)]
    if shards == 1:
        file_names = [f"{stem}.{suffix}"]
    else:
        file_names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.{suffix}" for i in range(len(groups))]
    for file_name, group in zip(file_names, groups, strict=True):
        if family.weights == "bin":
            torch.save({key: state[key] for key in group}, folder / file_name)
        else:
            tensors = {key: state[key].contiguous() for key in group}
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if shards > 1:
        index = {
            "metadata": {"total_size": sum(state[key].nbytes for key in keys)},
            "weight_map": {key: f for f, group in zip(file_names, groups, strict=True) for key in group},
        }
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2))


def _without_aliases(state: dict[str, Tensor]) -> list[str]:
    """Sorted names, one per storage: an embedding's own name is the one that published files keep."""
    owner: dict[int, str] = {}
    for key in sorted(state, key=lambda key: ("lm_head" in key, "shared.weight" not in key, key)):
        owner.setdefault(state[key].data_ptr(), key)
    return sorted(owner.values())
