"""How good a prediction is: pure functions on tensors, nothing of models or files.

Rows N are tokens, or batches (a batch needs an expert when one of its tokens does: OR). Recall alone is
maximised by predicting everything, so what costs bytes stands beside it: precision at the same threshold,
recall at equal budget (as many predicted as truly active), bytes wasted.

Where probabilities tie, the budget is filled by lot: what is returned is the expectation over all ways of
breaking the tie. Otherwise a predictor that only says yes and no would be judged by the numbering of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BINS = 1000  # of a probability histogram: thresholds are known to 0.001


def batch_accuracy(truth_LE: Tensor, predicted_LE: Tensor) -> float:
    """The paper's batch-level accuracy (section 4.3.3) of one batch, as its formula stands.

    Both bool. The mean over layers of |active and predicted| / |active|; layers that used no expert (possible
    where tokens are dropped) are left out, nan when there are no others.
    """
    return batch_accuracy_by_layer(truth_LE[None], predicted_LE[None]).nanmean().item()


def batch_accuracy_by_layer(truth_NLE: Tensor, predicted_NLE: Tensor) -> Tensor:
    """accuracy_L, the mean over N batches of the formula's inner fraction; nan for layers never active."""
    return accuracy_by_row(truth_NLE, predicted_NLE).nanmean(dim=0)


def accuracy_by_row(truth_NLE: Tensor, predicted_NLE: Tensor) -> Tensor:
    """The formula's inner fraction, accuracy_NL: nan where a row used no expert of the layer."""
    hits_NL = (truth_NLE & predicted_NLE).sum(-1, dtype=torch.float64)
    return hits_NL / truth_NLE.sum(-1)  # 0 / 0 is nan


@dataclass(frozen=True)
class Guesses:
    """Counts by layer, float64: hits are fractional where ties were broken by lot. They add up."""

    hits_L: Tensor
    active_L: Tensor
    predicted_L: Tensor

    def __add__(self, other: Guesses) -> Guesses:
        return Guesses(
            self.hits_L + other.hits_L,
            self.active_L + other.active_L,
            self.predicted_L + other.predicted_L,
        )

    @property
    def recall_L(self) -> Tensor:
        return self.hits_L / self.active_L

    @property
    def precision_L(self) -> Tensor:
        return self.hits_L / self.predicted_L

    @property
    def recall(self) -> float:
        return (self.hits_L.sum() / self.active_L.sum()).item()

    @property
    def precision(self) -> float:
        return (self.hits_L.sum() / self.predicted_L.sum()).item()

    def bytes_wasted(self, expert_bytes: int) -> float:
        """Bytes moved for experts that nobody wanted, if every guess were loaded."""
        return expert_bytes * (self.predicted_L - self.hits_L).sum().item()

    def bytes_missed(self, expert_bytes: int) -> float:
        """Bytes of needed experts that were not foreseen, and so are demand loads."""
        return expert_bytes * (self.active_L - self.hits_L).sum().item()


def guesses_at(p_NLE: Tensor, truth_NLE: Tensor, threshold: float) -> Guesses:
    """Every expert with p > threshold is predicted."""
    return guesses_of(p_NLE > threshold, truth_NLE)


def guesses_of(predicted_NLE: Tensor, truth_NLE: Tensor) -> Guesses:
    """Counts of bool predictions against the bool truth."""
    f64 = torch.float64
    return Guesses(
        (predicted_NLE & truth_NLE).sum((0, 2), dtype=f64),
        truth_NLE.sum((0, 2), dtype=f64),
        predicted_NLE.sum((0, 2), dtype=f64),
    )


def guesses_at_equal_budget(p_NLE: Tensor, truth_NLE: Tensor) -> Guesses:
    """As many experts predicted as are truly active in that row and layer, the most likely first.

    Recall and precision are then one number.
    """
    hits_NL, active_NL = _equal_budget_hits(p_NLE, truth_NLE)
    active_L = active_NL.sum(0, dtype=torch.float64)
    return Guesses(hits_NL.sum(0, dtype=torch.float64), active_L, active_L)


