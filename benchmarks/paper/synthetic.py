"""Routes made of nothing, for sizes that nobody has recorded: as skewed and as correlated as a recording.

For each layer by itself, the experts of a token are the K of highest score

    score(expert) = -skew * log(rank of the expert) + taste * g(sequence, expert) + noise(token, expert)

g is normal and stays with a sequence; noise is Gumbel's, and each expert keeps the noise of the token before with
probability `stay`, else draws it anew. The three knobs are set so that three statistics of a recording come out again.
What is not in it: layers know nothing of each other, and tokens have no identity, so nothing that learns from tokens
can be asked about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from expertflow.trace import Trace, TracedSequence, TraceMeta

FAR = 8  # tokens apart: by then the last token's choice is forgotten, the sequence's taste is not
_ROUNDS, _HALVINGS = 3, 7


@dataclass(frozen=True)
class Statistics:
    """Of routes, mean over layers. evenness: exp(entropy of the experts' loads) / E, 1 where all are used alike.
    near, far: share of a token's experts that the token before it, and one FAR tokens before, had too."""

    evenness: float
    near: float
    far: float


@dataclass(frozen=True)
class Knobs:
    skew: float = 0.5
    taste: float = 0.5
    stay: float = 0.2


def measure(routes: Sequence[np.ndarray], experts: int) -> Statistics:
    """routes: [T, L, K] of each sequence. Raises ValueError where none is longer than FAR tokens."""
    if not any(len(routes_TLK) > FAR for routes_TLK in routes):
        raise ValueError(f"statistics need sequences of more than {FAR} tokens")
    layers = routes[0].shape[1]
    loads_LE = np.zeros((layers, experts))
    for routes_TLK in routes:
        for layer in range(layers):
            loads_LE[layer] += np.bincount(routes_TLK[:, layer].ravel(), minlength=experts + 1)[:experts]
    share_LE = loads_LE / loads_LE.sum(1, keepdims=True)
    entropy_L = -(share_LE * np.log(np.maximum(share_LE, 1e-12))).sum(1)
    return Statistics(float(np.exp(entropy_L).mean() / experts), _overlap(routes, 1), _overlap(routes, FAR))


def _overlap(routes: Sequence[np.ndarray], lag: int) -> float:
    same = total = 0
    for routes_TLK in routes:
        later, earlier = routes_TLK[lag:], routes_TLK[:-lag]
        same += int((later[..., None] == earlier[..., None, :]).sum())
        total += later.size
    return same / total


def draw(
    knobs: Knobs, experts: int, top_k: int, layers: int, sequences: int, tokens: int, seed: int = 0
) -> np.ndarray:
    """routes [sequences, tokens, layers, top_k]. Raises ValueError for a top_k that is none."""
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k} of {experts} experts: give 1 to {experts}")
    rng = np.random.default_rng(seed)
    rank_LE = np.argsort(rng.random((layers, experts)), axis=1) + 1
    liked_NLE = -knobs.skew * np.log(rank_LE) + knobs.taste * rng.normal(size=(sequences, layers, experts))
    noise_NLE = rng.gumbel(size=liked_NLE.shape)
    found = np.empty((sequences, tokens, layers, top_k), np.int64)
    for t in range(tokens):
        anew_NLE = rng.random(liked_NLE.shape) >= knobs.stay
        noise_NLE = np.where(anew_NLE, rng.gumbel(size=liked_NLE.shape), noise_NLE)
        score_NLE = liked_NLE + noise_NLE
        found[:, t] = np.argpartition(-score_NLE, top_k - 1, axis=-1)[..., :top_k]
    return found


def calibrate(wanted: Statistics, experts: int, top_k: int, seed: int = 0) -> Knobs:
    """Knobs whose routes have these statistics: each knob moves one of them most, found by halving in turn."""

    def least(knobs: Knobs, name: str, most: float, enough: Callable[[Statistics], bool]) -> Knobs:
        def tried(value: float) -> bool:
            routes = draw(replace(knobs, **{name: value}), experts, top_k, 2, 96, 2 * FAR, seed)
            return enough(measure(list(routes), experts))

        return replace(knobs, **{name: _find(tried, 0.0, most)})

    knobs = Knobs()
    for _ in range(_ROUNDS):
        knobs = least(knobs, "skew", 4.0, lambda got: got.evenness <= wanted.evenness)
        knobs = least(knobs, "taste", 6.0, lambda got: got.far >= wanted.far)
        knobs = least(knobs, "stay", 1.0, lambda got: got.near >= wanted.near)
    return knobs


def _find(enough: Callable[[float], bool], least: float, most: float) -> float:
    """The smallest value that is enough."""
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most


def as_trace(routes_NTLK: np.ndarray, experts: int) -> Trace:
    """The routes as a recording whose sequences only decode, after a prompt of one token that used the same."""
    sequences, tokens, layers, top_k = routes_NTLK.shape
    meta = TraceMeta("0" * 16, "synthetic", (experts,) * layers, 0, top_k, 2, "synthetic", {})
    ids_T = np.zeros(tokens + 1, np.int32)
    nothing = np.zeros((0, 0, top_k), np.int64)
    found = []
    for number in range(sequences):
        routes_TLK = np.concatenate([routes_NTLK[number, :1], routes_NTLK[number]])
        found.append(
            TracedSequence(
                prompt=number, run=0, split="test", task="synthetic",
                source_ids_S=ids_T[:0], source_routes_SLK=nothing, source_weights_SLK=None,
                target_ids_T=ids_T, target_routes_TLK=routes_TLK, target_weights_TLK=None, num_prefill=1,
            )
        )  # fmt: skip
    return Trace(meta, tuple(found))
