"""A pass of the decoder while it runs: what it was called with, and which of its rows a predictor is asked about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from expertflow.kv_name import kv_cache_in
from expertflow.models.rows import Followed


class Call(NamedTuple):
    """What the decoder was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class RunningPass:
    """The decoder while it runs: one call of it, or several that run together."""

    calls: list[Call]
    followed: list[Followed]
    asked: list[bool]  # which calls the predictor is asked about: those that decode, or a prompt alone
    whole: Followed  # those that are asked about, as one
    thread: int
    started: float
    p_LE: np.ndarray | None = None  # predicted for all their rows, as far as is known
    routes_L: list[Tensor] | None = None

    @cached_property
    def asked_N(self) -> Tensor:
        """Among all new positions of the calls: the real ones of those that are asked about."""
        masks = [
            mask.flatten() & asked
            for one, asked in zip(self.followed, self.asked, strict=True)
            if (mask := one.context.new_mask_BS) is not None
        ]
        return torch.cat(masks)

    @cached_property
    def all_asked(self) -> bool:
        """As in nearly every decode step: then nobody need pick rows at each layer."""
        return bool(self.asked_N.all())


def packs_sequences(kwargs: dict[str, Any]) -> bool:
    cache = kv_cache_in(kwargs)
    return kwargs.get("cu_seq_lens_q") is not None or (
        cache is not None and not hasattr(cache, "get_seq_length")
    )


def ids_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Token ids of a pass, [B, S] on the CPU; None where it got embeddings."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None
    return ids.detach().to("cpu", torch.int64, copy=True)


def mask_of(kwargs: dict[str, Any], ids_BS: Tensor) -> Tensor:
    """True where the new positions are no padding."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < ids_BS.shape[1]:
        return torch.ones_like(ids_BS, dtype=torch.bool)  # as in capture.py
    return mask[:, mask.shape[1] - ids_BS.shape[1] :].detach().to("cpu", torch.bool, copy=True)
