"""Muon for matrices, Adam for the rest: each parameter in one of them, and each at its rate."""

from __future__ import annotations

import torch

from expertflow.predictor.model import PredictedModel, RoutingPathPredictor
from expertflow.predictor.optimizer import _MUON_RATE, _TABLE_RATE, MuonAndAdam
from expertflow.predictor.sizes import sizes_of

RATE = 0.01


def one_step(weight_decay: float = 0.0) -> tuple[RoutingPathPredictor, dict[str, torch.Tensor]]:
    """A predictor whose gradients are noise, and how far each parameter moved."""
    torch.manual_seed(0)
    predictor = RoutingPathPredictor(sizes_of(), PredictedModel("f", "m", (8, 8), 0, 2, 50))
    before = {name: p.detach().clone() for name, p in predictor.named_parameters()}
    for parameter in predictor.parameters():
        parameter.grad = torch.randn_like(parameter)
    MuonAndAdam(predictor, weight_decay).step(RATE)
    assert all(p.grad is None for p in predictor.parameters())
    return predictor, {name: p.detach() - before[name] for name, p in predictor.named_parameters()}


def test_every_parameter_moves_at_the_rate_of_its_kind():
    predictor, moved = one_step()
    tables = {"embedding.weight", "target_heads.token_table.weight"}
    assert len(tables) == len(predictor.tables())
    for name, step in moved.items():
        if name in tables or step.ndim == 1:  # Adam's first step has the size of its rate everywhere
            expected = RATE * (_TABLE_RATE if name in tables else 1)
            assert torch.allclose(step.abs(), torch.full_like(step, expected), rtol=1e-3), name
        else:
            singular = torch.linalg.svdvals(step)
            # Five rounds of its iteration leave a little of the smallest.
            assert singular.max() < 2.5 * singular.quantile(0.1), f"{name} is no orthogonal step"
            # 0.2 is Adam's usual size.
            assert 0.5 < step.square().mean().sqrt() / (0.2 * RATE * _MUON_RATE) < 1.5, name


def test_weights_decay_in_matrices_alone():
    (_, plain), (_, decayed) = one_step(0.0), one_step(0.5)
    changed = {name for name in plain if not torch.equal(plain[name], decayed[name])}
    matrices = {name for name, step in plain.items() if step.ndim == 2}
    # Of the matrices, the bias by distance begins at zero.
    tables = {"embedding.weight", "target_heads.token_table.weight"}
    assert changed == matrices - tables - {"decoder.bias.table.weight"}
