"""Batches of live sequences, and the forward passes that move them on: a chunk of prompts, or the newest tokens.

transformers' `generate` prepares prompts (masks, positions, KV cache, encoder pass, logits processors), as it does for
runner.py; here it is stopped before its loop, since sequences join and leave between steps. Nothing is sampled here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from expertflow.engine.request import Row
from expertflow.engine.runner import GenerativeModel, padded
from expertflow.engine.sampler import choose_token
from expertflow.kv_name import KV_CACHE, kv_cache_of
from expertflow.scheduler.batch_state import BatchState, model_kwargs_of, state_of
from expertflow.scheduler.kv_tensors import objection


def check_sequences_can_move(model: GenerativeModel) -> None:
    """ValueError for a model whose KV cache cannot be taken apart into sequences, so that none could join or leave."""
    name = type(model).__name__
    if not model._supports_default_dynamic_cache():
        raise ValueError(
            f"{name} has a KV cache of its own, which sequences cannot join or leave; {_INSTEAD}"
        )
    if (reason := objection(DynamicCache(config=model.config.get_text_config(decoder=True)))) is not None:
        raise ValueError(f"sequences cannot join or leave the KV cache of {name}: {reason}; {_INSTEAD}")


_INSTEAD = "use LLM.generate, with sequences= left out, which decodes batches as they come"


@dataclass(eq=False)
class LiveSequence:
    """One answer in the engine: its row, and what transformers does to its logits before a token is chosen."""

    row: Row
    begin: list[int]  # the tokens before its answer, as the repetition penalty and the processors see them
    processors: LogitsProcessorList

    @property
    def alive(self) -> bool:
        return self.row.finish_reason is None

    def choose(self, logits_V: Tensor) -> int:
        """The next token, from the float32 logits at its newest position."""
        row = self.row
        seen = self.begin + row.token_ids
        if self.processors:
            processors: Any = self.processors  # it names types of tensors that do not exist
            (logits_V,) = processors(torch.tensor([seen]), logits_V[None])
        return choose_token(
            logits_V,
            row.params,
            seed=row.seed,
            answer=row.answer,
            position=len(row.token_ids),
            seen=seen,
            written=row.token_ids,
        )


class Batch:
    """Sequences between two decode steps; the newest token of each is not in its KV cache yet."""

    def __init__(self, model: GenerativeModel, members: Sequence[LiveSequence], state: BatchState):
        assert len(members) == state.num_rows, "a sequence without a row, or a row without a sequence"
        self._model = model
        self.members = list(members)
        self.state = state

    @property
    def newest_B1(self) -> Tensor:
        return torch.tensor([[member.row.token_ids[-1]] for member in self.members])

    def decode(self) -> Tensor:
        """Run the newest token of every sequence: float32 logits_BV for the next."""
        kwargs = model_kwargs_of(self.state)
        outputs = _forward(self._model, self.newest_B1, kwargs, first=False)
        mask_BT = self.state.mask_BT
        self.state = replace(
            self.state,
            cache=kv_cache_of(outputs),
            mask_BT=torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1),
        )
        return outputs.logits[:, -1].float()


class Prefill:
    """Prompts of sequences that join together, on their way through the model a chunk at a time.

    Decoder-only prompts are padded on the left. Encoder inputs, read whole, are padded on the right: Switch's experts
    take tokens in order until their capacity is full, so padding must come last.
    """

    def __init__(self, model: GenerativeModel, rows: Sequence[Row], pad_token: int):
        self._model = model
        self._seq2seq: bool = model.config.is_encoder_decoder
        self._pad_token = pad_token
        self.rows = list(rows)
        self.members: list[LiveSequence] = []  # once the last chunk has run
        self._ids_BT = self._mask_BT = torch.zeros(0, 0, dtype=torch.long)
        self._kwargs: dict[str, Any] = {}
        self._config: GenerationConfig | None = None
        self._done = 0

    @property
    def begun(self) -> bool:
        return self._config is not None

    @property
    def finished(self) -> bool:
        return bool(self.members)

    def drop(self) -> None:
        """Leave out the rows that were finished (cancelled) meanwhile, between two chunks."""
        keep = [index for index, row in enumerate(self.rows) if row.finish_reason is None]
        if len(keep) == len(self.rows) or self.finished:
            return
        self.rows = [self.rows[index] for index in keep]
        if not self.begun or not keep:
            return
        index_B = torch.tensor(keep)
        self._ids_BT, self._mask_BT = self._ids_BT[index_B], self._mask_BT[index_B]
        self._kwargs[KV_CACHE].batch_select_indices(index_B)

    def advance(self) -> Tensor | None:
        """Run the next chunk. After the last one: float32 logits_BV for the first token of every answer, else None."""
        if not self.begun:
            self._begin()
        assert self._config is not None
        if self._seq2seq:
            outputs = _forward(self._model, self._ids_BT, self._kwargs, first=True)
            self._kwargs[KV_CACHE] = kv_cache_of(outputs)
        else:
            outputs = self._chunk(self._config.prefill_chunk_size or self._ids_BT.shape[1])
            if self._done < self._ids_BT.shape[1]:
                return None
        self.members = [self._member(row) for row in self.rows]
        return outputs.logits[:, -1].float()

    def batch(self) -> Batch:
        """The prompts once they have been read, as a batch to decode."""
        assert self.finished, "the prompt is not read yet"
        kwargs = {"attention_mask": self._mask_BT} | self._kwargs
        kwargs = self._model._update_model_kwargs_for_generation({}, kwargs, is_encoder_decoder=self._seq2seq)
        return Batch(self._model, self.members, state_of(self._model, kwargs))

    def _begin(self) -> None:
        def prepared(
            model: GenerativeModel,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> tuple[Tensor, GenerationConfig, dict[str, Any]]:
            return input_ids, generation_config, model_kwargs

        ids_BT, mask_BT = padded([row.prompt_ids for row in self.rows], self._pad_token, right=self._seq2seq)
        self._ids_BT, self._config, self._kwargs = self._model.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max(row.max_tokens for row in self.rows),
            custom_generate=prepared,
        )
        self._mask_BT = mask_BT
        for name in ("attention_mask", "position_ids"):  # of the whole prompt: each chunk gets its own
            if not self._seq2seq:
                self._kwargs.pop(name, None)

    def _chunk(self, size: int) -> Any:
        begin, end = self._done, min(self._done + size, self._ids_BT.shape[1])
        mask_BT = self._mask_BT[:, :end]
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        kwargs = self._kwargs | {"position_ids": position_BT[:, begin:]}
        # As generate does: without padding the mask is left out, and attention is faster.
        kwargs["attention_mask"] = None if bool(mask_BT.all()) else mask_BT
        outputs = _forward(self._model, self._ids_BT[:, begin:end], kwargs, first=begin == 0)
        self._kwargs[KV_CACHE] = kv_cache_of(outputs)
        self._done = end
        return outputs

    def _member(self, row: Row) -> LiveSequence:
        assert self._config is not None
        # A decoder sees what it wrote, not what the encoder read.
        begin = self._ids_BT[0].tolist() if self._seq2seq else list(row.prompt_ids)
        config = copy.copy(self._config)  # whose lengths are those of the longest prompt
        config.max_length = len(begin) + row.max_tokens
        if config.min_new_tokens is not None:
            config.min_length = len(begin) + config.min_new_tokens
        processors = self._model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(begin),
            encoder_input_ids=torch.tensor([row.prompt_ids]),
            logits_processor=LogitsProcessorList(),
            device="cpu",
            model_kwargs={},
        )
        return LiveSequence(row, begin, processors)


def _forward(model: GenerativeModel, ids_BT: Tensor, kwargs: dict[str, Any], *, first: bool) -> Any:
    if model._supports_logits_to_keep():
        kwargs = {**kwargs, "logits_to_keep": 1}
    inputs = model.prepare_inputs_for_generation(ids_BT, is_first_iteration=first, **kwargs)
    return model(**inputs, return_dict=True)
