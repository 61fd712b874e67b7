"""The online table: learns from every route it is shown, in bounded memory, with no training at all.

It keeps the last few routes of each token id, and of each pair and triple of neighbouring tokens: the route
of a token depends on its neighbours, and text repeats itself. What was seen of the longest context comes
first, then the shorter one, then what this sequence used lately, then popularity:

    p = (seen + prior * p_of_the_shorter_context) / (weight_of_seen + prior)

Routes are kept as ids, one or two bytes each, so an occurrence costs L * K bytes and not L * E numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from expertflow.predictor.protocol import UNKNOWN, PathContext

# Measured on chat, translation and math (6 layers of 32 experts, top-4; docs/log.md): longer rings and other
# priors change per-token recall by less than a point; triples add 1.5 points on math, 0.3 on chat.
RINGS = (8, 4, 2)  # occurrences kept of a token, a pair, a triple
AGEING = 0.9  # weight of an occurrence against the next newer one
PRIOR = 0.7
WINDOW = 16  # positions of a sequence that say what it uses lately
SEQUENCE_PRIOR = 4.0  # popularity counts as this many of them
POPULARITY_DECAY = 0.9995  # by token
_START_TOKENS = 8.0  # the uniform start of popularity counts as this many tokens
_BITS = 21  # of a token id within a key: three fit in 63 bits
_NO_TOKEN = (1 << _BITS) - 1
_KEY_BYTES = 200  # a key in the ordered dictionary and its number, measured with CPython 3.11


class RouteMemory:
    """The last `ring` routes of each key; the key unused for longest makes room for a new one."""

    def __init__(self, capacity: int, ring: int, layers: int, top_k: int, num_experts: int):
        dtype = torch.uint8 if num_experts < 256 else torch.int16
        # An id of num_experts means "nowhere", so empty places need no other mark.
        self.routes_CRLK = torch.full((capacity, ring, layers, top_k), num_experts, dtype=dtype)
        self._routes_CRLK = self.routes_CRLK.numpy()  # a view: a few places are written faster through it
        self._seen_C = np.zeros(capacity, dtype=np.int64)
        self._row_of: OrderedDict[int, int] = OrderedDict()
        self.ring, self.capacity, self.num_experts = ring, capacity, num_experts

    def __len__(self) -> int:
        return len(self._row_of)

    @staticmethod
    def entry_bytes(ring: int, layers: int, top_k: int, num_experts: int) -> int:
        return ring * layers * top_k * (1 if num_experts < 256 else 2) + 8 + _KEY_BYTES

    def counts(self, keys: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the F keys that were seen: where_F they are in keys, the weighted count_FLE of the experts they
        used, and the weight_F they have in all.
        """
        rows = np.fromiter((self._row_of.get(key, -1) for key in keys), np.int64, len(keys))
        layers, top_k = self.routes_CRLK.shape[2:]
        found = np.flatnonzero(rows >= 0)
        if not len(found):  # most pairs and triples of new text
            return torch.from_numpy(found), torch.zeros(0, layers, self.num_experts), torch.zeros(0)
        row_F = rows[found]
        seen_F1 = self._seen_C[row_F][:, None]
        place_R = np.arange(self.ring)
        age_FR = (seen_F1 - 1 - place_R) % self.ring
        weight_FR = torch.from_numpy(np.where(place_R < seen_F1, AGEING**age_FR, 0.0)).float()
        routes_FRLK = self.routes_CRLK[torch.from_numpy(row_F)]
        index_FLN = routes_FRLK.permute(0, 2, 1, 3).reshape(len(found), layers, self.ring * top_k).long()
        value_FLN = weight_FR.repeat_interleave(top_k, dim=1)[:, None].expand_as(index_FLN)
        count_FLE = torch.zeros(len(found), layers, self.num_experts + 1).scatter_add_(
            2, index_FLN, value_FLN
        )
        return torch.from_numpy(found), count_FLE[..., :-1], weight_FR.sum(1)

    def learn(self, keys: Sequence[int], routes_NLK: Tensor) -> None:
        """Add one occurrence of each key, in order."""
        if not self.capacity:
            return
        # Written at the end in one go. A place written twice keeps the later one, and a row that changes its
        # key meanwhile forgets what the old key was about to write.
        pending: dict[tuple[int, int], int] = {}
        for n, key in enumerate(keys):
            row = self._row_of.get(key)
            if row is None:
                row = len(self._row_of)
                if row == self.capacity:
                    _, row = self._row_of.popitem(last=False)
                    self.routes_CRLK[row] = self.num_experts
                    self._seen_C[row] = 0
                    for place in range(self.ring):
                        pending.pop((row, place), None)
                self._row_of[key] = row
            else:
                self._row_of.move_to_end(key)
            pending[row, int(self._seen_C[row]) % self.ring] = n
            self._seen_C[row] += 1
        rows, places = zip(*pending, strict=True)
        self._routes_CRLK[list(rows), list(places)] = routes_NLK.numpy()[list(pending.values())]


