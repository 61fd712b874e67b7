"""Runner: the decode loop over one batch, as a generator that is paused between two tokens.

transformers' `generate` prepares everything (masks, positions, KV cache, encoder pass) and then calls
`_decode_loop` in place of its own `_sample`. Written as a generator it needs no second thread to stream, and
an abandoned or interrupted answer ends like any other. Which token is taken is sampler.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from expertflow.engine.interrupts import Interrupts
from expertflow.engine.logprobs import token_logprobs
from expertflow.engine.request import Row
from expertflow.engine.sampler import choose_token

# transformers declares its own methods as Tensor | Module, and mypy would refuse to call them.
GenerativeModel = Any


def decode(
    model: GenerativeModel, rows: Sequence[Row], pad_token: int, interrupts: Interrupts
) -> Iterator[list[str]]:
    """Run rows to their ends as one batch. Yields, for each step, the new text of each row ("" for none).

    Decoder-only prompts are padded on the left. Encoder inputs are padded on the right: Switch's experts take
    tokens in order until their capacity is full, so padding must come last.
    """
    seq2seq = model.config.is_encoder_decoder
    input_ids_BT, mask_BT = padded([row.prompt_ids for row in rows], pad_token, right=seq2seq)

    def decode_loop(
        model: GenerativeModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Iterator[list[str]]:
        # The rows know where they end; stopping_criteria would only know of the longest.
        return _decode_loop(
            model, input_ids, logits_processor, generation_config, model_kwargs, rows, pad_token, interrupts
        )

    with interrupts.deferred():
        steps = model.generate(
            input_ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max(row.max_tokens for row in rows),
            custom_generate=decode_loop,
        )
    yield from steps


@torch.no_grad()
def read_pairs(
    model: GenerativeModel,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    pad_token: int,
    interrupts: Interrupts,
) -> None:
    """One pass of an encoder-decoder over texts and known answers, start token included; for its routes.

    Padding is on the right on both sides: experts of limited capacity take tokens in order.
    """
    (source_BS, source_mask_BS), (target_BT, target_mask_BT) = (
        padded(sequences, pad_token, right=True) for sequences in (sources, targets)
    )
    with interrupts.deferred():
        model(
            input_ids=source_BS,
            attention_mask=source_mask_BS,
            decoder_input_ids=target_BT,
            decoder_attention_mask=target_mask_BT,
            use_cache=False,
        )


def padded(sequences: Sequence[Sequence[int]], pad_token: int, *, right: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [B, T], T the longest of the sequences."""
    longest = max(map(len, sequences))
    ids_BT = torch.full((len(sequences), longest), pad_token)
    mask_BT = torch.zeros_like(ids_BT)
    for index, ids in enumerate(sequences):
        place = slice(0, len(ids)) if right else slice(longest - len(ids), longest)
        ids_BT[index, place] = torch.tensor(ids)
        mask_BT[index, place] = 1
    return ids_BT, mask_BT


@torch.no_grad()
def _decode_loop(
    model: GenerativeModel,
    input_ids_BT: Tensor,
    logits_processor: Any,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    rows: Sequence[Row],
    pad_token: int,
    interrupts: Interrupts,
) -> Iterator[list[str]]:
    seq2seq = model.config.is_encoder_decoder
    first = True
    while True:
        with interrupts.deferred():
            if first:
                outputs = model._prefill(input_ids_BT, generation_config, model_kwargs)
            else:
                inputs = model.prepare_inputs_for_generation(
                    input_ids_BT,
                    next_sequence_length=1 if model_kwargs["use_cache"] else None,
                    **model_kwargs,
                )
                outputs = model(**inputs, return_dict=True)
            first = False
            model_kwargs = model._update_model_kwargs_for_generation(
                outputs, model_kwargs, is_encoder_decoder=seq2seq
            )
            logits_BV = outputs.logits[:, -1].float()
            scores_BV = logits_processor(input_ids_BT, logits_BV)
            del outputs
        texts = [""] * len(rows)
        next_B = torch.full((len(rows),), pad_token)
        for index, row in enumerate(rows):
            if row.finish_reason is not None:
                continue
            next_B[index] = token = choose_token(
                scores_BV[index],
                row.params,
                seed=row.seed,
                answer=row.answer,
                position=len(row.token_ids),
                # As transformers has it: a decoder sees what it wrote, not what the encoder read.
                seen=input_ids_BT[index].tolist() if seq2seq else row.prompt_ids + row.token_ids,
                written=row.token_ids,
            )
            texts[index] = row.push(token, token_logprobs(logits_BV[index], token, row.params.logprobs))
        yield texts
        if all(row.finish_reason is not None for row in rows):
            return
        input_ids_BT = torch.cat([input_ids_BT, next_B[:, None]], dim=-1)
