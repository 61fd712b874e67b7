"""What a model needs in memory, measured on its meta-device skeleton before a byte is read.

The KV cache is asked, not computed: a dry run on meta gives the bytes of one more token for any
attention (grouped, latent, sliding) without a table of families.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from expertflow.budget import ModelBytes
from expertflow.config import Settings
from expertflow.kv_name import kv_cache_of
from expertflow.models.products import widens
from expertflow.models.spans import MoELayer

logger = logging.getLogger(__name__)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def measure_model(
    model: PreTrainedModel,
    moe_layers: Sequence[MoELayer],
    slot_bytes: int,
    staging_bytes: int,
    context: int = 0,
) -> ModelBytes:
    """model: on meta, its experts already taken out. Tied weights count once. context: of a sequence, tokens."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # Tying happens after loading; on meta the two ends are still two tensors.
    tied_bytes = sum(p.numel() * p.element_size() for name, p in parameters.items() if name in tied)
    distinct = {id(p) for name, p in parameters.items() if name not in tied}
    already_one = sum(
        p.numel() * p.element_size() for name, p in parameters.items() if name in tied and id(p) in distinct
    )
    return ModelBytes(
        dense_bytes=tensor_bytes(model) - (tied_bytes - already_one),
        num_experts=sum(layer.num_experts for layer in moe_layers),
        num_moe_layers=len(moe_layers),
        slot_bytes=slot_bytes,
        staging_bytes=staging_bytes,
        kv_bytes_per_token=kv_bytes_per_token(model),
        scratch_bytes_per_token=_scratch_bytes_per_token(model, context),
        scratch_bytes_per_sequence=16 * _vocabulary(model),
    )


def trained_context(model: PreTrainedModel) -> int | None:
    """Tokens that the model was trained for; None where its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or None


def within_training(model: PreTrainedModel, settings: Settings) -> Settings:
    """The settings with no more context than the model was trained for, so that no KV cache is reserved for more."""
    trained = trained_context(model)
    return settings if trained is None else replace(settings, context=min(settings.context, trained))


def honoured_prefill(model: PreTrainedModel, settings: Settings) -> Settings:
    """The settings with the prefill_chunk that this model runs with: its own, or the whole context.

    Recurrent layers (Jamba's Mamba, Qwen3-Next's linear attention) lose their state or their padding
    between two chunks of a prompt in transformers 5.23, and encoders read a prompt whole. ValueError when
    a chunk was asked for that such a model cannot honour.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    whole = "reads its prompt with an encoder" if model.config.is_encoder_decoder else None
    if model._is_stateful or not kinds <= _ATTENTION_KINDS:
        whole = "has recurrent layers, whose state transformers does not carry over from chunk to chunk"
    if whole is None or settings.prefill_chunk >= settings.context:
        return settings
    if settings.prefill_chunk != Settings().prefill_chunk:
        raise ValueError(
            f"prefill_chunk={settings.prefill_chunk}: {type(model).__name__} {whole}; leave prefill_chunk out, "
            f"and lower context={settings.context} if memory is short"
        )
    return replace(settings, prefill_chunk=settings.context)


_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """What the cache grows by for one more token of one sequence, over all layers."""
    try:
        one, two = (_cache_bytes(_dry_run(model, tokens)) for tokens in (1, 2))
        if two > one:
            return two - one
    except Exception as error:
        # Some forward passes look at values, which meta tensors do not have.
        logger.debug("no dry run on meta for %s: %s", type(model).__name__, error)
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = (
        getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    )
    if getattr(config, "kv_lora_rank", None):  # latent attention: transformers caches the expanded heads
        key = (getattr(config, "qk_nope_head_dim", None) or 0) + (
            getattr(config, "qk_rope_head_dim", None) or 0
        )
        return config.num_hidden_layers * heads * (key + (config.v_head_dim or key)) * model.dtype.itemsize
    return 2 * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize


@torch.no_grad()
def _dry_run(model: PreTrainedModel, tokens: int) -> Any:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    was_training = model.training
    model.eval()
    try:
        if model.config.is_encoder_decoder:
            # Not use_cache=True, which Switch hands to its encoder and then refuses; decoders cache anyway.
            return kv_cache_of(model(input_ids=ids, decoder_input_ids=ids))
        return kv_cache_of(model(input_ids=ids, use_cache=True))
    finally:
        model.train(was_training)


def _cache_bytes(cache: Any) -> int:
    """Bytes of every tensor a transformers cache holds, of whatever layer kinds it is made."""
    total, stack, seen = 0, [cache], set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, (list, tuple)):
            stack += item
        elif isinstance(item, dict):
            stack += item.values()
        elif type(item).__module__.startswith("transformers.cache_utils"):
            stack += vars(item).values()
    return total


def _vocabulary(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    return head.weight.shape[0] if head is not None else 0


def _scratch_bytes_per_token(model: PreTrainedModel, context: int) -> int:
    """Activations alive at once while one layer computes, counted generously: eight hidden states, the
    widest projection four times, and the [K, D] rows of experts five times (in, out, sorted back, and twice
    as wide when the routing weights are float32)."""
    config = model.config.get_text_config(decoder=True)
    hidden = config.hidden_size
    head = model.get_output_embeddings()
    dense = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    widths = [m.out_features for m in dense]
    top_k = next(
        (
            value
            for name in (
                "num_experts_per_tok",
                "moe_top_k",
                "top_k_experts",
                "num_experts_per_token",
                "moe_topk",
            )
            if isinstance(value := getattr(config, name, None), int)
        ),
        2,
    )
    per_token = 8 * hidden + 4 * max(widths, default=hidden) + 5 * top_k * hidden
    if widens(_MANY_ROWS, torch.empty(0, dtype=model.dtype)):
        # Rows in float32, and as much of what they give as one block of the weight makes.
        per_token += 2 * (max((m.in_features for m in dense), default=hidden) + max(widths, default=hidden))
    if config._attn_implementation == "eager":
        heads: int = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or 1
        # It writes out a score for each earlier token.
        return per_token * model.dtype.itemsize + 3 * heads * max(context, _LEAST_EAGER_SPAN) * 4
    return per_token * model.dtype.itemsize


_MANY_ROWS = 256
_LEAST_EAGER_SPAN = 2048  # tokens: what budgets for short contexts were tried with
