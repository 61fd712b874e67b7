"""The corpus as token ids, made once per run directory and read back afterwards."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from zoo.checkpoint import save_tensors, training_dir
from zoo.corpus import PARTS, Document, build_tokenizer, encode, read_part, stream_of
from zoo.evaluate import HeldOut

# Megabytes of each part that the tokenizer learns its merges from; more changes little and takes longer.
TOKENIZER_MEGABYTES = {"pretrain": 18.0, "chat": 4.0, "translation": 2.0, "math": 2.0, "summarization": 0.4}


@dataclass(frozen=True)
class Tokens:
    tokenizer: PreTrainedTokenizerFast
    streams: dict[str, np.ndarray]  # by part, training text
    held_out: dict[str, HeldOut]  # by part/source


def prepare_tokens(corpus: Path, run: Path, vocab: int, seed: int) -> Tokens:
    """Tokenizer and streams of `corpus`, kept under `run`; a later call with other text or sizes fails.

    Raises ValueError when `run` was made from another corpus, vocabulary or seed, or a file is missing.
    """
    _check_corpus(corpus)
    cache = training_dir(run) / "tokens.safetensors"
    recipe = {"vocab": vocab, "seed": seed, "corpus": _fingerprint(corpus)}
    if not cache.is_file():
        _make(corpus, run, vocab, seed, cache, recipe)
    made_with = _metadata(run)["recipe"]
    if made_with != recipe:
        raise ValueError(
            f"{cache} was made with {made_with}, but this run asks for {recipe}; "
            "give the same --corpus, --vocab and --seed, or another -o"
        )
    return read_tokens(run)


def read_tokens(run: Path) -> Tokens:
    """What prepare_tokens left under `run`; the corpus itself is not needed any more."""
    held_out_bytes = _metadata(run)["held_out_bytes"]
    tensors = load_file(training_dir(run) / "tokens.safetensors")
    return Tokens(
        PreTrainedTokenizerFast.from_pretrained(run),
        {part: tensors[f"train.{part}"].numpy() for part in sorted(PARTS)},
        {name: HeldOut(tensors[f"held_out.{name}"].numpy(), count) for name, count in held_out_bytes.items()},
    )


def _metadata(run: Path) -> dict[str, Any]:
    with safe_open(training_dir(run) / "tokens.safetensors", "pt") as file:
        return dict(json.loads(file.metadata()["tokens"]))


def _check_corpus(corpus: Path) -> None:
    missing = [f"{part}.jsonl.xz" for part in PARTS if not (corpus / f"{part}.jsonl.xz").is_file()]
    if missing:
        raise ValueError(
            f"the corpus directory {corpus} has no {', '.join(missing)}; it must hold JSON lines compressed with xz, "
            "as zoo/README.md describes and zoo/sample shows"
        )


def _fingerprint(corpus: Path) -> dict[str, int]:
    return {part: (corpus / f"{part}.jsonl.xz").stat().st_size for part in PARTS}


def _make(corpus: Path, run: Path, vocab: int, seed: int, cache: Path, recipe: dict[str, object]) -> None:
    train = {part: list(read_part(corpus, part, held_out=False)) for part in PARTS}
    if (run / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(run)
    else:
        tokenizer = build_tokenizer(_choose(train, seed), vocab)
        run.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(run)
    held_out: dict[str, list[Document]] = defaultdict(list)
    for part in PARTS:
        for document in read_part(corpus, part, held_out=True):
            held_out[f"{part}/{document.source}"].append(document)
    tensors = {f"train.{part}": stream_of(encode(tokenizer, texts), seed) for part, texts in train.items()}
    tensors |= {
        f"held_out.{name}": stream_of(encode(tokenizer, texts), 0) for name, texts in held_out.items()
    }
    metadata = {
        "recipe": recipe,
        "held_out_bytes": {name: sum(text.num_bytes() for text in texts) for name, texts in held_out.items()},
    }
    save_tensors(
        {name: torch.from_numpy(ids.astype(np.int32)) for name, ids in tensors.items()},
        cache,
        {"tokens": json.dumps(metadata)},
    )


def _choose(train: dict[str, list[Document]], seed: int) -> list[Document]:
    """Documents in random order up to TOKENIZER_MEGABYTES of each part."""
    rng = np.random.default_rng(seed)
    chosen: list[Document] = []
    for part, documents in train.items():
        taken = 0
        for index in rng.permutation(len(documents)):
            if taken > TOKENIZER_MEGABYTES[part] * 1e6:
                break
            chosen.append(documents[index])
            taken += documents[index].num_bytes()
    return chosen
