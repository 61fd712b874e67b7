"""From what predictors say of a batch, and from what it used, to what a cache plans by.

For each expert: the probability that this pass needs it, and how many passes later it is needed again. Logistic
regressions, one for each horizon and layer, of the prediction, the next-use head and running frequencies of use;
all are learnt online from what comes true. So a predictor that talks nonsense loses its say to the frequencies,
and one that is over-confident is set right, before either costs a byte.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from expertflow.predictor.next_use import HORIZONS, expected_passes

_KEEP = (0.998, 0.95, 0.6)  # by pass, of the running frequencies
_START_PASSES = 3.0  # the uniform start of a frequency counts as this many passes
_FORGET = 0.998  # by pass, of what the weights have learnt
_PRIOR = (
    8.0  # curvature of the prior of each weight: about that of 8 passes of 32 experts, a tenth of them used
)
_CLAMP = 1e-3


class PassForecast:
    """Call `forecast` before a pass and `observe` after it; `end_of_text` when other sequences follow."""

    def __init__(self, layers: int, num_experts: int, top_k: int, has_prediction: bool, has_head: bool):
        """has_prediction, has_head: whether `forecast` will be given p_LE, later_CLE."""
        base = top_k / num_experts
        self._used_SLE = torch.full((len(_KEEP), layers, num_experts), base * _START_PASSES)
        self._passes_S = torch.full((len(_KEEP),), _START_PASSES)
        self.has_prediction, self.has_head = has_prediction, has_head
        num_rates = len(_KEEP)
        features = num_rates + 3  # frequencies, the prediction, the head, one
        start_CF = torch.zeros(1 + len(HORIZONS), features)
        start_CF[:, :num_rates] = 1 / num_rates
        if has_prediction:
            start_CF[0, :num_rates], start_CF[0, num_rates] = 0.0, 1.0
        if has_head:
            start_CF[1:, :num_rates], start_CF[1:, num_rates + 1] = 0.5 / num_rates, 0.5
        self.weight_CLF = start_CF[:, None].repeat(1, layers, 1)
        self._prior = torch.eye(features) * _PRIOR
        self._curvature_CLFF = self._prior.repeat(1 + len(HORIZONS), layers, 1, 1)
        self._waiting: deque[Tensor] = deque(maxlen=1 + max(HORIZONS))  # x_CLEF of the last passes
        self._used: deque[Tensor] = deque(maxlen=1 + max(HORIZONS))

    def forecast(self, p_LE: Tensor | None, later_CLE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(p_LE of this pass, later_LE: passes after it until the next use, 1 to 32).

        p_LE: what a predictor says of the whole batch. later_CLE: the next-use head's probability, for each of
        HORIZONS, that the batch does not use the expert within so many passes after this one.
        """
        x_CLEF = self._features(p_LE, later_CLE)
        self._waiting.append(x_CLEF)
        said_CLE = torch.sigmoid(torch.einsum("clf,clef->cle", self.weight_CLF, x_CLEF))
        return said_CLE[0], expected_passes(1 - said_CLE[1:])

    def observe(self, used_LE: Tensor) -> None:
        """The pass is over; used_LE (bool) says what it used. Learns from every guess that this decides."""
        self._used.append(used_LE)
        decided = [(0, 0)] + [(c, horizon) for c, horizon in enumerate(HORIZONS, 1)]
        x, truth, which = [], [], []
        for c, horizon in decided:
            if len(self._waiting) > horizon:
                # Guessed `horizon` passes ago, of the passes after that one; or just now, of this one.
                x.append(self._waiting[-1 - horizon][c])
                truth.append(torch.stack(list(self._used)[-max(1, horizon) :]).any(0))
                which.append(c)
        if x:
            self._learn(torch.tensor(which), torch.stack(x), torch.stack(truth).float())
        for number, keep in enumerate(_KEEP):
            self._used_SLE[number] = self._used_SLE[number] * keep + used_LE
            self._passes_S[number] = self._passes_S[number] * keep + 1

    def end_of_text(self) -> None:
        """The next pass belongs to other sequences: what is waiting will not be decided by it."""
        self._waiting.clear()
        self._used.clear()

    def _features(self, p_LE: Tensor | None, later_CLE: Tensor | None) -> Tensor:
        rate_SLE = (self._used_SLE / self._passes_S[:, None, None]).clamp(_CLAMP, 1 - _CLAMP)
        num_rates, layers, experts = rate_SLE.shape
        x_CLEF = torch.zeros(1 + len(HORIZONS), layers, experts, num_rates + 3)
        for c, horizon in enumerate((1, *HORIZONS)):
            never_SLE = ((1 - rate_SLE) ** horizon).clamp(1e-6, 1 - 1e-6)
            x_CLEF[c, ..., :num_rates] = (torch.log1p(-never_SLE) - never_SLE.log()).permute(1, 2, 0)
        if p_LE is not None:
            x_CLEF[..., num_rates] = torch.logit(p_LE, eps=_CLAMP)
        if later_CLE is not None:
            x_CLEF[1:, ..., num_rates + 1] = -torch.logit(later_CLE, eps=_CLAMP)
        x_CLEF[..., -1] = 1
        return x_CLEF

    def _learn(self, which_C: Tensor, x_CLEF: Tensor, came_CLE: Tensor) -> None:
        """One online Newton step of each regression in which_C."""
        weight_CLF, curvature_CLFF = self.weight_CLF[which_C], self._curvature_CLFF[which_C]
        p_CLE = torch.sigmoid(torch.einsum("clf,clef->cle", weight_CLF, x_CLEF))
        scaled_CLEF = x_CLEF * (p_CLE * (1 - p_CLE))[..., None]
        curvature_CLFF = (curvature_CLFF - self._prior) * _FORGET + self._prior
        curvature_CLFF = curvature_CLFF + scaled_CLEF.transpose(2, 3) @ x_CLEF
        gradient_CLF = torch.einsum("cle,clef->clf", p_CLE - came_CLE, x_CLEF)
        step_CLF = torch.linalg.solve(curvature_CLFF, gradient_CLF).clamp(-0.5, 0.5)
        self._curvature_CLFF[which_C] = curvature_CLFF
        self.weight_CLF[which_C] = weight_CLF - step_CLF
