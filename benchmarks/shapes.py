"""Published models as shapes: config.json and the names and sizes of every tensor, layer by layer. No weights.

Names and sizes are those of the releases on the hub, so that a checkpoint written from them is indexed, converted
and read as the real one would be. Fewer layers or a smaller vocabulary make a smaller model of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

Sizes = dict[str, tuple[int, ...]]  # of the tensors of one file, by name


class Shape(Protocol):
    """What a checkpoint is written from. layers: decoder blocks (of an encoder-decoder: blocks of each stack)."""

    @property
    def layers(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    def config(self) -> dict[str, Any]: ...

    def files(self) -> Iterator[Sizes]: ...


def num_parameters(shape: Shape) -> int:
    total = 0
    for sizes in shape.files():
        for size in sizes.values():
            count = 1
            for side in size:
                count *= side
            total += count
    return total


def checkpoint_bytes(shape: Shape) -> int:
    return num_parameters(shape) * (4 if shape.dtype == "float32" else 2)


@dataclass(frozen=True, slots=True)
class QwenShape:
    """Qwen1.5-MoE-A2.7B's layer with fewer layers and a smaller vocabulary (config.json of the release)."""

    layers: int = 8
    hidden: int = 2048
    heads: int = 16
    experts: int = 60
    top_k: int = 4
    expert_inner: int = 1408
    shared_inner: int = 5632
    vocabulary: int = 32000

    @property
    def dtype(self) -> str:
        return "bfloat16"

    @property
    def expert_bytes(self) -> int:
        return 3 * self.expert_inner * self.hidden * 2

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "hidden_size": self.hidden,
            "intermediate_size": self.shared_inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.expert_inner,
            "shared_expert_intermediate_size": self.shared_inner,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "decoder_sparse_step": 1,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def files(self) -> Iterator[Sizes]:
        yield _ends(self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            biases = {f"{prefix}.self_attn.{name}_proj.bias": (self.hidden,) for name in "qkv"}
            yield {
                **_llama_attention(prefix, self.hidden),
                **biases,
                f"{prefix}.mlp.gate.weight": (self.experts, self.hidden),
                f"{prefix}.mlp.shared_expert_gate.weight": (1, self.hidden),
                **_gated(f"{prefix}.mlp.shared_expert", self.hidden, self.shared_inner),
                **_gated_experts(prefix, self.experts, self.hidden, self.expert_inner),
            }


@dataclass(frozen=True, slots=True)
class DeepseekShape:
    """DeepSeek-MoE-16B (deepseek-ai/deepseek-moe-16b-base): the first layer dense, two shared experts."""

    layers: int = 28
    hidden: int = 2048
    heads: int = 16
    experts: int = 64
    top_k: int = 6
    expert_inner: int = 1408
    dense_inner: int = 10944
    vocabulary: int = 102400

    @property
    def dtype(self) -> str:
        return "bfloat16"

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["DeepseekForCausalLM"],
            "model_type": "deepseek",
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_inner,
            "moe_intermediate_size": self.expert_inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "n_routed_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def files(self) -> Iterator[Sizes]:
        dense = "model.layers.0"
        yield {
            **_ends(self.vocabulary, self.hidden),
            **_llama_attention(dense, self.hidden),
            **_gated(f"{dense}.mlp", self.hidden, self.dense_inner),
        }
        for layer in range(1, self.layers):
            prefix = f"model.layers.{layer}"
            yield {
                **_llama_attention(prefix, self.hidden),
                f"{prefix}.mlp.gate.weight": (self.experts, self.hidden),
                **_gated(f"{prefix}.mlp.shared_experts", self.hidden, 2 * self.expert_inner),
                **_gated_experts(prefix, self.experts, self.hidden, self.expert_inner),
            }


@dataclass(frozen=True, slots=True)
class SwitchShape:
    """google/switch-base-128: 12 + 12 blocks, every second sparse, one of 128 experts for each token."""

    layers: int = 12
    hidden: int = 768
    inner: int = 3072
    heads: int = 12
    head: int = 64
    experts: int = 128
    vocabulary: int = 32128
    dtype: str = "float32"

    top_k = 1

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "model_type": "switch_transformers",
            "vocab_size": self.vocabulary,
            "d_model": self.hidden,
            "d_kv": self.head,
            "d_ff": self.inner,
            "expert_capacity": 64,
            "num_layers": self.layers,
            "num_decoder_layers": self.layers,
            "num_sparse_encoder_layers": self.layers // 2,
            "num_sparse_decoder_layers": self.layers // 2,
            "num_heads": self.heads,
            "num_experts": self.experts,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": True,
            "torch_dtype": self.dtype,
        }

    def files(self) -> Iterator[Sizes]:
        first: Sizes = {"shared.weight": (self.vocabulary, self.hidden)}
        for stack in ("encoder", "decoder"):
            bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            first |= {bias: (32, self.heads), f"{stack}.final_layer_norm.weight": (self.hidden,)}
        yield first
        for stack, attentions in (
            ("encoder", ("SelfAttention",)),
            ("decoder", ("SelfAttention", "EncDecAttention")),
        ):
            for block in range(self.layers):
                yield from self._block(f"{stack}.block.{block}.layer", attentions, sparse=block % 2 == 1)

    def _block(self, prefix: str, attentions: tuple[str, ...], sparse: bool) -> Iterator[Sizes]:
        width, last = self.heads * self.head, len(attentions)
        sizes: Sizes = {f"{prefix}.{number}.layer_norm.weight": (self.hidden,) for number in range(last + 1)}
        for number, name in enumerate(attentions):
            sizes |= {f"{prefix}.{number}.{name}.{part}.weight": (width, self.hidden) for part in "qkv"}
            sizes[f"{prefix}.{number}.{name}.o.weight"] = (self.hidden, width)
        mlp = f"{prefix}.{last}.mlp"
        if not sparse:
            yield sizes | self._dense(mlp)
            return
        yield sizes | {f"{mlp}.router.classifier.weight": (self.experts, self.hidden)}
        for begin in range(
            0, self.experts, 32
        ):  # a file of them all would be 2.4 GB in RAM while it is written
            some: Sizes = {}
            for expert in range(begin, min(begin + 32, self.experts)):
                some |= self._dense(f"{mlp}.experts.expert_{expert}")
            yield some

    def _dense(self, prefix: str) -> Sizes:
        return {
            f"{prefix}.wi.weight": (self.inner, self.hidden),
            f"{prefix}.wo.weight": (self.hidden, self.inner),
        }


