"""Text to tokens: reading the corpus, the tokenizer, and the order in which rows are trained on.

Reads only what its licence lets into published weights: PERMISSIVE names every source that may be used.
The order of examples is a function of (seed, number), so a run resumes from one integer.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PERMISSIVE = frozenset(
    {
        "sotu",
        "sword-text-web",
        "sword-text-kjv",
        "sword-comm-tdavid",
        "sword-comm-mhcc",
        "austen",
        "moby-dick",
        "chitchat",
        "factbook",
        "jargon",
        "python-doc",
        "python-faq",
        "postgresql-doc",
        "sqlite-doc",
        "apache-doc",
        "libreoffice-help",
        "champ",
        "contest-generated",
        "gsm-symbolic-generated",
    }
)
TASKS = ("chat", "translation", "math", "summarization")
PARTS = ("pretrain", *TASKS)
# Shares of trained tokens. Summarization is small on purpose: few permissive pairs exist, and more
# passes over them would be learnt by heart.
MIXTURE = {"pretrain": 0.63, "chat": 0.175, "translation": 0.11, "math": 0.07, "summarization": 0.015}
END, USER, ASSISTANT, PAD = "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Document:
    source: str
    prompt: str | None  # None for plain text
    text: str  # the document, or the response to the prompt

    def render(self) -> str:
        """The text as the model reads it, END included; the same as the chat template gives."""
        if self.prompt is None:
            return self.text + END
        return f"{USER}{self.prompt}{ASSISTANT}{self.text}{END}"

    def num_bytes(self) -> int:
        """Bytes of real text, markers not counted: the denominator of bits per byte."""
        return len(self.text.encode()) + len((self.prompt or "").encode())


def read_part(corpus: Path, part: str, held_out: bool) -> Iterator[Document]:
    """Documents of one part (a file `<part>.jsonl.xz`), permissive sources only, in file order."""
    path = corpus / f"{part}.jsonl.xz"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; a corpus is a directory with {', '.join(p + '.jsonl.xz' for p in PARTS)} "
            "(see zoo/README.md), zoo/sample is a small one"
        )
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row: dict[str, Any] = json.loads(line)
            if row["source"] in PERMISSIVE and (row["split"] != "train") == held_out:
                yield Document(
                    row["source"], row.get("prompt"), row["text"] if part == "pretrain" else row["response"]
                )


def build_tokenizer(documents: Iterable[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits are single tokens; the chat template matches Document.render."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, USER, ASSISTANT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (piece for document in documents for piece in (document.prompt, document.text) if piece)
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[np.ndarray]:
    """Token ids of each rendered document, uint16 where the vocabulary allows it."""
    dtype = np.uint16 if len(tokenizer) <= 65536 else np.uint32
    ids: list[np.ndarray] = []
    for start in range(0, len(documents), 1000):
        texts = [document.render() for document in documents[start : start + 1000]]
        encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        ids.extend(np.asarray(one.ids, dtype=dtype) for one in encoded)
    return ids


def stream_of(ids: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Documents in shuffled order, end to end."""
    order = np.random.default_rng(seed).permutation(len(ids))
    return np.concatenate([ids[i] for i in order]) if len(ids) else np.zeros(0, np.uint16)


class Mixture:
    """Which example number `row` is: a part, and an index in it; fixed by the seed, without a history.

    Every pass over a part is in a new order. Any window of rows holds the shares to within a row or two.
    """

    def __init__(self, counts: dict[str, int], shares: dict[str, float], seed: int) -> None:
        self.parts = [part for part, count in counts.items() if count > 0 and shares.get(part, 0) > 0]
        self.counts, self.seed = counts, seed
        share = np.array([shares[part] for part in self.parts])
        self._edges = np.cumsum(share / share.sum()) if len(share) else share
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._plan(1024)

    def _plan(self, rows: int) -> None:
        """Fix part and draw number of rows 0 .. rows - 1; a longer plan begins with the shorter one."""
        # Golden-ratio sequence: low discrepancy, and no state to store.
        point = (np.arange(1, rows + 1) * 0.6180339887498949 + self.seed * 0.7548776662466927) % 1.0
        self._part = np.minimum(np.searchsorted(self._edges, point, side="right"), len(self.parts) - 1)
        self._draw = np.zeros(rows, dtype=np.int64)
        for which in range(len(self.parts)):
            mine = self._part == which
            self._draw[mine] = np.arange(mine.sum())

    def __call__(self, row: int) -> tuple[str, int]:
        if row >= len(self._part):
            self._plan(2 * row)
        which = int(self._part[row])
        count = self.counts[self.parts[which]]
        epoch, offset = divmod(int(self._draw[row]), count)
        if (which, epoch) not in self._orders:
            self._orders[which, epoch] = np.random.default_rng([self.seed, which, epoch]).permutation(count)
        return self.parts[which], int(self._orders[which, epoch][offset])