def _equal_budget_hits(p_NLE: Tensor, truth_NLE: Tensor) -> tuple[Tensor, Tensor]:
    """Expected hits_NL and the budget active_NL."""
    active_NL = truth_NLE.sum(-1)
    num_experts = p_NLE.shape[-1]
    # numpy sorts short float32 rows with vector instructions, several times faster than torch.
    ascending = torch.from_numpy(np.sort(p_NLE.contiguous().float().numpy(), axis=-1))
    last = (num_experts - active_NL).clamp(max=num_experts - 1)  # where the budget ends
    cut_NL1 = ascending.gather(-1, last[..., None])
    above, tied = p_NLE > cut_NL1, p_NLE == cut_NL1
    left = active_NL - above.sum(-1)  # of the budget, for the tied ones
    share = left / tied.sum(-1).clamp(min=1)
    hits = (above & truth_NLE).sum(-1) + share * (tied & truth_NLE).sum(-1)
    return torch.where(active_NL > 0, hits, torch.zeros_like(hits)), active_NL


def log_absent(p_NLE: Tensor) -> Tensor:
    """log(1 - p), in float32 and finite: sums over the tokens of a batch give the batch's."""
    return torch.log1p(-p_NLE.float().clamp(0, 1 - 1e-6))


def batch_probability(p_BLE: Tensor) -> Tensor:
    """p_LE that at least one of B independent tokens needs the expert."""
    return -torch.expm1(log_absent(p_BLE).sum(0))


@dataclass(frozen=True)
class ProbabilityHistogram:
    """How often a probability was said, how often it came true, and its sum: by BINS equal steps. Adds up."""

    count: Tensor  # [BINS] float64
    positive: Tensor
    p_sum: Tensor

    @staticmethod
    def of(p_NLE: Tensor, truth_NLE: Tensor) -> ProbabilityHistogram:
        p = p_NLE.reshape(-1).float()
        bins = (p * BINS).to(torch.int64).clamp_(0, BINS - 1)
        f64 = torch.float64
        return ProbabilityHistogram(
            torch.bincount(bins, minlength=BINS).to(f64),
            torch.bincount(bins[truth_NLE.reshape(-1)], minlength=BINS).to(f64),
            torch.bincount(bins, weights=p.to(f64), minlength=BINS),
        )

    def __add__(self, other: ProbabilityHistogram) -> ProbabilityHistogram:
        return ProbabilityHistogram(
            self.count + other.count, self.positive + other.positive, self.p_sum + other.p_sum
        )

    def precision_recall(self) -> tuple[Tensor, Tensor, Tensor]:
        """thresholds, precision and recall, [BINS] each: what reaches a bin's lower edge is predicted.

        Precision is nan where nothing reaches the threshold.
        """
        predicted = self.count.flip(0).cumsum(0).flip(0)
        hits = self.positive.flip(0).cumsum(0).flip(0)
        thresholds = torch.arange(BINS, dtype=torch.float64) / BINS
        return thresholds, hits / predicted, hits / self.positive.sum()

    def break_even(self) -> float:
        """The threshold at which as many experts are predicted as are active: precision = recall."""
        predicted = self.count.flip(0).cumsum(0).flip(0)
        nearest = (predicted - self.positive.sum()).abs().argmin()
        return nearest.item() / BINS

    def reliability(self, num_bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
        """Mean probability said, share that came true, and count: [num_bins], equal steps of probability."""
        which = torch.arange(BINS) * num_bins // BINS
        count, positive, p_sum = (
            torch.zeros(num_bins, dtype=torch.float64).index_add_(0, which, values)
            for values in (self.count, self.positive, self.p_sum)
        )
        return p_sum / count, positive / count, count

    def expected_calibration_error(self, num_bins: int = 15) -> float:
        """The count-weighted mean of |said - came true| over the bins (Guo et al. 2017)."""
        said, came_true, count = self.reliability(num_bins)
        return ((said - came_true).abs().nan_to_num() * count).sum().item() / count.sum().item()
