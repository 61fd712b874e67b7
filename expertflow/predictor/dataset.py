"""Traces -> padded batches to train on.

Routes stay uint8 until a batch is made; a mask of 4096 experts per token would be 500 times their size. The
split "test" is never touched here: validation prompts are taken from "train".
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from expertflow.predictor.next_use import HORIZONS
from expertflow.trace import TracedSequence, TraceMeta, read_trace

LONGEST = 1024  # tokens of a sequence that are trained on; the rest is cut off
_BATCHES_PER_POOL = 32  # sorted by length together: little padding, and still a random order


class TracedBatch(NamedTuple):
    """B sequences. Target padded on the left, source on the right; masks are true where a token is real."""

    target_BT: Tensor
    target_mask_BT: Tensor
    target_needed_BTLE: Tensor  # bool
    source_BS: Tensor | None
    source_mask_BS: Tensor | None
    source_needed_BSLE: Tensor | None
    num_prefill_B: Tensor

    @property
    def num_tokens(self) -> int:
        source = 0 if self.source_mask_BS is None else int(self.source_mask_BS.sum())
        return int(self.target_mask_BT.sum()) + source


class RoutingPaths(NamedTuple):
    """What a predictor is trained on. Two lists with no prompt in common."""

    meta: TraceMeta
    train: list[TracedSequence]
    validation: list[TracedSequence]


def read_paths(
    folders: Sequence[str | Path], task: str | None, validation_share: float, seed: int
) -> RoutingPaths:
    """Read recordings of one model and hold some prompts of the split "train" back for validation.

    Raises ValueError when they are of different models, or when either side would be empty.
    """
    if not folders:
        raise ValueError("no trace was given; record one with `expertflow trace MODEL --dataset ... -o DIR`")
    by_prompt: dict[bytes, list[TracedSequence]] = {}
    meta: TraceMeta | None = None
    tasks: set[str] = set()
    for folder in folders:
        trace = read_trace(folder, weights=False)
        if meta is None:
            meta = trace.meta
        elif trace.meta.fingerprint != meta.fingerprint:
            raise ValueError(
                f"{folder} was recorded of {trace.meta.model} ({trace.meta.fingerprint}) and {folders[0]} of "
                f"{meta.model} ({meta.fingerprint}); train one predictor for each model"
            )
        tasks.update(trace.tasks)
        for sequence in trace:
            if sequence.split == "train" and task in (None, sequence.task):
                by_prompt.setdefault(_prompt_of(sequence), []).append(sequence)
    assert meta is not None
    if len(by_prompt) < 2:
        raise ValueError(
            f'{len(by_prompt)} prompts of the split "train"{f" and task {task!r}" if task else ""} in '
            f"{', '.join(map(str, folders))}; at least 2 are needed, one to train on and one to validate on. "
            f"Recorded tasks: {', '.join(sorted(tasks)) or 'none'}"
        )
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    held = min(len(prompts) - 1, max(1, round(validation_share * len(prompts))))
    chosen = [[s for p in part for s in by_prompt[p]] for part in (prompts[held:], prompts[:held])]
    return RoutingPaths(meta, chosen[0], chosen[1])


def _prompt_of(sequence: TracedSequence) -> bytes:
    """The prompt itself, not its number: two recordings of one data set share prompts."""
    if len(sequence.source_ids_S):
        return sequence.source_ids_S.tobytes()
    return sequence.target_ids_T[: sequence.num_prefill].tobytes()


def trained_tokens(sequence: TracedSequence) -> int:
    """Tokens of both sides that are trained on."""
    return min(LONGEST, len(sequence.source_ids_S)) + min(LONGEST, len(sequence.target_ids_T))


def group(sequences: Sequence[TracedSequence], batch_tokens: int, seed: int) -> list[list[TracedSequence]]:
    """Batches of at most batch_tokens tokens, padding included, of sequences of similar length.

    A longer sequence is a batch of its own. The order depends on the seed alone.
    """
    draw = random.Random(seed)
    order = list(sequences)
    draw.shuffle(order)
    mean = sum(map(trained_tokens, order)) / max(1, len(order))
    pool = max(1, int(_BATCHES_PER_POOL * batch_tokens / max(1.0, mean)))
    batches: list[list[TracedSequence]] = []
    for begin in range(0, len(order), pool):
        batch: list[TracedSequence] = []
        for sequence in sorted(order[begin : begin + pool], key=trained_tokens):
            if batch and (len(batch) + 1) * trained_tokens(sequence) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(sequence)
        batches.append(batch)
    draw.shuffle(batches)
    return batches


def collate(sequences: Sequence[TracedSequence], meta: TraceMeta) -> TracedBatch:
    """Pad and expand to masks; "nowhere" is no expert, so it leaves no mark."""
    layers = meta.experts_per_layer
    target = [(s.target_ids_T[:LONGEST], s.target_routes_TLK[:LONGEST]) for s in sequences]
    target_BT, mask_BT, needed_BTLE = _pad(target, layers[meta.source_layers :], left=True)
    source: tuple[Any, Any, Any] = (None, None, None)
    if meta.source_layers:
        read = [(s.source_ids_S[:LONGEST], s.source_routes_SLK[:LONGEST]) for s in sequences]
        source = _pad(read, layers[: meta.source_layers], left=False)
    num_prefill_B = torch.tensor([min(s.num_prefill, LONGEST) for s in sequences])
    return TracedBatch(target_BT, mask_BT, needed_BTLE, *source, num_prefill_B)


def batches(
    sequences: Sequence[TracedSequence], meta: TraceMeta, batch_tokens: int, seed: int = 0
) -> Iterator[TracedBatch]:
    for chosen in group(sequences, batch_tokens, seed):
        yield collate(chosen, meta)


def within_horizons(needed_BTLE: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Targets of the next-use head, counting a pass per token (one sequence at a time).

    needed_BTLE: bool, padded on the left. Returns used_BTCLE, bool: expert needed at one of the next
    HORIZONS[c] tokens, its own not counted; and known_BTCLE, bool: false where the text ends before that could
    be told, and at padding. HORIZONS must be powers of two from 1.
    """
    num_tokens = needed_BTLE.shape[1]
    used = _earlier(needed_BTLE, 1)
    found = []
    for horizon in HORIZONS:
        found.append(used)
        used = used | _earlier(used, horizon)
    used_BTCLE = torch.stack(found, 2)
    left_T = num_tokens - 1 - torch.arange(num_tokens, device=needed_BTLE.device)
    reached_TC = left_T[:, None] >= torch.tensor(HORIZONS, device=left_T.device)
    known_BTCLE = used_BTCLE | reached_TC[:, :, None, None]
    return used_BTCLE, known_BTCLE & mask_BT[:, :, None, None, None]


