"""The paper's five architectures at a size that one CPU core can train, and the model of the demo.

Depth, number of experts and experts per token are the published ones (Table 1), so that routing paths have
the published shape L x E; widths are small. Every model is the published transformers class with its
published names on disk; DeepSeek-MoE, which transformers lacks, comes from expertflow.models.
Importing this file loads no model library; `build_model` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPECIAL_IDS: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 3,
}  # END, END, PAD of zoo.corpus


@dataclass(frozen=True)
class Shape:
    """Sizes of one model. For an encoder-decoder `layers` counts each stack, and every second has experts."""

    hidden: int
    expert_inner: int
    layers: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    shared_inner: int = 0  # width of what every token passes through beside its experts
    dense_inner: int = 0  # width of feed-forward layers without experts


def _even_rates(shape: Shape) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """A line of the zoo: what it stands for, its sizes, and how to build it."""

    summary: str
    shape: Shape
    build: Callable[[Shape], PreTrainedModel]
    seq2seq: bool = False
    rate_factors: Callable[[Shape], dict[str, float]] = _even_rates  # by the end of a parameter's name


def build_model(architecture: Architecture, shape: Shape, dtype: str = "bfloat16") -> PreTrainedModel:
    """A freshly initialised model of `shape`; random numbers come from torch's global generator."""
    import torch
    from transformers import GenerationConfig

    from zoo.experts import EXPERTS_NAME, register_experts, speed_up_switch

    register_experts()
    model: Any = architecture.build(shape)
    model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    if architecture.seq2seq:
        speed_up_switch(model)
    else:
        model.set_experts_implementation(EXPERTS_NAME)
    start: dict[str, Any] = (
        {"decoder_start_token_id": SPECIAL_IDS["pad_token_id"]} if architecture.seq2seq else {}
    )
    # Greedy text of models this small repeats itself; sampling is what their card shows.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_k=40, **SPECIAL_IDS, **start
    )
    return model


def _decoder_fields(shape: Shape) -> dict[str, Any]:
    """What the configurations of all decoder-only architectures call alike."""
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": True,
        # Flash attention's backward takes four times as long at T=256 on a CPU.
        "attn_implementation": "eager",
        **SPECIAL_IDS,
    }


def _qwen2_moe(shape: Shape) -> PreTrainedModel:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        intermediate_size=shape.dense_inner or 2 * shape.hidden,  # in the published config, used by no layer
        moe_intermediate_size=shape.expert_inner,
        shared_expert_intermediate_size=shape.shared_inner,
        num_experts=shape.experts,
        norm_topk_prob=True,
        **_decoder_fields(shape),
    )
    return Qwen2MoeForCausalLM(config)


def _mixtral(shape: Shape) -> PreTrainedModel:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        intermediate_size=shape.expert_inner, num_local_experts=shape.experts, **_decoder_fields(shape)
    )
    return MixtralForCausalLM(config)


def _deepseek_moe(shape: Shape) -> PreTrainedModel:
    from expertflow.models import deepseek_moe

    deepseek_moe.register()
    assert shape.shared_inner % shape.expert_inner == 0, "DeepSeek's shared experts are whole experts"
    config = deepseek_moe.DeepseekConfig(
        intermediate_size=shape.dense_inner,
        moe_intermediate_size=shape.expert_inner,
        n_shared_experts=shape.shared_inner // shape.expert_inner,
        n_routed_experts=shape.experts,
        first_k_dense_replace=1,
        **_decoder_fields(shape),
    )
    return deepseek_moe.DeepseekForCausalLM(config)