@dataclass(frozen=True)
class Published:
    """A model at its published size, the recording that stands for its routing, and the paper's Fig. 8.

    all_bytes, limit_bytes: the paper's memory with everything in fast memory, and with ExpertFlow, rounded up.
    """

    title: str
    shape: Shape
    trace: str  # under zoo/traces
    all_bytes: float
    limit_bytes: int


PUBLISHED = {
    "qwen1.5-moe": Published(
        "Qwen1.5-MoE-A2.7B", QwenShape(layers=24, vocabulary=151936), "qwen1.5-moe", 35.21e9, 6_520_000_000
    ),
    "deepseek-moe": Published("DeepSeek-MoE-16B", DeepseekShape(), "deepseek-moe", 31.35e9, 6_500_000_000),
    # The paper's 15.26 GB are 16-bit numbers; --dtype float32 is what google published.
    "switch-128": Published(
        "Switch-base-128", SwitchShape(dtype="bfloat16"), "switch-128", 15.26e9, 1_100_000_000
    ),
}


def with_layers(shape: Shape, layers: int) -> Shape:
    """The same with fewer layers. Raises ValueError for more than were published, and for fewer than 2."""
    if not 2 <= layers <= shape.layers:
        raise ValueError(
            f"--layers {layers}: the published model has {shape.layers}; give 2 to {shape.layers}"
        )
    return replace(shape, layers=layers)  # type: ignore[type-var]  # every Shape here is a dataclass


def _ends(vocabulary: int, hidden: int) -> Sizes:
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }


def _llama_attention(prefix: str, hidden: int) -> Sizes:
    return {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        **{f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
    }


def _gated(prefix: str, hidden: int, inner: int) -> Sizes:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def _gated_experts(prefix: str, experts: int, hidden: int, inner: int) -> Sizes:
    sizes: Sizes = {}
    for expert in range(experts):
        sizes |= _gated(f"{prefix}.mlp.experts.{expert}", hidden, inner)
    return sizes
