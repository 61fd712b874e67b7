"""Recordings made of nothing: routes follow the token and its neighbour, with noise."""

from __future__ import annotations

import numpy as np

from expertflow.trace import TracedSequence, TraceMeta

LAYERS, EXPERTS, TOP_K, VOCAB = 3, 8, 2, 30


def meta(source_layers: int = 0, fingerprint: str = "0123456789abcdef") -> TraceMeta:
    return TraceMeta(
        fingerprint=fingerprint,
        model="synthetic",
        experts_per_layer=(EXPERTS,) * (LAYERS + source_layers),
        source_layers=source_layers,
        top_k=TOP_K,
        vocab_size=VOCAB,
        dataset="none",
        settings={},
    )


def routes_of(
    ids: np.ndarray, rng: np.random.Generator, noise: float = 0.2, layers: int = LAYERS
) -> np.ndarray:
    """Two different experts by token and layer; the second depends on the token before as well."""
    before = np.concatenate([[0], ids[:-1]])
    layer = np.arange(layers)
    first = (ids[:, None] * 7 + layer * 3) % EXPERTS
    second = (first + 1 + (before[:, None] + layer) % (EXPERTS - 1)) % EXPERTS
    routes = np.stack([first, second], axis=-1)
    odd = rng.random(routes.shape[:2]) < noise
    routes[odd] = np.stack([first[odd], (first[odd] + 1 + rng.integers(0, EXPERTS - 1)) % EXPERTS], axis=-1)
    return routes.astype(np.uint8)


def sequences(
    count: int = 24, seed: int = 0, task: str = "chat", source_layers: int = 0, longest: int = 30
) -> list[TracedSequence]:
    """A third of them held out. Token frequencies fall off as in text."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, VOCAB + 1)
    frequency /= frequency.sum()
    found = []
    for prompt in range(count):
        length = int(rng.integers(8, longest))
        ids = rng.choice(VOCAB, length, p=frequency).astype(np.int32)
        source = rng.choice(VOCAB, length if source_layers else 0, p=frequency).astype(np.int32)
        found.append(
            TracedSequence(
                prompt=prompt,
                run=0,
                split="test" if prompt % 3 == 0 else "train",
                task=task,
                source_ids_S=source,
                source_routes_SLK=routes_of(source, rng, layers=source_layers)
                if source_layers
                else np.zeros((0, 0, TOP_K), np.uint8),
                source_weights_SLK=None,
                target_ids_T=ids,
                target_routes_TLK=routes_of(ids, rng),
                target_weights_TLK=None,
                num_prefill=1 if source_layers else int(rng.integers(4, 8)),
            )
        )
    return found