class OnlineTokenTable:
    """PathPredictor and OnlinePredictor. Memory is taken at the start and never grows: see `nbytes`."""

    def __init__(self, layers: int, num_experts: int, top_k: int, max_bytes: int = 16 << 20):
        """max_bytes: shared evenly by tokens, pairs and triples. Raises ValueError when not one entry fits."""
        entries = [RouteMemory.entry_bytes(ring, layers, top_k, num_experts) for ring in RINGS]
        smallest = len(RINGS) * max(entries)
        if max_bytes < smallest:
            raise ValueError(
                f"max_bytes={max_bytes} holds no route of {layers} layers and top-{top_k}; give at least "
                f"{smallest}, better some MiB"
            )
        share = max_bytes // len(RINGS)
        self.memories = [
            RouteMemory(share // entry, ring, layers, top_k, num_experts)
            for entry, ring in zip(entries, RINGS, strict=True)
        ]
        self.nbytes = sum(
            memory.capacity * entry for memory, entry in zip(self.memories, entries, strict=True)
        )
        self.num_experts = num_experts
        self._used_LE = torch.full((layers, num_experts), _START_TOKENS * top_k / num_experts)
        self._tokens = _START_TOKENS

    @property
    def popularity_LE(self) -> Tensor:
        return self._used_LE / self._tokens

    def predict(self, context: PathContext) -> Tensor:
        return self.predict_with_support(context)[0]

    def predict_with_support(self, context: PathContext) -> tuple[Tensor, Tensor]:
        """p_BSLE, and support_BS: how many tokens the longest context has that was seen before, 0 to 3."""
        batch, new = context.target_BT.shape[0], context.num_new
        p_BLE = self._lately(context)
        p_NLE = p_BLE.repeat_interleave(new, dim=0)
        support_N = torch.zeros(batch * new, dtype=torch.int64)
        for order, (memory, keys) in enumerate(zip(self.memories, self._keys(context), strict=True), start=1):
            where_F, count_FLE, weight_F = memory.counts(keys)
            if not len(where_F):
                continue
            p_NLE[where_F] = (count_FLE + PRIOR * p_NLE[where_F]) / (weight_F + PRIOR)[:, None, None]
            support_N[where_F] = order
        return p_NLE.reshape(batch, new, *p_NLE.shape[1:]), support_N.reshape(batch, new)

    def observe_pass(self, context: PathContext, routes_BSLK: Tensor) -> None:
        mask = context.new_mask_BS
        routes_NLK = routes_BSLK.reshape(-1, *routes_BSLK.shape[2:])
        real_N = None if mask is None else mask.reshape(-1)
        if real_N is not None:
            routes_NLK = routes_NLK[real_N]
        if not len(routes_NLK):
            return
        for memory, keys in zip(self.memories, self._keys(context), strict=True):
            memory.learn(keys if real_N is None else list(compress(keys, real_N.tolist())), routes_NLK)
        decay = POPULARITY_DECAY ** len(routes_NLK)
        self._used_LE.mul_(decay).add_(torch.from_numpy(self._uses_LE(routes_NLK.numpy())))
        self._tokens = self._tokens * decay + len(routes_NLK)

    def _uses_LE(self, routes_NLK: np.ndarray) -> np.ndarray:
        """How many of the tokens went to each expert."""
        layers, width = routes_NLK.shape[1], self.num_experts + 1  # the last one is nowhere
        somewhere_NLK = np.where(routes_NLK == UNKNOWN, self.num_experts, routes_NLK)
        place_NLK = somewhere_NLK + width * np.arange(layers)[:, None]
        counts: np.ndarray = np.bincount(place_NLK.ravel(), minlength=layers * width)
        return counts.reshape(layers, width)[:, :-1]

    def _keys(self, context: PathContext) -> list[list[int]]:
        """Of the token, the pair and the triple that end at each new position: its key, sequence by sequence."""
        new, before = context.num_new, len(RINGS) - 1
        seen = new + before  # positions that a key of these reads
        ids_BT = context.target_BT[:, -seen:].numpy().astype(np.int64)
        if context.target_mask_BT is not None:
            ids_BT[~context.target_mask_BT[:, -seen:].numpy()] = _NO_TOKEN
        if missing := seen - ids_BT.shape[1]:
            ids_BT = np.pad(ids_BT, ((0, 0), (missing, 0)), constant_values=_NO_TOKEN)
        key_BS, keys = ids_BT[:, before:], []
        for order in range(len(RINGS)):
            if order:
                key_BS = key_BS | ids_BT[:, before - order : seen - order] << (_BITS * order)
            keys.append(key_BS.ravel().tolist())
        return keys

    def _lately(self, context: PathContext) -> Tensor:
        """p_BLE from the last WINDOW known positions of each sequence, leaning on popularity."""
        batch = context.target_BT.shape[0]
        popularity_LE = self.popularity_LE
        if context.routes_BTLK is None:
            return popularity_LE.expand(batch, *popularity_LE.shape)
        end = context.target_BT.shape[1] - context.num_new
        routes_BWLK = context.routes_BTLK[:, max(0, end - WINDOW) : end].long()
        # Whom a layer sent nowhere is known too: it needed no expert there.
        known_BL = (routes_BWLK[..., 0] != UNKNOWN).sum(1)
        routes_BWLK = routes_BWLK.masked_fill(routes_BWLK == UNKNOWN, self.num_experts)
        index_BLN = routes_BWLK.permute(0, 2, 1, 3).flatten(2)
        count_BLE = torch.zeros(batch, popularity_LE.shape[0], self.num_experts + 1)
        count_BLE.scatter_add_(2, index_BLN, torch.ones(()).expand(index_BLN.shape))
        weight_BL = known_BL + SEQUENCE_PRIOR
        return (count_BLE[..., :-1] + SEQUENCE_PRIOR * popularity_LE) / weight_BL[..., None]
