"""Recorded routes replayed on a model with random weights, so that the experts it uses are realistic.

Random weights route like dice. Here a model reads the token ids of a recording, and a hook before each experts
module puts the recorded expert ids in the place of the router's. The router still runs and its weights still scale
the products: values cost no time, and the text was noise before. Works on any model whose experts modules are called
with (hidden_TD, chosen, weights_TK), ours and transformers' own; nothing of the package knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expertflow.kv_name import KV_CACHE, kv_cache_of
from expertflow.trace import Trace, TracedSequence

PROMPT = 16  # tokens of a prompt, its last ones: what is measured is decode


@dataclass(frozen=True)
class Call:
    """One call of the model for B sequences. routes_L: [tokens, K] for each MoE layer that runs, in order; of an
    encoder-decoder's first call the encoder's come before the decoder's."""

    ids_BT: Tensor
    routes_L: list[Tensor]
    source_BS: Tensor | None = None  # what an encoder reads in the same call
    begins_text: bool = False  # new sequences: nothing is remembered


def calls(trace: Trace, batch: int) -> Iterator[Call]:
    """The recording's sequences, `batch` at a time side by side, those with the longest answers first.

    A group's sequences are cut to the shortest prompt and the shortest answer among them: no padding.
    Raises ValueError when there are fewer sequences than the batch.
    """
    decoding = [sequence for sequence in trace if len(sequence.target_ids_T) > sequence.num_prefill > 0]
    if not 1 <= batch <= len(decoding):
        raise ValueError(f"batch={batch}: give 1 to {len(decoding)}, the recorded sequences that decode")
    decoding.sort(key=lambda sequence: sequence.num_prefill - len(sequence.target_ids_T))
    for first in range(0, len(decoding) - batch + 1, batch):
        yield from _group(decoding[first : first + batch])


def _group(group: Sequence[TracedSequence]) -> Iterator[Call]:
    prompt = min(PROMPT, *(s.num_prefill for s in group), *(len(s.source_ids_S) or PROMPT for s in group))
    steps = min(len(s.target_ids_T) - s.num_prefill for s in group)
    read = [slice(s.num_prefill - min(prompt, s.num_prefill), s.num_prefill) for s in group]
    shortest = min(part.stop - part.start for part in read)
    read = [slice(part.stop - shortest, part.stop) for part in read]
    first = _target(group, read)
    if not len(group[0].source_ids_S):
        yield Call(first.ids_BT, first.routes_L, begins_text=True)
    else:
        source_BS = _stack([s.source_ids_S[:prompt] for s in group])
        routes_L = _by_layer([s.source_routes_SLK[:prompt] for s in group])
        yield Call(first.ids_BT, routes_L + first.routes_L, source_BS, begins_text=True)
    for step in range(steps):
        yield _target(group, [slice(s.num_prefill + step, s.num_prefill + step + 1) for s in group])


def _target(group: Sequence[TracedSequence], parts: Sequence[slice]) -> Call:
    ids_BT = _stack([s.target_ids_T[part] for s, part in zip(group, parts, strict=True)])
    return Call(ids_BT, _by_layer([s.target_routes_TLK[part] for s, part in zip(group, parts, strict=True)]))


def _stack(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _by_layer(routes: Sequence[np.ndarray]) -> list[Tensor]:
    """From a [T, L, K] of each sequence to a [B * T, K] of each layer."""
    return list(torch.from_numpy(np.concatenate(routes).astype(np.int64)).unbind(1))


def first_layers(trace: Trace, source: int, target: int) -> Trace:
    """The routes of a model with fewer layers: the first of each stack. Raises ValueError for more than recorded."""
    meta = trace.meta
    if source > meta.source_layers or target > meta.target_layers:
        raise ValueError(
            f"the model has {source} + {target} MoE layers and the recording of {meta.model} "
            f"{meta.source_layers} + {meta.target_layers}; give fewer --layers"
        )
    experts = meta.experts_per_layer
    kept = experts[:source] + experts[meta.source_layers : meta.source_layers + target]
    cut = [
        replace(
            s,
            source_routes_SLK=s.source_routes_SLK[:, :source],
            target_routes_TLK=s.target_routes_TLK[:, :target],
        )
        for s in trace
    ]
    return Trace(replace(meta, experts_per_layer=kept, source_layers=source), tuple(cut))


class RouteReplay:
    """Runs calls on a model inside `replaying`. Keeps the KV cache, and an encoder's output, of the running text."""

    def __init__(self, model: Any):
        self.model = model
        self.experts = experts_modules(model)
        self._pending: list[Tensor] = []
        self._text: dict[str, Any] = {}

    @contextmanager
    def replaying(self) -> Iterator[RouteReplay]:
        hooks = [module.register_forward_pre_hook(self._substitute) for module in self.experts]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def run(self, call: Call) -> Tensor:
        """One forward pass with the recorded routes; logits [B, T, V] of the positions asked for."""
        self._pending = list(call.routes_L)
        if call.begins_text:
            self._text = {KV_CACHE: None}
        if self.model.config.is_encoder_decoder:
            if call.source_BS is not None:
                self._text["encoder_outputs"] = self.model.get_encoder()(input_ids=call.source_BS)
            out = self.model(decoder_input_ids=call.ids_BT, use_cache=True, **self._text)
        else:
            out = self.model(input_ids=call.ids_BT, use_cache=True, logits_to_keep=1, **self._text)
        self._text[KV_CACHE] = kv_cache_of(out)
        assert not self._pending, f"{len(self._pending)} MoE layers of the recording did not run"
        return out.logits

    def _substitute(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_TD, chosen, weights_TK = args
        routes_TK = self._pending.pop(0).to(chosen.device)
        if chosen.dim() == 3:  # Switch: a row of E zeros and ones for each token, no one where it is dropped
            num_experts = chosen.shape[-1]
            one_hot = torch.zeros(len(routes_TK), num_experts + 1, dtype=chosen.dtype, device=chosen.device)
            one_hot.scatter_(1, routes_TK, 1)
            routes_TK = one_hot[:, None, :num_experts]
        assert routes_TK.shape == chosen.shape, f"recorded {routes_TK.shape}, the model routes {chosen.shape}"
        return hidden_TD, routes_TK, weights_TK


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """Every module that is called with tokens and their experts, in order of the layers; an encoder's first."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no module named 'experts': its routes cannot be replayed"
        )
    return found
