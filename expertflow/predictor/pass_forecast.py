"""From what predictors say of a batch, and from what it used, to what a cache plans by.

For each expert: the probability that this pass needs it and, where a predictor has a next-use head, how many passes
later it is needed again. Logistic regressions, one for this pass and one for each of the head's horizons, of what is
predicted and of running frequencies of use; all are learnt online from what comes true. So a predictor that talks
nonsense loses its say to the frequencies, and one that is over-confident is set right, before either costs a byte.

Without a head nothing is said of later passes: regressions on frequencies alone knew less than their plain mean, by
which the cache goes then (docs/log.md).

In numpy, as said in logits.py: there is little in each call.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from expertflow.predictor.logits import logit, sigmoid, within
from expertflow.predictor.lots import Lots
from expertflow.predictor.next_use import HORIZONS

_KEEP = (0.998, 0.95, 0.6)  # by pass, of the running frequencies
_START_PASSES = 3.0  # the uniform start of a frequency counts as this many passes
_FORGET = 0.998  # by pass, of what the weights have learnt
_LOT_PASSES = 4  # are learnt from at once
_PRIOR = (
    8.0  # curvature of the prior of each weight: about that of 8 passes of 32 experts, a tenth of them used
)
_LONGEST_STEP = 0.5  # of a weight, in one pass
# What a use is worth for each pass that it comes later: a cache forgets within a few. The mean until the next use
# would be ruled by those hardly ever used (docs/log.md).
_DISCOUNT = 0.7
_PASSES_C111 = np.array([1.0, *HORIZONS], np.float32)[:, None, None, None]
_KEEP_S = np.array(_KEEP, np.float32)
_LOG_NONE = (math.log(1e-6), math.log1p(-1e-6))


def worth_as_passes(absent_CLE: Tensor) -> Tensor:
    """passes_LE after which a certain use would be worth as much as what is expected.

    absent_CLE: P(no use within so many passes) at each of HORIZONS. A use n passes from now is worth _DISCOUNT ** n.
    """
    absent_CLE = absent_CLE.cummin(0).values  # a longer horizon includes a shorter
    worth_LE, before_LE, begin = torch.zeros_like(absent_CLE[0]), torch.ones_like(absent_CLE[0]), 0
    for absent_LE, horizon in zip(absent_CLE, HORIZONS, strict=True):
        worth_LE += (before_LE - absent_LE) * _DISCOUNT ** ((begin + 1 + horizon) / 2)
        before_LE, begin = absent_LE, horizon
    worth_LE += before_LE * _DISCOUNT ** (1.5 * begin)
    return worth_LE.log() / math.log(_DISCOUNT)


class _Lesson(NamedTuple):
    """What came of guesses."""

    which: tuple[int, ...]  # regression, by C
    x_CLEF: np.ndarray
    came_CLE: np.ndarray


class PassForecast:
    """Call `forecast` before a pass and `observe` after it; `end_of_text` when other sequences follow."""

    def __init__(self, layers: int, num_experts: int, top_k: int, has_prediction: bool, has_head: bool):
        """has_prediction, has_head: whether `forecast` will be given p_LE, later_CLE."""
        base = top_k / num_experts
        self._used_SLE = np.full((len(_KEEP), layers, num_experts), base * _START_PASSES, np.float32)
        self._passes_S = np.full(len(_KEEP), _START_PASSES, np.float32)
        self.has_prediction, self.has_head = has_prediction, has_head
        self.horizons = HORIZONS if has_head else ()
        num_rates = len(_KEEP)
        features = num_rates + 4  # frequencies against their mean, the prediction, the head, that mean, one
        start_CF = np.zeros((1 + len(self.horizons), features), np.float32)
        start_CF[:, :num_rates], start_CF[:, -2] = 1 / num_rates, 1.0
        if has_prediction:
            start_CF[0, :num_rates], start_CF[0, -2], start_CF[0, num_rates] = 0.0, 0.0, 1.0
        if has_head:
            start_CF[1:, :num_rates], start_CF[1:, -2], start_CF[1:, num_rates + 1] = (
                0.5 / num_rates,
                0.5,
                0.5,
            )
        self.weight_CF = start_CF
        self._prior = np.eye(features, dtype=np.float32) * _PRIOR
        self._curvature_CFF = np.repeat(self._prior[None], 1 + len(self.horizons), 0)
        self._lots: Lots[_Lesson] = Lots(_LOT_PASSES, every=1)
        longest = max(self.horizons, default=0)
        self._waiting: deque[np.ndarray] = deque(maxlen=1 + longest)  # x_CLEF of the last passes
        self._used: deque[np.ndarray] = deque(maxlen=1 + longest)

    def forecast(self, p_LE: Tensor | None, later_CLE: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(p_LE of this pass, later_LE: passes after it until the next use, discounted: see `worth_as_passes`; None
        without a head).

        p_LE: what a predictor says of the whole batch. later_CLE: the next-use head's probability, for each of
        HORIZONS, that the batch does not use the expert within so many passes after this one.
        """
        x_CLEF = self._features(p_LE, later_CLE)
        self._waiting.append(x_CLEF)
        said_CLE = torch.from_numpy(sigmoid((x_CLEF * self.weight_CF[:, None, None]).sum(-1)))
        return said_CLE[0], worth_as_passes(1 - said_CLE[1:]) if self.has_head else None

    def peek(self, p_LE: Tensor) -> Tensor:
        """p_LE that a pass to come needs each expert, as `forecast` would say now; nothing is noted of it."""
        return torch.from_numpy(sigmoid((self._features(p_LE, None)[0] * self.weight_CF[0]).sum(-1)))

    def observe(self, used_LE: Tensor) -> None:
        """The pass is over; used_LE (bool) says what it used. Learns from every guess that this decides."""
        self._used.append(used_LE.numpy())
        decided = [(0, 0)] + [(c, horizon) for c, horizon in enumerate(self.horizons, 1)]
        x, truth, which = [], [], []
        for c, horizon in decided:
            if len(self._waiting) > horizon:
                # Guessed `horizon` passes ago, of the passes after that one; or just now, of this one.
                x.append(self._waiting[-1 - horizon][c])
                truth.append(np.logical_or.reduce(list(self._used)[-max(1, horizon) :]))
                which.append(c)
        if x:
            lesson = _Lesson(tuple(which), np.stack(x), np.stack(truth).astype(np.float32))
            for lot in _alike(self._lots.add(lesson, 1)):
                self._learn(lot)
        self._used_SLE = self._used_SLE * _KEEP_S[:, None, None] + self._used[-1]
        self._passes_S = self._passes_S * _KEEP_S + 1

    def end_of_text(self) -> None:
        """The next pass belongs to other sequences: what is waiting will not be decided by it."""
        self._waiting.clear()
        self._used.clear()

    def _features(self, p_LE: Tensor | None, later_CLE: Tensor | None) -> np.ndarray:
        rate_SLE = within(self._used_SLE / self._passes_S[:, None, None])
        num_rates, layers, experts = rate_SLE.shape
        x_CLEF = np.empty((1 + len(self.horizons), layers, experts, num_rates + 4), np.float32)
        # The logit of any use within the horizon, from the logarithm of none.
        none_CSLE = np.log1p(-rate_SLE) * _PASSES_C111[: len(x_CLEF)]
        none_CSLE = np.minimum(np.maximum(none_CSLE, _LOG_NONE[0]), _LOG_NONE[1])
        rates_CLES = (np.log(-np.expm1(none_CSLE)) - none_CSLE).transpose(0, 2, 3, 1)
        # Against the mean: else, while all are used alike, they are what the constant is, and take wild weights.
        mean_C11S = rates_CLES.mean((1, 2), keepdims=True)
        x_CLEF[..., :num_rates] = rates_CLES - mean_C11S
        x_CLEF[..., num_rates:-2] = 0
        x_CLEF[..., -2] = mean_C11S.mean(-1)
        if p_LE is not None:
            x_CLEF[..., num_rates] = logit(p_LE.numpy())
        if later_CLE is not None:
            x_CLEF[1:, ..., num_rates + 1] = -logit(later_CLE.numpy())
        x_CLEF[..., -1] = 1
        return x_CLEF

    def _learn(self, lot: Sequence[_Lesson]) -> None:
        """One online Newton step of each regression that these passes, alike in that, have decided."""
        which_C = list(lot[0].which)
        features = self.weight_CF.shape[1]
        x_CNF = np.concatenate([lesson.x_CLEF for lesson in lot], 1).reshape(len(which_C), -1, features)
        came_CN = np.concatenate([lesson.came_CLE for lesson in lot], 1).reshape(len(which_C), -1)
        weight_CF, curvature_CFF = self.weight_CF[which_C], self._curvature_CFF[which_C]
        p_CN = sigmoid((x_CNF * weight_CF[:, None]).sum(-1))
        curvature_CFF = (curvature_CFF - self._prior) * np.float32(_FORGET ** len(lot)) + self._prior
        scaled_CNF = x_CNF * (p_CN * (1 - p_CN))[..., None]
        # By torch: threads of numpy's own BLAS would go on waiting beside the next experts' products.
        scaled_CFN = torch.from_numpy(scaled_CNF).transpose(1, 2)
        curvature_CFF = curvature_CFF + (scaled_CFN @ torch.from_numpy(x_CNF)).numpy()
        gradient_CF = (x_CNF * (p_CN - came_CN)[..., None]).sum(1)
        step_CF = np.linalg.solve(curvature_CFF, gradient_CF[..., None])[..., 0]
        # Shortened as a whole, since each weight by itself would be another direction.
        longest_C1 = np.maximum(np.abs(step_CF).max(1, keepdims=True), _LONGEST_STEP)
        self._curvature_CFF[which_C] = curvature_CFF
        # A copy, since another thread may be reading: it sees the old ones or the new.
        learnt_CF = self.weight_CF.copy()
        learnt_CF[which_C] = weight_CF - step_CF * (_LONGEST_STEP / longest_C1)
        self.weight_CF = learnt_CF


def _alike(lessons: Sequence[_Lesson]) -> Iterator[list[_Lesson]]:
    """In parts that decide the same regressions: a text that begins has not waited for the long ones yet."""
    for _, alike in groupby(sorted(lessons, key=_which), key=_which):
        yield list(alike)


def _which(lesson: _Lesson) -> tuple[int, ...]:
    return lesson.which
