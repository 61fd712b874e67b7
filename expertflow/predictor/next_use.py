"""When is each expert used next? From what a trained head expects and from what was used, mixed as text goes by.

For `eval-predictor`, which says with it what the head adds to use; the running cache has `pass_forecast.py`.
The head alone is better than recency and frequency on text like that it was trained on, and worse on other text
(docs/predictors.md). What is mixed here says for each horizon h whether an expert is used within h passes; the
weights follow what comes true, so a head that is out of its depth loses its say.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

HORIZONS = (1, 2, 4, 8, 16)  # passes after this one; powers of two from 1
_SLOW, _FAST = 0.995, 0.9  # by pass, of the two running frequencies
_FORGET = 0.999  # by pass, of what the weights have learnt
_START_PASSES = 4.0  # the start counts as this many


def expected_passes(later_CLE: Tensor) -> Tensor:
    """passes_LE until the next use, from P(later than h) at each of HORIZONS: between 1 and 32 (not soon).

    E[n] = 1 + sum over n >= 1 of P(later than n), which is taken as constant from one horizon to the next.
    """
    ends = (*HORIZONS[1:], 2 * HORIZONS[-1])
    # A longer horizon includes a shorter.
    later_CLE = later_CLE.cummin(0).values
    spans_C = torch.tensor([end - horizon for horizon, end in zip(HORIZONS, ends, strict=True)])
    return 1 + torch.einsum("c,cle->le", spans_C.to(later_CLE.dtype), later_CLE)


class NextUseMixture:
    """P(used within h) = sigmoid(w . x): logistic regressions of three signals, by horizon, learnt online.

    One online Newton step per pass and horizon, over all L * E experts.
    """

    def __init__(self, layers: int, num_experts: int, top_k: int):
        self._rate_SLE = torch.full((2, layers, num_experts), top_k / num_experts)  # slow and fast
        num_features = 4
        # At first the mean of the three: the head (a logit of its own making) and both frequencies.
        start_F = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0])
        self.weight_CF = start_F.repeat(len(HORIZONS), 1)
        self._prior = torch.eye(num_features) * _START_PASSES * top_k * layers
        self._curvature_CFF = self._prior.repeat(len(HORIZONS), 1, 1)
        self._waiting: deque[Tensor] = deque(maxlen=max(HORIZONS))  # x_CLEF of the last passes, newest last
        self._used: deque[Tensor] = deque(maxlen=max(HORIZONS))

    def observe(self, used_LE: Tensor) -> None:
        """A pass is over; used_LE (bool) says what it used. Learns from the guesses that this pass decides."""
        self._used.append(used_LE)
        for number, horizon in enumerate(HORIZONS):
            if len(self._waiting) >= horizon and len(self._used) >= horizon:
                came_LE = torch.stack(list(self._used)[-horizon:]).any(0)
                self._learn(number, self._waiting[-horizon][number], came_LE)
        for rate_LE, keep in zip(self._rate_SLE, (_SLOW, _FAST), strict=True):
            rate_LE.mul_(keep).add_(used_LE.to(rate_LE.dtype), alpha=1 - keep)

    def expect(self, passes_LE: Tensor | None = None) -> Tensor:
        """passes_LE until each expert's next use, as `NextUsePredictor.next_use_path` says for this pass alone.

        To be called once after each `observe`. passes_LE: what a trained head expects, or None without one.
        """
        x_CLEF = self._features(passes_LE)
        self._waiting.append(x_CLEF)
        logits_CLE = torch.einsum("cf,clef->cle", self.weight_CF, x_CLEF)
        return expected_passes(torch.sigmoid(-logits_CLE))

    def end_of_text(self) -> None:
        """The next pass belongs to other sequences: what is waiting will not be decided by it."""
        self._waiting.clear()
        self._used.clear()

    def _features(self, passes_LE: Tensor | None) -> Tensor:
        layers_experts = self._rate_SLE.shape[1:]
        x_CLEF = torch.zeros(len(HORIZONS), *layers_experts, 4)
        x_CLEF[..., 3] = 1
        if passes_LE is not None:
            # As if uses came by chance, once in so many passes.
            x_CLEF[..., 0] = _log_odds_within((1 / passes_LE).clamp(max=0.97))
        for column, rate_LE in enumerate(self._rate_SLE, 1):
            x_CLEF[..., column] = _log_odds_within(rate_LE)
        return x_CLEF

    def _learn(self, number: int, x_LEF: Tensor, came_LE: Tensor) -> None:
        x_NF, came_N = x_LEF.flatten(0, 1), came_LE.flatten().float()
        p_N = torch.sigmoid(x_NF @ self.weight_CF[number])
        curvature = self._curvature_CFF[number]
        curvature.sub_(self._prior).mul_(_FORGET).add_(self._prior)
        curvature.add_((x_NF * (p_N * (1 - p_N))[:, None]).T @ x_NF)
        step_F = torch.linalg.solve(curvature, x_NF.T @ (p_N - came_N))
        self.weight_CF[number] -= step_F.clamp(-0.5, 0.5)


def _log_odds_within(rate_LE: Tensor) -> Tensor:
    """log-odds_CLE that something that happens with probability `rate` per pass does so within each horizon."""
    rate_LE = rate_LE.clamp(1e-3, 1 - 1e-3)
    never_CLE = torch.stack([(1 - rate_LE) ** horizon for horizon in HORIZONS])
    return torch.log1p(-never_CLE) - torch.log(never_CLE.clamp(min=1e-12))
