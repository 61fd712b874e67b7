"""What a batch carries from one decode step to the next, and what the next step must be told of it.

The newest token of every sequence is in the last column, so shorter sequences are padded on the left; what an
encoder read is padded on the right. Moving sequences between batches is regroup.py's business.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from expertflow.kv_name import KV_CACHE
from expertflow.scheduler.carried import Axis, Carried
from expertflow.scheduler.kv_tensors import TensorName, carried_by, lengths_seen, objection, rebuilt


@dataclass
class EncoderOutput(BaseModelOutput):
    """What `forward` takes for an encoder's work done before; Switch and NLLB look for the router's logits."""

    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, eq=False)
class BatchState:
    """The sequences of one batch between two decode steps.

    cache: transformers' DynamicCache, or EncoderDecoderCache of two.
    mask_BT: 1 where a cached position is a token of the sequence, 0 where it is padding on the left. Of an
        encoder-decoder it is the decoder's.
    encoder_BSD, encoder_mask_BS: what the encoder made of the source, padded on the right; None for decoders.
    lengths_must_agree: what a sequence computes depends on how long the batch is, so only sequences of one
        length, without padding, can change batches: `positions_follow_cache(model)`.

    ValueError when the parts do not fit together, or the cache is one whose sequences cannot be moved.
    """

    cache: Cache
    mask_BT: Tensor
    encoder_BSD: Tensor | None = None
    encoder_mask_BS: Tensor | None = None
    lengths_must_agree: bool = False

    def __post_init__(self) -> None:
        if (reason := objection(self.cache)) is not None:
            raise ValueError(
                f"sequences of this KV cache cannot change batches: {reason}; keep arrival order"
            )
        if (self.encoder_BSD is None) != (self.encoder_mask_BS is None):
            raise ValueError("encoder states and the mask of their source go together: give both or neither")
        if (self.mask_BT.diff(dim=1) < 0).any():
            raise ValueError("mask_BT has padding behind a token; pad shorter sequences on the left")
        if self.encoder_mask_BS is not None and (self.encoder_mask_BS.diff(dim=1) > 0).any():
            raise ValueError("encoder_mask_BS has padding before a token; pad shorter sources on the right")
        seen = lengths_seen(self.cache) - {self.mask_BT.shape[1]}
        if seen:
            raise ValueError(
                f"mask_BT covers {self.mask_BT.shape[1]} positions and the cache has read {min(seen)}; a mask covers "
                "the cached positions and not the next token"
            )
        for name, part in self.tensors().items():
            _check_fits(name, part, self.num_rows, self.length(part.axis))

    @property
    def num_rows(self) -> int:
        return len(self.mask_BT)

    def length(self, axis: Axis) -> int:
        """Positions along this axis, padding included."""
        mask = self.masks().get(axis)
        return 0 if mask is None else mask.shape[1]

    def row_lengths(self) -> dict[Axis, list[int]]:
        """For each axis, how many positions of each sequence are not padding."""
        masks = self.masks()
        none = [0] * self.num_rows
        return {axis: masks[axis].sum(dim=1).tolist() if axis in masks else none for axis in Axis}

    def masks(self) -> dict[Axis, Tensor]:
        masks = {Axis.TOKENS: self.mask_BT}
        if self.encoder_mask_BS is not None:
            masks[Axis.SOURCE] = self.encoder_mask_BS
        return masks

    def tensors(self) -> dict[TensorName, Carried]:
        """All that is carried except the masks, under names that are the same for every batch of one model."""
        tensors = carried_by(self.cache)
        if self.encoder_BSD is not None:
            tensors["encoder",] = Carried(self.encoder_BSD, Axis.SOURCE, columns=1)
        return tensors

    def holding(self, tensors: Mapping[TensorName, Tensor], masks: Mapping[Axis, Tensor]) -> BatchState:
        """A state of the same model with these tensors and masks."""
        mask_BT = masks[Axis.TOKENS]
        return BatchState(
            rebuilt(self.cache, tensors, mask_BT.shape[1]),
            mask_BT,
            tensors.get(("encoder",)),
            masks.get(Axis.SOURCE),
            self.lengths_must_agree,
        )


def supports(cache: Cache) -> bool:
    """Whether sequences of this cache can change batches; `BatchState` says why not."""
    return objection(cache) is None


def positions_follow_cache(model: Any) -> bool:
    """Whether what a sequence computes depends on how long its batch is, and nothing can be told to prevent it.

    NLLB's decoder counts sinusoids from the cache's length, Llama 4 its attention temperature, and dynamic and
    long rotary embeddings take the frequencies of the longest sequence in the batch. So they do in batches that
    transformers pads. Switch has distances between columns only, which padding keeps.
    """
    config = model.config.get_text_config(decoder=True)
    accepts = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder:
        return "decoder_position_ids" not in accepts and not hasattr(config, "relative_attention_num_buckets")
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        "position_ids" not in accepts
        or bool(getattr(config, "attn_temperature_tuning", False))
        or not _rope_types(rope).isdisjoint({"dynamic", "longrope"})
    )


def position_ids(state: BatchState) -> Tensor:
    """int64 [B, 1]: the position of each sequence's next token, that is how many tokens it has."""
    return state.mask_BT.long().sum(dim=1, keepdim=True)


