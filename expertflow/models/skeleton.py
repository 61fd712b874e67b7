"""Skeleton: a model on the meta device without its experts, and how much work its passes are.

Built from a config and the headers of its checkpoint; no weight is read, no code of a checkpoint is run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from expertflow.cache.loader import slot_bytes
from expertflow.models.attach import take_out_experts
from expertflow.models.footprint import measure_model
from expertflow.models.spans import MoELayer, derive_expert_spans, find_moe_layers
from expertflow.step_time import Pass, Work
from expertflow.store.checkpoint import Checkpoint
from expertflow.store.disk import DiskStore


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device without its experts, and what follows from it and the headers."""

    model: PreTrainedModel = field(repr=False)
    moe_layers: list[MoELayer] = field(repr=False)
    checkpoint: Checkpoint = field(repr=False)
    work: Work
    slot_bytes: int
    staging_bytes: int
    expert_bytes: int  # all experts, on disk
    dtype: torch.dtype
    expert_matrix: tuple[int, int]
    dense_matrix: tuple[int, int]

    @property
    def hidden(self) -> int:
        """D, the width of what enters an MoE layer."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)


def unknown_architecture(source: str, model_type: str, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ValueError(
        f"{source}: this version of transformers knows no language model of type {model_type!r} ({reason}); "
        f"upgrade transformers (code that comes with a checkpoint is never run)"
    )


def build_skeleton(config: PretrainedConfig, checkpoint: Checkpoint) -> Skeleton:
    """The model on meta, experts located and taken out. ValueError for dense and unknown models."""
    dtype = _dtype(config, checkpoint)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, ImportError) as error:
        raise unknown_architecture(str(checkpoint.folder), config.model_type, error) from None
    moe_layers = find_moe_layers(model)
    if not moe_layers:
        raise ValueError(
            f"{checkpoint.folder} ({type(model).__name__}, {config.model_type}) has no experts that "
            f"could be left on disk: for a dense model use transformers or accelerate directly"
        )
    spans = derive_expert_spans(model, moe_layers, checkpoint)
    expert_bytes = sum(part.nbytes for parts in spans.parts.values() for part in parts)
    multiplied_bytes = (
        sum(
            layer.num_experts * sum(math.prod(shape) for shape in layer.role_shapes.values())
            for layer in moe_layers
        )
        * dtype.itemsize
    )
    matrices = [shape for layer in moe_layers for shape in layer.role_shapes.values() if len(shape) == 2]
    expert_matrix = max(matrices, key=math.prod)
    with DiskStore(checkpoint, spans.parts) as store:
        slot, raw = slot_bytes(store, dtype), store.slot_bytes
    take_out_experts(model, moe_layers, spans)
    top_k = _top_k(model, moe_layers)
    decode, prefill = _passes(model, moe_layers)
    kv = measure_model(model, moe_layers, slot, 0).kv_bytes_per_token
    num_experts = sum(layer.num_experts for layer in moe_layers)
    work = Work(decode, prefill, top_k, multiplied_bytes // num_experts, expert_bytes // num_experts, kv)
    return Skeleton(
        model, moe_layers, checkpoint, work, slot, 0 if slot == raw else 2 * raw, expert_bytes, dtype,
        (expert_matrix[0], expert_matrix[1]), _dense_matrix(model, (expert_matrix[0], expert_matrix[1])),
    )  # fmt: skip


def _dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """As from_pretrained chooses: the config's, else that of the first floating-point tensor."""
    named = config.dtype or getattr(config.get_text_config(decoder=True), "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    return next(span.dtype for span in checkpoint.spans.values() if span.dtype.is_floating_point)


def _top_k(model: PreTrainedModel, moe_layers: Sequence[MoELayer]) -> int:
    """Experts per token, as a dry run on meta hands them to the experts module.

    Switch and NLLB, whose routers pass a mask instead, choose one and two.
    """
    if moe_layers[0].one_module_per_expert:
        return 2 if hasattr(model.config, "second_expert_policy") else 1
    seen: list[int] = []

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["top_k_index"].shape[-1] if "top_k_index" in kwargs else args[1].shape[-1])

    experts = model.get_submodule(moe_layers[0].name)
    hook = experts.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            model.eval()(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), use_cache=True)
    except Exception as error:  # some forward passes look at values, which meta tensors do not have
        if not seen:
            raise ValueError(
                f"{type(model).__name__} cannot be run without its weights to count its experts per token "
                f"({type(error).__name__}: {error}); please report the model"
            ) from error
    finally:
        hook.remove()
    return seen[0]


def _passes(model: PreTrainedModel, moe_layers: Sequence[MoELayer]) -> tuple[Pass, Pass]:
    """(decode, prefill): decoder and encoder of a seq2seq model, else the whole model twice."""
    head = model.get_output_embeddings()
    head_bytes = head.weight.numel() * head.weight.element_size() if head is not None else 0
    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    encoder_modules = set(encoder.modules()) if encoder is not None else set()

    def one(inside: set[nn.Module], last_bytes: int) -> Pass:
        stacks = {}
        experts = []
        for layer in moe_layers:
            stack = _stack_of(model, layer.name)
            if stack in inside:
                stacks[id(stack)] = len(stack)
                experts.append(layer.num_experts)
        dense_bytes = sum(
            parameter.numel() * parameter.element_size()
            for module in inside
            if module is not head and not isinstance(module, nn.Embedding)
            for parameter in module.parameters(recurse=False)
        )
        return Pass(sum(stacks.values()), tuple(experts), dense_bytes, last_bytes)

    decode = one(set(model.modules()) - encoder_modules, head_bytes)
    return decode, decode if encoder is None else one(encoder_modules, 0)


def _stack_of(model: nn.Module, name: str) -> nn.ModuleList:
    """The list of layers that a module lies in."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, nn.ModuleList):
            return module
    raise AssertionError(f"{name} lies in no list of layers")


def _dense_matrix(model: nn.Module, otherwise: tuple[int, int]) -> tuple[int, int]:
    """The shape that most bytes of dense matrices have."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    total: dict[tuple[int, int], int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            shape = (module.out_features, module.in_features)
            total[shape] = total.get(shape, 0) + module.weight.numel()
    return max(total, key=total.__getitem__) if total else otherwise
