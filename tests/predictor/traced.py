"""Synthetic traces: routes that follow a rule, so that a predictor can be right."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from expertflow.trace import TracedSequence, TraceMeta, TraceWriter

FINGERPRINT = "0123456789abcdef"


def meta_of(
    experts: tuple[int, ...] = (8, 8), source_layers: int = 0, top_k: int = 2, vocab_size: int = 40
) -> TraceMeta:
    return TraceMeta(FINGERPRINT, "synthetic", experts, source_layers, top_k, vocab_size, "made up", {})


def routes_by_token(ids: np.ndarray, experts: tuple[int, ...], top_k: int) -> np.ndarray:
    """Expert (3 t + layer + k) mod E of token t: a rule that a table can learn."""
    rule = [[(3 * ids + layer + k) % e for k in range(top_k)] for layer, e in enumerate(experts)]
    return np.array(rule, dtype=np.uint8).reshape(len(experts), top_k, len(ids)).transpose(2, 0, 1)


def sequence_of(
    meta: TraceMeta, prompt: int, rng: np.random.Generator, length: int = 20, split: str = "train"
) -> TracedSequence:
    ids = rng.integers(0, meta.vocab_size, length).astype(np.int32)
    read = rng.integers(0, meta.vocab_size, length // 2 if meta.source_layers else 0).astype(np.int32)
    layers = meta.experts_per_layer
    return TracedSequence(
        prompt,
        0,
        split,
        "chat",
        read,
        routes_by_token(read, layers[: meta.source_layers], meta.top_k),
        None,
        ids,
        routes_by_token(ids, layers[meta.source_layers :], meta.top_k),
        None,
        1 if meta.source_layers else length // 2,
    )


def write(folder: Path, meta: TraceMeta, prompts: int = 40, seed: int = 0, split: str = "train") -> Path:
    rng = np.random.default_rng(seed)
    with TraceWriter(folder, meta) as writer:
        for prompt in range(prompts):
            writer.append(sequence_of(meta, prompt, rng, int(rng.integers(6, 30)), split))
    return folder
