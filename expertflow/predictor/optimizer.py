"""Muon for the predictor's matrices, Adam for its tables, norms and biases, as one optimizer.

Muon orthogonalises the momentum of a matrix (Jordan et al., 2024; torch.optim.Muon), so that every direction
learns as fast as the strongest. A predictor gets as far in a third of the steps that AdamW needs (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from expertflow.predictor.model import RoutingPathPredictor

_MUON_RATE = 5.0  # times the learning rate, for matrices: found on the embedded model (docs/log.md)
_TABLE_RATE = 15.0  # times the learning rate, for tables: a token's row moves only when the token comes
_ADAM_BETAS = (0.9, 0.98)


class MuonAndAdam:
    """What training asks of an optimizer, over every parameter of `predictor`.

    weight_decay: of matrices; tables, norms and biases have none. The rate of Muon is scaled to steps of the
    size that Adam's have ("match_rms_adamw"), times a constant, so that one learning rate serves both.
    """

    def __init__(self, predictor: RoutingPathPredictor, weight_decay: float):
        tables = [table.weight for table in predictor.tables()]
        in_tables = {id(weight) for weight in tables}
        rest = [p for p in predictor.parameters() if id(p) not in in_tables]
        matrices, others = [p for p in rest if p.ndim == 2], [p for p in rest if p.ndim != 2]
        muon = torch.optim.Muon(
            [_group(matrices, rate=_MUON_RATE)], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adam = torch.optim.Adam([_group(others), _group(tables, rate=_TABLE_RATE)], betas=_ADAM_BETAS)
        self._both = {"muon": muon, "adam": adam}

    def step(self, learning_rate: float) -> None:
        """One update by the gradients that are there, then none are."""
        for optimizer in self._both.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["rate"]
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self._both.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self._both.items():
            optimizer.load_state_dict(state[name])


def _group(parameters: Iterable[Tensor], rate: float = 1.0) -> dict[str, Any]:
    return {"params": list(parameters), "rate": rate}