class Rows:
    """Training examples of a decoder: rows of T + 1 tokens cut from each part's stream.

    Neighbouring rows share one token, so that every token is once a target.
    """

    def __init__(self, streams: dict[str, np.ndarray], shares: dict[str, float], T: int, seed: int) -> None:
        counts = {part: max(0, (len(stream) - 1) // T) for part, stream in streams.items()}
        if not any(counts[part] and shares.get(part, 0) > 0 for part in counts):
            raise ValueError(f"no part of the corpus has a row of {T} tokens; lower --context or add text")
        self.streams, self.T = streams, T
        self.mixture = Mixture(counts, shares, seed)

    def row(self, row: int) -> np.ndarray:
        part, index = self.mixture(row)
        return self.streams[part][index * self.T : (index + 1) * self.T + 1]

    def batch(self, first_row: int, B: int) -> Tensor:
        """Rows first_row .. first_row + B - 1 as int64 [B, T + 1]."""
        return torch.from_numpy(np.stack([self.row(first_row + i) for i in range(B)]).astype(np.int64))


class PairBatch(NamedTuple):
    """B prompts and responses for an encoder-decoder; labels are -1 where there is no token."""

    input_BT: Tensor
    input_mask_BT: Tensor
    labels_BT: Tensor


def pairs_of(stream: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt ... END, response ... END) of each `USER prompt ASSISTANT response END` in a stream."""
    end, user, assistant = range(3)  # ids in the order given to the tokenizer
    starts, middles = np.flatnonzero(stream == user), np.flatnonzero(stream == assistant)
    stops = np.flatnonzero(stream == end)
    assert len(starts) == len(middles) == len(stops), "a stream of pairs holds nothing but whole pairs"
    close = np.array([end], dtype=stream.dtype)
    return [
        (np.concatenate((stream[a + 1 : b], close)), stream[b + 1 : c + 1])
        for a, b, c in zip(starts, middles, stops, strict=True)
    ]


class Pairs:
    """Training examples of an encoder-decoder: the tasks' prompts and responses, cut off after T tokens.

    Padding reaches the longest pair of a batch, so batches are cut from windows sorted by length: of 64 random
    pairs four positions in five were padding.
    """

    WINDOW = 64  # batches
    # Widths of batches. oneDNN compiles and keeps a kernel for every shape it meets: with free widths a run
    # took 9 GB and half its time was compilation.
    WIDTH_MULTIPLE = 32

    def __init__(self, streams: dict[str, np.ndarray], shares: dict[str, float], T: int, seed: int) -> None:
        self.pairs = {part: pairs_of(streams[part]) for part in TASKS if part in streams}
        if not any(self.pairs.values()):
            raise ValueError(f"the corpus has no prompts; an encoder-decoder needs one of {', '.join(TASKS)}")
        self.T, self.seed = T, seed
        self.mixture = Mixture({part: len(pairs) for part, pairs in self.pairs.items()}, shares, seed)

    def batch(self, first_row: int, B: int) -> PairBatch:
        """Batch number first_row // B: every window holds the rows of its batches once each."""
        window, index = divmod(first_row // B, self.WINDOW)
        rows = [self.mixture(window * self.WINDOW * B + i) for i in range(self.WINDOW * B)]
        drawn = [self.pairs[part][index] for part, index in rows]
        # By the response's padded width, then by the prompt: sorted by the sum of both, half of it was padding.
        # Stable, so equal lengths keep their order; then the batches of a window in random order.
        sides = [(min(len(prompt), self.T), min(len(response), self.T)) for prompt, response in drawn]
        order = sorted(range(len(drawn)), key=lambda i: (-(-sides[i][1] // self.WIDTH_MULTIPLE), sides[i][0]))
        which = int(np.random.default_rng([self.seed, window]).permutation(self.WINDOW)[index])
        chosen = [drawn[i] for i in order[which * B : (which + 1) * B]]
        return pad_pairs(chosen, self.T, self.WIDTH_MULTIPLE)


def pad_pairs(pairs: Sequence[tuple[np.ndarray, np.ndarray]], T: int, multiple: int = 1) -> PairBatch:
    """Cut both sides to T tokens and pad them on the right to the longest of the batch, rounded up to `multiple`."""

    def pad(ids: list[np.ndarray], filler: int) -> Tensor:
        width = -(-max(len(one) for one in ids) // multiple) * multiple
        out = torch.full((len(ids), width), filler, dtype=torch.int64)
        for row, one in enumerate(ids):
            out[row, : len(one)] = torch.from_numpy(one.astype(np.int64))
        return out

    prompts = [prompt[:T] for prompt, _ in pairs]
    return PairBatch(
        pad(prompts, 3),
        pad([np.ones(len(prompt), np.int64) for prompt in prompts], 0),
        pad([response[:T] for _, response in pairs], -1),
    )
