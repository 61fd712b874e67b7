"""Probabilities and their logits, in numpy: between large products its calls cost a fifth of torch's (docs/log.md)."""

from __future__ import annotations

import numpy as np

CLAMP = 1e-3  # who is sure may be wrong: a logit stays within 7


def within(p: np.ndarray) -> np.ndarray:
    """p, no nearer to 0 and 1 than CLAMP."""
    clamped: np.ndarray = np.minimum(np.maximum(p, CLAMP), 1 - CLAMP)
    return clamped


def logit(p: np.ndarray) -> np.ndarray:
    """Of p within CLAMP."""
    p = within(p)
    found: np.ndarray = np.log(p / (1 - p))
    return found


def sigmoid(z: np.ndarray) -> np.ndarray:
    p: np.ndarray = 1 / (1 + np.exp(-np.maximum(z, -80)))  # beyond it float32 has no exponential, and says so
    return p
