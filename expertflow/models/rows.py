"""Which sequence is each row of a forward pass, and what came before it? For predictors, which need a context.

A forward pass brings new tokens and a KV cache, and says nothing of whose they are. Rows are recognised by the newest
key of the last layer, which depends on all that was read: so beams that change places, rows left out or repeated,
caches that were cropped, and sequences that moved to another batch are noticed. It is a guess that nobody's
correctness rests on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from expertflow.predictor.protocol import UNKNOWN, PathContext

MAX_ROWS = 64  # of the passes that run together: more are not followed
KEPT_ROWS = 256  # remembered, of passes before the last one too: batches take turns
TAIL = 32  # positions that are remembered of each row: predictors look at the last 16
_MARK = 16  # numbers of a key


class Followed(NamedTuple):
    context: PathContext
    # The row of the pass before that each row continues; None where not all of them were in it.
    origin_B: Tensor | None
    marks_BF: Tensor | None = None  # what its rows are recognised by; None without a cache


class Rows:
    """Call `begin` before a pass and `end` after it; `forget` when a pass was not seen to its end.

    Several passes may run together: `begin` for each of them, then `end` once for all.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._marks_RF: Tensor | None = None
        # Of each row remembered: its place among the rows of the pass that was asked about last, -1 without one.
        self._place_R = torch.zeros(0, dtype=torch.int64)
        self._ids_RT = self._mask_RT = self._routes_RTLK = torch.zeros(0)
        self._continued: list[Tensor] = []  # remembered rows that passes under way continue

    def begin(
        self, ids_BS: Tensor, mask_BS: Tensor, cache: Any, source: tuple[Tensor, Tensor] | None = None
    ) -> Followed:
        """The context of a pass over these new tokens. mask_BS: bool, false for padding.

        cache: transformers' KV cache or None. source: what an encoder read, ids and mask.
        """
        followed, known_B = self._follow(ids_BS, mask_BS, cache, source)
        if known_B is not None:
            self._continued.append(known_B)
        return followed

    def foresee(self, ids_B1: Tensor, cache: Any, source: tuple[Tensor, Tensor] | None = None) -> Followed:
        """The context of a pass that is still to come, over these newest tokens. Changes nothing."""
        return self._follow(ids_B1, torch.ones_like(ids_B1, dtype=torch.bool), cache, source)[0]

    def end(self, passed: Sequence[tuple[PathContext, Tensor, Any]], asked: Sequence[bool]) -> None:
        """The passes are over: remember their ends, to recognise the next.

        passed: context, routes_BSLK and the cache as the pass left it, of each. asked: which of them the predictor
        was asked about, one after the other: the next origin_B counts their rows.
        """
        old = self._older()
        marks, ids, masks, routes, places = [], [], [], [], []
        place = 0
        for (context, routes_BSLK, cache), was_asked in zip(passed, asked, strict=True):
            count = len(context.target_BT)
            if (marks_BF := _marks(cache)) is not None:
                marks.append(marks_BF)
                ids.append(_tail(context.target_BT, 0))
                mask_BT = context.target_mask_BT
                assert mask_BT is not None
                masks.append(_tail(mask_BT, 0))
                routes.append(_tail(_routes_after(context, routes_BSLK), UNKNOWN))
                places.append(torch.arange(place, place + count) if was_asked else torch.full((count,), -1))
            place += count if was_asked else 0
        self.forget()
        if not marks:
            return
        if old is not None and old[0].shape[1:] == marks[0].shape[1:]:
            for rows, kept in zip((marks, ids, masks, routes), old, strict=True):
                rows.append(kept)
            places.append(torch.full((len(old[0]),), -1))
        self._marks_RF, self._place_R = torch.cat(marks)[:KEPT_ROWS], torch.cat(places)[:KEPT_ROWS]
        self._ids_RT, self._mask_RT = torch.cat(ids)[:KEPT_ROWS], torch.cat(masks)[:KEPT_ROWS]
        self._routes_RTLK = torch.cat(routes)[:KEPT_ROWS]

    def _follow(
        self, ids_BS: Tensor, mask_BS: Tensor, cache: Any, source: tuple[Tensor, Tensor] | None
    ) -> tuple[Followed, Tensor | None]:
        """And which of the remembered rows they continue."""
        source_BS, source_mask_BS = source if source is not None else (None, None)
        marks_BF = _marks(cache)
        known_B = self._known(marks_BF)
        if known_B is None or len(known_B) != len(ids_BS):
            alone = PathContext(
                target_BT=ids_BS,
                target_mask_BT=mask_BS,
                num_new=ids_BS.shape[1],
                source_BS=source_BS,
                source_mask_BS=source_mask_BS,
            )
            return Followed(alone, None, marks_BF), None
        routes_BTLK = self._routes_RTLK[known_B]
        unknown = torch.full((*ids_BS.shape, *routes_BTLK.shape[2:]), UNKNOWN, dtype=routes_BTLK.dtype)
        context = PathContext(
            target_BT=torch.cat([self._ids_RT[known_B], ids_BS], 1),
            target_mask_BT=torch.cat([self._mask_RT[known_B], mask_BS], 1),
            num_new=ids_BS.shape[1],
            source_BS=source_BS,
            source_mask_BS=source_mask_BS,
            routes_BTLK=torch.cat([routes_BTLK, unknown], 1),
        )
        place_B = self._place_R[known_B]
        return Followed(context, place_B if bool((place_B >= 0).all()) else None, marks_BF), known_B

    def _older(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """The rows remembered that no pass has continued."""
        if self._marks_RF is None:
            return None
        keep_R = torch.ones(len(self._marks_RF), dtype=torch.bool)
        for known_B in self._continued:
            keep_R[known_B] = False
        return self._marks_RF[keep_R], self._ids_RT[keep_R], self._mask_RT[keep_R], self._routes_RTLK[keep_R]

    def _known(self, marks_BF: Tensor | None) -> Tensor | None:
        """Which of the remembered rows each row with these marks continues; None where not all do."""
        if self._marks_RF is None or marks_BF is None or marks_BF.shape[1:] != self._marks_RF.shape[1:]:
            return None
        same_BR = (marks_BF[:, None] == self._marks_RF[None]).all(-1)
        if not bool(same_BR.any(1).all()):
            return None
        # Of rows that are alike so far, its own: their contexts are alike as well.
        own = torch.eye(*same_BR.shape, dtype=torch.bool)
        return (same_BR.int() + (same_BR & own).int()).argmax(1)


class Sources:
    """What an encoder read for each row, recognised by its state at the first position, which has seen all of it."""

    def __init__(self) -> None:
        self._marks_RF: Tensor | None = None
        self._read: list[tuple[Tensor, Tensor]] = []  # ids and mask

    def read(self, ids_BS: Tensor, mask_BS: Tensor, states_BSD: Tensor) -> None:
        marks_BF = _source_marks(states_BSD)
        if self._marks_RF is not None:
            marks_BF = torch.cat([marks_BF, self._marks_RF])
        self._marks_RF = marks_BF[:KEPT_ROWS].clone()
        self._read = [*zip(ids_BS, mask_BS, strict=True), *self._read][:KEPT_ROWS]

    def of(self, states_BSD: Tensor) -> tuple[Tensor, Tensor] | None:
        """ids_BS and mask_BS, padded on the right; None where not every row is known."""
        if self._marks_RF is None:
            return None
        same_BR = (_source_marks(states_BSD)[:, None] == self._marks_RF[None]).all(-1)
        if not bool(same_BR.any(1).all()):
            return None
        found = [self._read[row] for row in same_BR.int().argmax(1).tolist()]
        ids, masks = zip(*found, strict=True)
        return pad_sequence(list(ids), batch_first=True), pad_sequence(list(masks), batch_first=True)


def _source_marks(states_BSD: Tensor) -> Tensor:
    return states_BSD[:, 0, :_MARK].detach().to("cpu", copy=True)


def joined(followed: Sequence[Followed]) -> Followed:
    """Passes of one new position each as one: their rows one after the other, contexts padded on the left."""
    if len(followed) == 1:
        return followed[0]
    contexts = [one.context for one in followed]
    assert all(context.num_new == 1 for context in contexts), "prompts are of many lengths"
    longest = max(context.target_BT.shape[1] for context in contexts)

    def left(tensor: Tensor, empty: int) -> Tensor:
        missing = longest - tensor.shape[1]
        return F.pad(tensor, (*(0, 0) * (tensor.dim() - 2), missing, 0), value=empty)

    shapes = [one.routes_BTLK.shape[2:] for one in contexts if one.routes_BTLK is not None]
    routes_BTLK = None
    if shapes:
        routes_BTLK = torch.cat([left(_routes_of(one, shapes[0]), UNKNOWN) for one in contexts])
    masks = [one.target_mask_BT for one in contexts]
    source_BS, source_mask_BS = _joined_sources(contexts)
    context = PathContext(
        target_BT=torch.cat([left(one.target_BT, 0) for one in contexts]),
        target_mask_BT=torch.cat([left(mask, False) for mask in masks if mask is not None]),
        num_new=1,
        source_BS=source_BS,
        source_mask_BS=source_mask_BS,
        routes_BTLK=routes_BTLK,
    )
    origins = [one.origin_B for one in followed if one.origin_B is not None]
    marks = [one.marks_BF for one in followed if one.marks_BF is not None]
    return Followed(
        context,
        torch.cat(origins) if len(origins) == len(followed) else None,
        torch.cat(marks) if len(marks) == len(followed) else None,
    )


def _routes_of(context: PathContext, shape_LK: Sequence[int]) -> Tensor:
    if context.routes_BTLK is not None:
        return context.routes_BTLK
    return torch.full((*context.target_BT.shape, *shape_LK), UNKNOWN)


def _joined_sources(contexts: Sequence[PathContext]) -> tuple[Tensor | None, Tensor | None]:
    """What the encoder read for each row, padded on the right; None where that is not known of all of them."""
    sources = [(one.source_BS, one.source_mask_BS) for one in contexts]
    known = [(ids, mask) for ids, mask in sources if ids is not None and mask is not None]
    if len(known) < len(contexts):
        return None, None
    longest = max(ids.shape[1] for ids, _ in known)
    padded = [[F.pad(part, (0, longest - part.shape[1])) for part in both] for both in known]
    return torch.cat([ids for ids, _ in padded]), torch.cat([mask for _, mask in padded])


def _routes_after(context: PathContext, routes_BSLK: Tensor) -> Tensor:
    mask_BT = context.target_mask_BT
    assert mask_BT is not None
    # In padding the routes mean nothing, so nothing is to be read from them.
    fresh = routes_BSLK.masked_fill(~mask_BT[:, -context.num_new :, None, None], UNKNOWN)
    known = context.routes_BTLK
    return fresh if known is None else torch.cat([known[:, : -context.num_new], fresh], 1)


def _tail(rows_BTx: Tensor, empty: int) -> Tensor:
    """The last TAIL positions, padded on the left. A copy: a slice would keep the whole prompt."""
    tail = rows_BTx[:, -TAIL:]
    missing = TAIL - tail.shape[1]
    if not missing:
        return tail.clone()
    filled = tail.new_full((len(tail), TAIL, *tail.shape[2:]), empty)
    filled[:, missing:] = tail
    return filled


def _marks(cache: Any) -> Tensor | None:
    """The newest key of each row in the last layer that has keys; None without a cache, or in another kind of one."""
    if cache is None or not hasattr(cache, "get_seq_length") or not int(cache.get_seq_length()):
        return None
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in reversed(getattr(cache, "layers", ())):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[2]:
            return keys[:, 0, -1, :_MARK].detach().to("cpu", copy=True)
    return None
