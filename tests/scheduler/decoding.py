"""Tiny float64 models of every cache kind, and the few lines of a decode loop that regrouping needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertflow.models import deepseek_moe
from expertflow.scheduler.batch_state import BatchState, model_kwargs_of, state_of
from tests.families import FAMILIES, PAD, VOCAB_SIZE, Family, decoder_only, random_model

_LLAMA4 = decoder_only(
    "llama4_text",
    num_hidden_layers=4,
    num_local_experts=8,
    num_experts_per_tok=1,
    head_dim=8,
    intermediate_size_mlp=48,
    interleave_moe_layer_step=1,
    no_rope_layers=[1, 1, 1, 0],
    attention_chunk_size=5,
    attn_temperature_tuning=False,
)
_MIXTRAL = FAMILIES["mixtral"].config

# What is remarkable about the cache -> a model that has such a cache.
KINDS: dict[str, Family] = {
    "grouped_query": FAMILIES["mixtral"],
    "multi_head": FAMILIES["deepseek_moe"],
    "shared_expert": FAMILIES["qwen2_moe"],
    "sliding_window": replace(FAMILIES["mixtral"], config=_MIXTRAL | {"sliding_window": 5}),
    "alternating_windows": replace(
        FAMILIES["gpt_oss"], config=FAMILIES["gpt_oss"].config | {"sliding_window": 6}
    ),
    "chunks": Family(_LLAMA4, moe_layers=4),
    "latent_v2": FAMILIES["deepseek_v2"],
    "latent_v3": FAMILIES["deepseek_v3"],
    "linear_attention": FAMILIES["qwen3_next"],
    "convolution": FAMILIES["lfm2_moe"],
    "state_space": FAMILIES["jamba"],
    "relative_positions": FAMILIES["switch"],
    "sinusoids": FAMILIES["nllb_moe"],
}


class Float64Throughout(TorchDispatchMode):
    """Keeps in float64 what models convert to float32, such as routers and linear attention.

    There the last bits depend on how many rows a product has, moved or not, and 1e-7 would hide a wrong column.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        down = kwargs.get("dtype") is torch.float32
        if down and func is torch.ops.aten._to_copy.default and args[0].dtype is torch.float64:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


def model_of(kind: str, seed: int = 0) -> Any:
    if kind == "multi_head":
        deepseek_moe.register()
    model = random_model(KINDS[kind], seed)
    model.set_experts_implementation("eager")  # grouped_mm knows no float64
    return model.double()


def prompts(count: int, seed: int, longest: int = 14) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def prefill(model: Any, batch: Sequence[Sequence[int]]) -> tuple[Tensor, BatchState]:
    """(logits [B, V] of the first new token, state). Padded as engine/runner.py pads."""
    seq2seq = model.config.is_encoder_decoder
    longest = max(map(len, batch))
    ids_BT = torch.full((len(batch), longest), PAD)
    for row, ids in enumerate(batch):
        ids_BT[row, slice(0, len(ids)) if seq2seq else slice(longest - len(ids), longest)] = torch.tensor(ids)

    def first_step(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=seq2seq
        )
        return outputs.logits[:, -1], state_of(model, model_kwargs)

    mask_BT = (ids_BT != PAD).long()
    with Float64Throughout():
        return model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=1, custom_generate=first_step)


@torch.no_grad()
def step(model: Any, state: BatchState, tokens_B: Sequence[int]) -> tuple[Tensor, BatchState]:
    model_kwargs = model_kwargs_of(state)
    inputs = model.prepare_inputs_for_generation(
        torch.tensor(tokens_B)[:, None], next_sequence_length=1, **model_kwargs
    )
    with Float64Throughout():
        outputs = model(**inputs, return_dict=True)
    model_kwargs = model._update_model_kwargs_for_generation(
        outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
    )
    return outputs.logits[:, -1], state_of(model, model_kwargs)


def alone(model: Any, prompt: Sequence[int], steps: int) -> Tensor:
    """Logits [steps, V] of greedy decoding of one sequence in a batch of its own."""
    logits_BV, state = prefill(model, [prompt])
    all_logits = [logits_BV[0]]
    while len(all_logits) < steps:
        logits_BV, state = step(model, state, logits_BV.argmax(-1).tolist())
        all_logits.append(logits_BV[0])
    return torch.stack(all_logits)
