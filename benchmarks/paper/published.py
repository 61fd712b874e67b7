"""The paper's six models: published configurations as transformers' objects, and the parameters they come to.

Nothing is downloaded: the figures are those of the config.json of each release. Parameters are counted on meta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    SwitchTransformersConfig,
)

from expertflow.budget import ModelBytes
from expertflow.models import deepseek_moe
from expertflow.models.footprint import measure_model
from expertflow.models.spans import find_moe_layers


def _switch(experts: int) -> Callable[[], PretrainedConfig]:
    """google/switch-base-N"""
    return lambda: SwitchTransformersConfig(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12,
        num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_heads=12, num_experts=experts,
    )  # fmt: skip


def _mixtral() -> PretrainedConfig:
    """mistralai/Mixtral-8x7B-v0.1"""
    return MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip


def _qwen() -> PretrainedConfig:
    """Qwen/Qwen1.5-MoE-A2.7B"""
    return Qwen2MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, num_experts=60, num_experts_per_tok=4,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
    )  # fmt: skip


def _deepseek() -> PretrainedConfig:
    """deepseek-ai/deepseek-moe-16b-base"""
    return deepseek_moe.DeepseekConfig()


@dataclass(frozen=True)
class InPaper:
    """A line of the paper's Table 1. activated, total: billions of parameters; share: of experts, in per cent."""

    layers: int
    activated: float
    total: float
    top_k: int
    experts: int
    share: float


@dataclass(frozen=True)
class Published:
    """A model of the paper. recording: its stand-in in zoo/traces, whose routes have the published shape; size: in
    sim/hardware.py; task: of the recording that stands for the paper's data set."""

    name: str
    config: Callable[[], PretrainedConfig]
    recording: str
    size: str
    task: str
    dataset: str  # the paper's, in Fig. 6
    in_paper: InPaper


MODELS: tuple[Published, ...] = (
    *(
        Published(
            f"Switch-{experts}", _switch(experts), f"switch-{experts}", f"switch-base-{experts}", "translation",
            "WMT16", InPaper(12, 0.22, total, 1, experts, share),
        )
        for experts, total, share in ((32, 1.98, 91.58), (64, 3.79, 95.61), (128, 7.41, 97.75))
    ),
    Published("Mixtral-8", _mixtral, "mixtral-8", "mixtral-8x7b", "chat", "XSUM",
              InPaper(32, 12.90, 46.70, 2, 8, 96.57)),
    Published("Qwen1.5", _qwen, "qwen1.5-moe", "qwen1.5-moe-a2.7b", "chat", "Alpaca",
              InPaper(24, 2.70, 14.30, 4, 60, 88.95)),
    Published("DeepSeek-MoE", _deepseek, "deepseek-moe", "deepseek-moe-16b", "math", "AIME2024",
              InPaper(27, 2.80, 16.40, 6, 64, 94.14)),
)  # fmt: skip


def published(name: str) -> Published:
    return next(model for model in MODELS if model.name == name)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; shared experts run for every token and count as no routed ones."""

    layers: int  # with routed experts
    experts: int  # of a layer
    top_k: int
    total: int
    routed: int
    shared: int

    @property
    def expert(self) -> int:
        return self.routed // (self.layers * self.experts)

    @property
    def activated(self) -> int:
        """By one token, embeddings included."""
        return self.total - self.routed + self.layers * self.top_k * self.expert


def on_meta(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model of a configuration, weights tied as in use, no byte allocated."""
    deepseek_moe.register()
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def count(model: PreTrainedModel) -> Parameters:
    layers = find_moe_layers(model)
    config = model.config
    routed = sum(layer.num_experts * sum(map(math.prod, layer.role_shapes.values())) for layer in layers)
    return Parameters(
        layers=len(layers),
        experts=layers[0].num_experts,
        top_k=getattr(config, "num_experts_per_tok", 1),
        total=_numel(model),
        routed=routed,
        shared=sum(_numel(module) for name, module in model.named_modules() if _is_shared(name)),
    )


def _is_shared(name: str) -> bool:
    return name.rpartition(".")[2] in ("shared_expert", "shared_experts")


def _numel(module: nn.Module) -> int:
    """Tied parameters once."""
    return sum({id(parameter): parameter.numel() for parameter in module.parameters()}.values())


@cache
def model_bytes(name: str) -> ModelBytes:
    """What budget.py asks of a model, counted from its configuration in bfloat16."""
    model = on_meta(published(name).config())
    layers = find_moe_layers(model)
    expert = [sum(map(math.prod, layer.role_shapes.values())) * model.dtype.itemsize for layer in layers]
    whole = measure_model(model, layers, max(expert), 0)
    routed = sum(layer.num_experts * each for layer, each in zip(layers, expert, strict=True))
    return replace(whole, dense_bytes=whole.dense_bytes - routed)
