"""Running predictors over recorded sequences as they would have run while serving.

A predictor that learns nothing while serving says everything in one call (predictions are causal). One that
learns is stepped: it predicts a prompt, learns from it, then predicts and learns token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from expertflow.predictor.protocol import (
    UNKNOWN,
    LayerPredictor,
    OnlinePredictor,
    PathContext,
    PathPredictor,
    SourcePredictor,
)
from expertflow.trace import TracedSequence

GROUP = 64  # sequences that decode side by side: the largest batch that is measured
PROMPTS_AT_ONCE = 8  # a learning predictor sees this many prompts, learns them, then sees the next


@dataclass(frozen=True)
class Group:
    """Up to GROUP sequences of one side, padded so that all decode from column `prefill` on.

    In an encoder everything is prefill, padded on the right.

    The longest answers come first, so those still decoding at a step are the first rows.
    ids_BT int64, mask_BT bool (padding on both sides), routes_BTLK int32 (UNKNOWN in padding).
    source_BS, source_mask_BS: what the encoder read, when this is the decoder's side.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    routes_BTLK: Tensor
    prefill: int
    num_prefill_B: Tensor
    sequences: tuple[TracedSequence, ...]  # by row
    of_source: bool = False
    source_BS: Tensor | None = None
    source_mask_BS: Tensor | None = None
    ahead_BTLE: Tensor | None = None  # what a predictor of hidden states said, nan at the first layer

    def __len__(self) -> int:
        return len(self.ids_BT)

    @property
    def length(self) -> int:
        return self.ids_BT.shape[1]

    def context(self, end: int, num_new: int, rows: slice = slice(None)) -> PathContext:
        """Before the pass over the num_new positions that end at `end`."""
        return PathContext(
            target_BT=self.ids_BT[rows, :end],
            target_mask_BT=self.mask_BT[rows, :end],
            num_new=num_new,
            source_BS=None if self.source_BS is None else self.source_BS[rows],
            source_mask_BS=None if self.source_mask_BS is None else self.source_mask_BS[rows],
            routes_BTLK=self.routes_BTLK[rows, :end],
            num_prefill_B=self.num_prefill_B[rows],
        )


def pad(sequences: Sequence[TracedSequence], of_source: bool = False, max_length: int = 1024) -> Group:
    """One group; prompts are padded on the left, answers on the right. Tokens past max_length are cut."""
    answer = {
        id(s): 0 if of_source else min(len(s.target_ids_T), max_length) - s.num_prefill for s in sequences
    }
    sequences = sorted(sequences, key=lambda s: -answer[id(s)])
    ids = [_of(s, of_source)[0][:max_length] for s in sequences]
    routes = [_of(s, of_source)[1][:max_length] for s in sequences]
    prefills = [
        len(i) if of_source else min(s.num_prefill, len(i)) for s, i in zip(sequences, ids, strict=True)
    ]
    prefill = max(prefills)
    length = prefill + max(len(i) - p for i, p in zip(ids, prefills, strict=True))
    ids_BT = torch.zeros(len(ids), length, dtype=torch.int64)
    mask_BT = torch.zeros(len(ids), length, dtype=torch.bool)
    routes_BTLK = torch.full((len(ids), length, *routes[0].shape[1:]), UNKNOWN, dtype=torch.int32)
    for row, (i, r, p) in enumerate(zip(ids, routes, prefills, strict=True)):
        start = 0 if of_source else prefill - p
        here = slice(start, start + len(i))
        ids_BT[row, here] = torch.from_numpy(i.astype("int64"))
        mask_BT[row, here] = True
        routes_BTLK[row, here] = torch.from_numpy(r.astype("int32"))
    source_BS = source_mask_BS = None
    if not of_source and len(sequences[0].source_ids_S):
        sources = [s.source_ids_S[:max_length] for s in sequences]
        source_BS = torch.zeros(len(ids), max(map(len, sources)), dtype=torch.int64)
        source_mask_BS = torch.zeros(source_BS.shape, dtype=torch.bool)
        for row, i in enumerate(sources):
            source_BS[row, : len(i)] = torch.from_numpy(i.astype("int64"))
            source_mask_BS[row, : len(i)] = True
    return Group(
        ids_BT,
        mask_BT,
        routes_BTLK,
        prefill,
        torch.tensor(prefills),
        tuple(sequences),
        of_source,
        source_BS,
        source_mask_BS,
    )


def _of(sequence: TracedSequence, of_source: bool) -> tuple[np.ndarray, np.ndarray]:
    if of_source:
        return sequence.source_ids_S, sequence.source_routes_SLK
    return sequence.target_ids_T, sequence.target_routes_TLK


