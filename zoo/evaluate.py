"""How good a trained model is: bits per byte by source, load per expert, sampled text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from zoo.corpus import PairBatch, pad_pairs, pairs_of
from zoo.experts import ROW_MULTIPLE
from zoo.loss import linear_cross_entropy
from zoo.routing import load_of, only_real_tokens, watch_routers


@dataclass(frozen=True)
class HeldOut:
    """Held-out text of one source: its tokens, END marks included, and the bytes of its real text."""

    stream: np.ndarray
    num_bytes: int


def causal_loss(model: Any, input_BT: Tensor, target_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats over targets >= 0."""
    hidden_BTD = model.model(input_ids=input_BT, use_cache=False).last_hidden_state
    return linear_cross_entropy(hidden_BTD.flatten(0, 1), model.lm_head.weight, target_BT.flatten())


def seq2seq_loss(model: Any, batch: PairBatch) -> Tensor:
    """Mean cross-entropy in nats over the response tokens."""
    is_label_BT = batch.labels_BT >= 0
    with (
        only_real_tokens(model.encoder, batch.input_mask_BT > 0),
        only_real_tokens(model.decoder, is_label_BT),
    ):
        encoded = model.encoder(input_ids=batch.input_BT, attention_mask=batch.input_mask_BT)
        hidden_BTD = _decode(model, batch, encoded.last_hidden_state)
    # T5's rule for tied embeddings, as in the model's own forward.
    hidden_ND = hidden_BTD.flatten(0, 1) * model.config.d_model**-0.5
    # Labels first, then as much padding as keeps the number of shapes small; the vocabulary is the widest product.
    rows = -(-int(is_label_BT.sum()) // ROW_MULTIPLE) * ROW_MULTIPLE
    order_N = torch.argsort((~is_label_BT).flatten().int(), stable=True)[:rows]
    return linear_cross_entropy(hidden_ND[order_N], model.lm_head.weight, batch.labels_BT.flatten()[order_N])


def _decode(model: Any, batch: PairBatch, encoded_BTD: Tensor) -> Tensor:
    """Decoder states that predict the labels."""
    start_B1 = torch.full_like(batch.labels_BT[:, :1], model.config.decoder_start_token_id)
    decoder_BT = torch.cat((start_B1, batch.labels_BT[:, :-1].clamp(min=0)), dim=1)
    return model.decoder(
        input_ids=decoder_BT,
        encoder_hidden_states=encoded_BTD,
        encoder_attention_mask=batch.input_mask_BT,
        use_cache=False,
    ).last_hidden_state


def causal_rows(stream: np.ndarray, first: int, count: int, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Rows first .. first + count - 1 of a stream as inputs and targets [B, T]; rows beyond `count` are masked."""
    # Always B rows: torch.compile specialises on the shape, and every new one costs half a minute.
    ids_BT = torch.zeros(B, T + 1, dtype=torch.int64)
    for row in range(count):
        start = (first + row) * T
        ids_BT[row] = torch.from_numpy(stream[start : start + T + 1].astype(np.int64))
    target_BT = ids_BT[:, 1:].clone()
    target_BT[count:] = -1
    return ids_BT[:, :-1], target_BT


@torch.no_grad()
def bits_per_byte(
    model: Any, held_out: dict[str, HeldOut], B: int, T: int, max_rows: int | None
) -> dict[str, Any]:
    """Bits per byte of held-out text, by source and together (weighted by bytes).

    Rows of T tokens, each without the context of the row before: pessimistic, and the same for every run.
    Marks such as END cost bits but are no bytes. max_rows: rows per source, None for all.
    """
    by_source: dict[str, dict[str, float]] = {}
    bits_sum = bytes_sum = 0.0
    for source, text in held_out.items():
        count = (len(text.stream) - 1) // T
        count = count if max_rows is None else min(count, max_rows)
        if not count:
            continue
        bits = 0.0
        for first in range(0, count, B):
            rows = min(B, count - first)
            loss = causal_loss(model, *causal_rows(text.stream, first, rows, B, T))
            bits += loss.item() / math.log(2) * rows * T
        num_bytes = text.num_bytes * count * T / len(text.stream)
        by_source[source] = {
            "bits_per_byte": bits / num_bytes,
            "bytes": round(num_bytes),
            "tokens": count * T,
        }
        bits_sum, bytes_sum = bits_sum + bits, bytes_sum + num_bytes
    return {"bits_per_byte": bits_sum / bytes_sum if bytes_sum else math.nan, "by_source": by_source}


@torch.no_grad()
def bits_per_token(
    model: Any, held_out: dict[str, HeldOut], B: int, T: int, max_rows: int | None
) -> dict[str, Any]:
    """Bits per response token of an encoder-decoder, by source and together (weighted by tokens)."""
    by_source: dict[str, dict[str, float]] = {}
    bits_sum, token_sum = 0.0, 0
    for source, text in held_out.items():
        if source.startswith("pretrain/"):
            continue
        pairs = pairs_of(text.stream)[:max_rows]
        bits, tokens = 0.0, 0
        for first in range(0, len(pairs), B):
            batch = pad_pairs(pairs[first : first + B], T)
            count = int((batch.labels_BT >= 0).sum())
            bits, tokens = bits + seq2seq_loss(model, batch).item() / math.log(2) * count, tokens + count
        if tokens:
            by_source[source] = {"bits_per_token": bits / tokens, "tokens": tokens}
            bits_sum, token_sum = bits_sum + bits, token_sum + tokens
    return {"bits_per_token": bits_sum / token_sum if token_sum else math.nan, "by_source": by_source}


def seen_share(
    held_out: dict[str, HeldOut], streams: dict[str, np.ndarray], span: int = 16
) -> dict[str, float]:
    """Share of each source's held-out spans of `span` tokens that occur word for word in the training text.

    A split keeps documents apart, not quotations: a sentence may be in one part's training text and in another
    part's held-out text. Compared by 64-bit hashes, whose chance collisions are rarer than one in a million.
    """
    seen = np.unique(np.concatenate([_span_hashes(stream, span) for stream in streams.values()]))
    shares = {}
    for source, text in held_out.items():
        hashes = _span_hashes(text.stream, span)
        places = np.searchsorted(seen, hashes).clip(max=max(0, len(seen) - 1))
        shares[source] = float((seen[places] == hashes).mean()) if len(hashes) and len(seen) else 0.0
    return shares


def _span_hashes(stream: np.ndarray, span: int) -> np.ndarray:
    """A hash for every run of `span` tokens: uint64, modulo 2**64, order-dependent."""
    ids = stream.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(max(0, len(ids) - span + 1), dtype=np.uint64)
    for offset in range(span):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + len(hashes)]
    return hashes


@torch.no_grad()
def expert_load(model: Any, stream: np.ndarray, top_k: int, B: int, T: int, rows: int) -> Tensor:
    """load_LE: share of each layer's choices that each expert got on the first rows of a stream."""
    total = None
    rows = min(rows, (len(stream) - 1) // T)
    batches = range(0, rows - rows % B, B) or range(0, 1)
    with watch_routers(model, top_k) as log:
        for first in batches:
            causal_loss(model, *causal_rows(stream, first, min(B, rows), min(B, rows), T))
            load_LE = torch.stack([load_of(logits_NE, top_k) for logits_NE in log.take()])
            total = load_LE if total is None else total + load_LE
    assert total is not None
    return total / len(batches)


def sample(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int, tokens: int) -> str:
    """Text after `prompt`, which may hold chat marks; temperature 0.8, top-k 40, stops at END."""
    torch.manual_seed(seed)
    ids_BT = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    out_BT = model.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        do_sample=True,
        temperature=0.8,
        top_k=40,
        max_new_tokens=tokens,
    )
    return str(tokenizer.decode(out_BT[0, ids_BT.shape[1] :], skip_special_tokens=True))