def _switch(shape: Shape) -> PreTrainedModel:
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersTop1Router,
    )

    config = SwitchTransformersConfig(
        vocab_size=shape.vocab,
        d_model=shape.hidden,
        d_kv=shape.hidden // shape.heads,
        d_ff=shape.expert_inner,
        num_layers=shape.layers,
        num_decoder_layers=shape.layers,
        num_sparse_encoder_layers=shape.layers // 2,
        num_sparse_decoder_layers=shape.layers // 2,
        num_heads=shape.heads,
        num_experts=shape.experts,
        expert_capacity=64,
        dropout_rate=0.0,
        **{"decoder_start_token_id": SPECIAL_IDS["pad_token_id"], **SPECIAL_IDS},
    )
    model = SwitchTransformersForConditionalGeneration(config)
    with torch.no_grad():
        for module in model.modules():
            # transformers draws routers with deviation 1: a few experts then win every token and stay alone.
            if isinstance(module, SwitchTransformersTop1Router):
                module.classifier.weight.normal_(std=0.02)
        # Sublayers start silent. At T5's scale their outputs, much the same for every token, drown the tokens
        # themselves before anything is learnt, and a router that sees one vector sends all to one expert.
        for name, parameter in model.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                parameter.zero_()
        # Tied embeddings of a silent model predict the token they read; at T5's deviation of 1, with much
        # confidence (a first loss of 11 nats).
        model.shared.weight.normal_(std=0.5)
    return model


def _switch_rates(shape: Shape) -> dict[str, float]:
    """What makes T5's weights learn at the pace of a decoder's, whose computation scales what T5 leaves to them."""
    return {
        # Logits are divided by sqrt(D), so an embedding must move that much further for the same effect.
        "shared.weight": shape.hidden**0.5,
        # Scores are not divided by the root of a head's width: q is to be that much smaller.
        ".q.weight": (shape.hidden // shape.heads) ** -0.5,
        # A step of the full rate moves a logit further than tokens lie apart, and they change expert together.
        "router.classifier.weight": 0.3,
    }


def _switch_of(experts: int) -> Architecture:
    shape = Shape(
        hidden=128,
        expert_inner=128,
        layers=12,
        experts=experts,
        top_k=1,
        heads=4,
        kv_heads=4,
        vocab=8192,
        context=256,
    )
    return Architecture(
        f"Switch-{experts}: encoder-decoder, every second layer sparse, 6 + 6 MoE layers of {experts} experts, top-1",
        shape,
        _switch,
        seq2seq=True,
        rate_factors=_switch_rates,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "tiny": Architecture(
        "the embedded model: Qwen2-MoE, 6 layers of 32 experts, top-4, one shared expert",
        Shape(
            hidden=256,
            expert_inner=48,
            shared_inner=256,
            dense_inner=512,
            layers=6,
            experts=32,
            top_k=4,
            heads=4,
            kv_heads=2,
            vocab=8192,
            context=1024,
        ),
        _qwen2_moe,
    ),
    "qwen1.5-moe": Architecture(
        "Qwen1.5-MoE-A2.7B: 24 layers of 60 experts, top-4, one shared expert",
        Shape(
            hidden=128,
            expert_inner=32,
            shared_inner=128,
            layers=24,
            experts=60,
            top_k=4,
            heads=4,
            kv_heads=4,
            vocab=8192,
            context=1024,
        ),
        _qwen2_moe,
    ),
    "deepseek-moe": Architecture(
        "DeepSeek-MoE-16B: 28 layers, the first dense, 27 of 64 experts, top-6, two shared experts",
        Shape(
            hidden=128,
            expert_inner=32,
            shared_inner=64,
            dense_inner=384,
            layers=28,
            experts=64,
            top_k=6,
            heads=4,
            kv_heads=4,
            vocab=8192,
            context=1024,
        ),
        _deepseek_moe,
    ),
    "mixtral-8": Architecture(
        "Mixtral-8x7B: 32 layers of 8 experts, top-2",
        Shape(
            hidden=128,
            expert_inner=128,
            layers=32,
            experts=8,
            top_k=2,
            heads=4,
            kv_heads=2,
            vocab=8192,
            context=1024,
        ),
        _mixtral,
    ),
    "switch-32": _switch_of(32),
    "switch-64": _switch_of(64),
    "switch-128": _switch_of(128),
}