def state_of(model: Any, model_kwargs: Mapping[str, Any]) -> BatchState:
    """What `generate` holds between two steps, after `_update_model_kwargs_for_generation`.

    The decoder's mask then covers the next token already; or it is None, when nobody is padded.
    """
    cache = model_kwargs[KV_CACHE]
    seq2seq = model.config.is_encoder_decoder
    encoder_BSD = model_kwargs["encoder_outputs"].last_hidden_state if seq2seq else None
    mask_BT = model_kwargs.get("decoder_attention_mask" if seq2seq else "attention_mask")
    if mask_BT is None:
        tensor = next(iter(carried_by(cache).values())).tensor
        mask_BT = torch.ones(len(tensor), cache.get_seq_length() + 1, dtype=torch.long, device=tensor.device)
    encoder_mask_BS = model_kwargs.get("attention_mask") if seq2seq else None
    if encoder_BSD is not None and encoder_mask_BS is None:
        encoder_mask_BS = torch.ones(encoder_BSD.shape[:2], dtype=torch.long, device=encoder_BSD.device)
    return BatchState(
        cache, mask_BT[:, :-1], encoder_BSD, encoder_mask_BS, lengths_must_agree=positions_follow_cache(model)
    )


def model_kwargs_of(state: BatchState) -> dict[str, Any]:
    """The inverse of `state_of`: what `prepare_inputs_for_generation` and `forward` need for the next token.

    After regrouping all of it is needed: the mask, or a sequence attends to its padding; position_ids, or rotary
    positions count the padding (not of an encoder-decoder, which takes none).
    """
    mask_BT = torch.cat([state.mask_BT, state.mask_BT.new_ones(state.num_rows, 1)], dim=1)
    kwargs = {KV_CACHE: state.cache, "use_cache": True}
    if state.encoder_BSD is None:
        return kwargs | {"attention_mask": mask_BT, "position_ids": position_ids(state)}
    return kwargs | {
        "decoder_attention_mask": mask_BT,
        "attention_mask": state.encoder_mask_BS,
        "encoder_outputs": EncoderOutput(last_hidden_state=state.encoder_BSD),
    }


def _rope_types(rope: Mapping[str, Any]) -> set[str]:
    """Of all layers: models with several kinds of attention have a mapping for each."""
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return {str(each.get("rope_type", "default")) for each in (rope, *nested)}


def _check_fits(name: TensorName, part: Carried, rows: int, length: int) -> None:
    if part.num_rows != rows:
        raise ValueError(f"{name} has {part.num_rows} sequences, the mask {rows}")
    if rows > 1 and part.tensor.stride(0) == 0:
        raise ValueError(f"the sequences of {name} share one memory; give it with .contiguous()")
    if part.num_columns != part.width(length):
        raise ValueError(
            f"{name} has {part.num_columns} positions where its mask asks for {part.width(length)}"
        )
