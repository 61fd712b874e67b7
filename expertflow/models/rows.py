"""Which sequence is each row of a forward pass, and what came before it? For predictors, which need a context.

A forward pass brings new tokens and a KV cache, and says nothing of whose they are. Rows are recognised by the newest
key of the last layer, which depends on all that was read: so beams that change places, rows left out or repeated, and
caches that were cropped are noticed. It is a guess that nobody's correctness rests on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertflow.predictor.protocol import UNKNOWN, PathContext

MAX_ROWS = 64  # more are not followed
TAIL = 32  # positions that are remembered of each row: predictors look at the last 16
_MARK = 16  # numbers of a key


class Followed(NamedTuple):
    context: PathContext
    origin_B: Tensor | None  # the row of the pass before; None: nothing is known of what was before


class Rows:
    """Call `begin` before a pass and `end` after it; `forget` when a pass was not seen to its end."""

    def __init__(self) -> None:
        self._marks_BF: Tensor | None = None
        self._length = 0
        self._ids_BT = self._mask_BT = self._routes_BTLK = torch.zeros(0)

    def forget(self) -> None:
        self._marks_BF = None

    def begin(
        self, ids_BS: Tensor, mask_BS: Tensor, cache: Any, source: tuple[Tensor, Tensor] | None = None
    ) -> Followed:
        """The context of a pass over these new tokens. mask_BS: bool, false for padding.

        cache: transformers' past_key_values or None. source: what an encoder read, ids and mask.
        """
        source_BS, source_mask_BS = source if source is not None else (None, None)
        origin_B = self._origin(cache)
        if origin_B is None or len(origin_B) != len(ids_BS):
            alone = PathContext(
                target_BT=ids_BS,
                target_mask_BT=mask_BS,
                num_new=ids_BS.shape[1],
                source_BS=source_BS,
                source_mask_BS=source_mask_BS,
            )
            return Followed(alone, None)
        routes_BTLK = self._routes_BTLK[origin_B]
        unknown = torch.full((*ids_BS.shape, *routes_BTLK.shape[2:]), UNKNOWN, dtype=routes_BTLK.dtype)
        context = PathContext(
            target_BT=torch.cat([self._ids_BT[origin_B], ids_BS], 1),
            target_mask_BT=torch.cat([self._mask_BT[origin_B], mask_BS], 1),
            num_new=ids_BS.shape[1],
            source_BS=source_BS,
            source_mask_BS=source_mask_BS,
            routes_BTLK=torch.cat([routes_BTLK, unknown], 1),
        )
        return Followed(context, origin_B)

    def end(self, context: PathContext, routes_BSLK: Tensor, cache: Any) -> None:
        """The pass is over: remember its end, to recognise the next. cache: as the pass left it."""
        self._marks_BF, self._length = _marks(cache), _length(cache)
        if self._marks_BF is None:
            return
        mask_BT = context.target_mask_BT
        assert mask_BT is not None
        known = context.routes_BTLK
        # In padding the routes mean nothing, so nothing is to be read from them.
        fresh = routes_BSLK.masked_fill(~mask_BT[:, -context.num_new :, None, None], UNKNOWN)
        if known is not None:
            fresh = torch.cat([known[:, : -context.num_new], fresh], 1)
        # Copies: a slice would keep the whole prompt.
        self._ids_BT = context.target_BT[:, -TAIL:].clone()
        self._mask_BT = mask_BT[:, -TAIL:].clone()
        self._routes_BTLK = fresh[:, -TAIL:].clone()

    def _origin(self, cache: Any) -> Tensor | None:
        if self._marks_BF is None or _length(cache) != self._length:
            return None
        marks_BF = _marks(cache)
        if marks_BF is None or marks_BF.shape[1:] != self._marks_BF.shape[1:]:
            return None
        same_BR = (marks_BF[:, None] == self._marks_BF[None]).all(-1)
        if not bool(same_BR.any(1).all()):
            return None
        # Of rows that are alike so far, its own: their contexts are alike as well.
        own = torch.eye(*same_BR.shape, dtype=torch.bool)
        return (same_BR.int() + (same_BR & own).int()).argmax(1)


def _length(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _marks(cache: Any) -> Tensor | None:
    """The newest key of each row in the last layer that has keys; None without a cache, or in another kind of one."""
    if cache is None or not _length(cache):
        return None
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in reversed(getattr(cache, "layers", ())):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[2]:
            return keys[:, 0, -1, :_MARK].detach().to("cpu", copy=True)
    return None