def streams(sequences: Sequence[TracedSequence], of_source: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """(token ids_T, routes_TLK) of one side, for the baselines that count."""
    for sequence in sequences:
        ids, routes = _of(sequence, of_source)
        if len(ids):
            yield torch.from_numpy(ids.astype("int64")), torch.from_numpy(routes.astype("int64"))


def all_at_once(predictor: PathPredictor, group: Group) -> Tensor:
    """p_BTLE of a predictor that learns nothing meanwhile: one call for the prompts, one for the answers."""
    if group.of_source and isinstance(predictor, SourcePredictor):
        nothing_B0 = group.ids_BT[:, :0]
        context = PathContext(
            target_BT=nothing_B0, num_new=0, source_BS=group.ids_BT, source_mask_BS=group.mask_BT
        )
        return predictor.predict_source(context)
    # Within a prompt, which runs in one pass, no route is known beforehand.
    unknown = torch.full_like(group.routes_BTLK[:, : group.prefill], UNKNOWN)
    context = replace(group.context(group.prefill, group.prefill), routes_BTLK=unknown)
    prompts = predictor.predict(context)
    if group.length == group.prefill:
        return prompts
    # The Protocol pads on the left only: every row is moved right until its answer ends at the end.
    column_T = torch.arange(group.length)
    shift_B = group.length - 1 - (column_T * group.mask_BT).amax(1)
    from_BT = column_T - shift_B[:, None]
    inside_BT = from_BT >= 0
    from_BT = from_BT.clamp(min=0)
    routes_BTLK = group.routes_BTLK[torch.arange(len(group))[:, None], from_BT]
    shifted = replace(
        group.context(group.length, group.length - group.prefill),
        target_BT=group.ids_BT.gather(1, from_BT),
        target_mask_BT=group.mask_BT.gather(1, from_BT) & inside_BT,
        routes_BTLK=routes_BTLK.masked_fill(~inside_BT[:, :, None, None], UNKNOWN),
    )
    answers = predictor.predict(shifted)
    back_BS = (torch.arange(answers.shape[1]) + shift_B[:, None]).clamp(max=answers.shape[1] - 1)
    return torch.cat([prompts, answers[torch.arange(len(group))[:, None], back_BS]], dim=1)


def layer_by_layer(predictor: LayerPredictor, group: Group, num_experts: int) -> Tensor:
    """p_BTLE of a predictor that reads the routes of the layer before (SLP); nan at the first layer."""
    batch, length, layers, top_k = group.routes_BTLK.shape
    p_BTLE = torch.full((batch, length, layers, num_experts), float("nan"))
    for layer in range(layers - 1):
        p_NE = predictor.observe(layer, None, group.routes_BTLK[:, :, layer].reshape(-1, top_k))
        if p_NE is not None:
            p_BTLE[:, :, layer + 1] = p_NE.view(batch, length, num_experts)
    return p_BTLE


class Said:
    """Stands in for a predictor whose p_BTLE is known already, so that stepping costs no second run."""

    def __init__(self, p_BTLE: Tensor):
        self.p_BTLE = p_BTLE
        self.rows = slice(None)

    def predict(self, context: PathContext) -> Tensor:
        end = context.target_BT.shape[1]
        return self.p_BTLE[self.rows, end - context.num_new : end].float()


class SaidAhead:
    """The same for a LayerPredictor; `p_NLE` are the rows of the pass at hand."""

    def __init__(self) -> None:
        self.p_NLE: Tensor | None = None

    def observe(self, layer: int, hidden_BD: Tensor | None, routes_BK: Tensor | None) -> Tensor | None:
        assert self.p_NLE is not None, "the rows of the pass were not set"
        if layer + 1 >= self.p_NLE.shape[1]:
            return None
        return self.p_NLE[:, layer + 1].float()


def stepped(
    predictor: PathPredictor,
    group: Group,
    num_experts: int,
    said: Sequence[Said] = (),
    ahead: SaidAhead | None = None,
) -> Tensor:
    """p_BTLE (float16) of a predictor that learns from every pass: the prompts, then step by step.

    said, ahead: the stand-ins inside the predictor, told here which rows are at work. With `ahead` the
    probabilities are those known when a layer begins; without it, before the pass.
    """
    batch, length, layers, _ = group.routes_BTLK.shape
    p_BTLE = torch.zeros(batch, length, layers, num_experts, dtype=torch.float16)
    for rows, end, num_new in _passes(group):
        new = slice(end - num_new, end)
        for source in said:
            source.rows = rows
        context = group.context(end, num_new, rows)
        p_BSLE = predictor.predict(context)
        if ahead is not None and group.ahead_BTLE is not None:
            mask_N = group.mask_BT[rows, new].flatten()
            p_BSLE = _look_ahead(predictor, group.ahead_BTLE[rows, new], ahead, p_BSLE, mask_N)
        p_BTLE[rows, new] = p_BSLE.to(torch.float16)
        if isinstance(predictor, OnlinePredictor):
            predictor.observe_pass(context, group.routes_BTLK[rows, new])
    return p_BTLE


def _passes(group: Group) -> Iterator[tuple[slice, int, int]]:
    """Rows, end and number of new positions of each pass."""
    for first in range(0, len(group), PROMPTS_AT_ONCE):
        yield slice(first, min(first + PROMPTS_AT_ONCE, len(group))), group.prefill, group.prefill
    alive_T = group.mask_BT.sum(0)
    for t in range(group.prefill, group.length):
        yield slice(0, int(alive_T[t])), t + 1, 1


def _look_ahead(
    predictor: PathPredictor, ahead_BSLE: Tensor, stand_in: SaidAhead, p_BSLE: Tensor, mask_N: Tensor
) -> Tensor:
    assert isinstance(predictor, LayerPredictor), "only a predictor of layers can look ahead"
    stand_in.p_NLE = ahead_BSLE.flatten(0, 1)[mask_N]
    p_NLE = p_BSLE.flatten(0, 1).clone()
    for layer in range(p_NLE.shape[1] - 1):
        p_NE = predictor.observe(layer, None, None)
        if p_NE is not None:
            p_NLE[mask_N, layer + 1] = p_NE
    return p_NLE.view(p_BSLE.shape)


def serve(predictor: PathPredictor, groups: Sequence[Group], num_experts: int) -> None:
    """Let it learn from these groups; what it says is dropped."""
    for group in groups:
        stepped(predictor, group, num_experts)
