"""Look-ahead that has learnt what the layer between adds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expertflow.predictor.layer_baselines import GateLookAhead
from expertflow.predictor.tuned_ahead import TunedLookAhead

LAYERS, EXPERTS, HIDDEN, TOP_K = 3, 16, 24, 2


def routers() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(EXPERTS, HIDDEN, generator=generator) for _ in range(LAYERS)]


def states(tokens: int, seed: int, changed: float) -> tuple[Tensor, Tensor]:
    """What enters each layer, and its routes; a layer adds `changed` times a fixed function of its input."""
    generator = torch.Generator().manual_seed(1)
    adds = [torch.randn(HIDDEN, HIDDEN, generator=generator) * HIDDEN**-0.5 for _ in range(LAYERS)]
    hidden = [torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))]
    for add in adds[:-1]:
        hidden.append(hidden[-1] + changed * torch.relu(hidden[-1] @ add))
    hidden_NLD = torch.stack(hidden, 1)
    routes = [(hidden_NLD[:, layer] @ weight.T).topk(TOP_K).indices for layer, weight in enumerate(routers())]
    return hidden_NLD, torch.stack(routes, 1)


def recall(predictor, hidden_NLD: Tensor, routes_NLK: Tensor) -> float:
    right = 0
    for layer in range(LAYERS - 1):
        p_NE = predictor.observe(layer, hidden_NLD[:, layer], None)
        chosen_NK = p_NE.topk(TOP_K).indices
        right += int((chosen_NK[:, :, None] == routes_NLK[:, layer + 1, None]).sum())
    return right / routes_NLK[:, 1:].numel()


def test_it_learns_what_the_layer_between_adds():
    tuned, plain = TunedLookAhead(routers(), [None] * LAYERS), GateLookAhead(routers(), TOP_K)
    tuned.fit(*states(4000, 2, 1.5), steps=150)
    held_out = states(500, 3, 1.5)
    assert recall(plain, *held_out) < 0.7
    assert recall(tuned, *held_out) > recall(plain, *held_out) + 0.15
    assert tuned.observe(LAYERS - 1, held_out[0][:, -1], None) is None
    assert tuned.observe(0, None, None) is None


def test_it_starts_as_look_ahead():
    """With the router's bias, and where no expert is more frequent than another."""
    bias = [torch.randn(EXPERTS, generator=torch.Generator().manual_seed(layer)) for layer in range(LAYERS)]
    hidden_NLD, _ = states(3000, 2, 0.0)
    routes_NLK = torch.arange(3000 * LAYERS * TOP_K).view(3000, LAYERS, TOP_K) % EXPERTS
    tuned = TunedLookAhead(routers(), bias)
    tuned.fit(hidden_NLD, routes_NLK, steps=0)
    plain = GateLookAhead(routers(), TOP_K, bias)
    p_tuned, p_plain = (p.observe(0, hidden_NLD[:, 0], None) for p in (tuned, plain))
    # The mean of the logits is taken out by expert, which moves few of those that are first.
    assert (p_tuned.argmax(1) == p_plain.argmax(1)).float().mean() > 0.7
    assert p_tuned.mean() == pytest.approx(TOP_K / EXPERTS, abs=0.12)


def test_narrower_layers_and_dropped_tokens():
    weights = [torch.randn(4, HIDDEN), torch.randn(EXPERTS, HIDDEN), torch.randn(6, HIDDEN)]
    tuned = TunedLookAhead(weights, [None] * LAYERS)
    hidden_NLD = torch.randn(300, LAYERS, HIDDEN)
    routes_NLK = torch.full((300, LAYERS, 1), EXPERTS)  # nowhere
    routes_NLK[:, 2] = 5
    tuned.fit(hidden_NLD, routes_NLK, steps=60)
    assert tuned.observe(0, hidden_NLD[:, 0], None).max() < 0.1
    p_NE = tuned.observe(1, hidden_NLD[:, 1], None)
    assert (p_NE.argmax(1) == 5).all()
    assert p_NE[:, 6:].max() < 0.1


def test_bad_input_is_explained():
    tuned = TunedLookAhead(routers(), [None] * LAYERS)
    with pytest.raises(ValueError, match="no hidden states to train on"):
        tuned.fit(torch.zeros(0, LAYERS, HIDDEN), torch.zeros(0, LAYERS, TOP_K, dtype=torch.int64))
    hidden_NLD, routes_NLK = states(100, 0, 1.0)
    hidden_NLD[3:, 1] = float("nan")
    with pytest.raises(ValueError, match="check the hidden states for nan"):
        tuned.fit(hidden_NLD, routes_NLK, steps=3)