def _earlier(needed_BTLE: Tensor, tokens: int) -> Tensor:
    """Row t gets what is true of row t + tokens; false past the end."""
    moved = torch.zeros_like(needed_BTLE)
    moved[:, : max(0, needed_BTLE.shape[1] - tokens)] = needed_BTLE[:, tokens:]
    return moved


def _pad(
    rows: list[tuple[np.ndarray, np.ndarray]], experts_L: Sequence[int], left: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_BT, mask_BT, needed_BTLE) of ragged ids and routes."""
    longest = max(1, *(len(ids) for ids, _ in rows))
    num_experts = max(experts_L)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    # One place more than there are experts takes what is routed nowhere, and is cut off.
    needed = torch.zeros(len(rows), longest, len(experts_L), num_experts + 1, dtype=torch.bool)
    nowhere_L1 = torch.tensor(experts_L)[:, None]
    for row, (ids, routes) in enumerate(rows):
        at = slice(longest - len(ids), longest) if left else slice(0, len(ids))
        ids_BT[row, at] = torch.from_numpy(ids.astype(np.int64))
        mask_BT[row, at] = True
        routes_TLK = torch.from_numpy(routes.astype(np.int64))
        routes_TLK = torch.where(routes_TLK >= nowhere_L1, num_experts, routes_TLK)
        needed[row, at].scatter_(-1, routes_TLK, True)
    return ids_BT, mask_BT, needed[..., :num_experts]
