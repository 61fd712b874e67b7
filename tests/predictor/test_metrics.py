"""Each metric against the obvious loop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.predictor import metrics, ranking
from expertflow.predictor.metrics import ProbabilityHistogram


def random_case(seed: int, n: int = 7, layers: int = 3, experts: int = 5, levels: int | None = None):
    """p_NLE and truth_NLE; few levels give ties."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(n, layers, experts, generator=generator)
    if levels:
        p = (p * levels).floor() / levels
    return p, torch.rand(n, layers, experts, generator=generator) < 0.4


@pytest.mark.parametrize("seed", range(5))
def test_batch_accuracy_is_the_papers_formula(seed):
    p, truth_NLE = random_case(seed)
    predicted_LE, truth_LE = (p > 0.6).any(0), truth_NLE[:2].any(0)
    fractions = []
    for i in range(truth_LE.shape[0]):
        both = sum(int(truth_LE[i, j] and predicted_LE[i, j]) for j in range(truth_LE.shape[1]))
        active = sum(int(truth_LE[i, j]) for j in range(truth_LE.shape[1]))
        if active:
            fractions.append(both / active)
    assert metrics.batch_accuracy(truth_LE, predicted_LE) == pytest.approx(sum(fractions) / len(fractions))


def test_batch_accuracy_weighs_layers_alike_and_skips_silent_ones():
    truth_LE = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    predicted_LE = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    assert metrics.batch_accuracy(truth_LE, predicted_LE) == pytest.approx((1 / 4 + 1) / 2)
    assert math.isnan(metrics.batch_accuracy(torch.zeros(2, 3).bool(), predicted_LE[:2, :3]))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([None, 2, 3]))
def test_equal_budget_is_the_mean_over_ways_to_break_ties(seed, levels):
    p, truth = random_case(seed, n=2, layers=2, experts=4, levels=levels)
    expected = torch.zeros(2, dtype=torch.float64)
    for n, layer in itertools.product(range(2), range(2)):
        budget = int(truth[n, layer].sum())
        orders = [
            order
            for order in itertools.permutations(range(4))
            if all(p[n, layer, a] >= p[n, layer, b] for a, b in itertools.pairwise(order))
        ]
        hits = [sum(bool(truth[n, layer, e]) for e in order[:budget]) for order in orders]
        expected[layer] += sum(hits) / len(hits)
    got = metrics.guesses_at_equal_budget(p, truth)
    torch.testing.assert_close(got.hits_L, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.predicted_L, truth.sum((0, 2)).double())


def test_guesses_count_and_price_what_was_wrong():
    p, truth = random_case(1)
    got = metrics.guesses_at(p, truth, 0.5)
    wrong = missed = 0
    for n, layer, e in itertools.product(range(7), range(3), range(5)):
        said, true = p[n, layer, e] > 0.5, truth[n, layer, e]
        wrong += int(said and not true)
        missed += int(true and not said)
    assert got.bytes_wasted(10) == 10 * wrong
    assert got.bytes_missed(10) == 10 * missed
    hits = int(((p > 0.5) & truth).sum())
    assert got.recall == pytest.approx(hits / int(truth.sum()))
    assert got.precision == pytest.approx(hits / (hits + wrong))
    twice = got + got
    assert twice.recall == pytest.approx(got.recall)
    assert twice.bytes_wasted(1) == 2 * wrong


def test_batch_probability_is_that_of_any():
    p, _ = random_case(2)
    expected = 1 - (1 - p.double()).prod(0)
    torch.testing.assert_close(metrics.batch_probability(p).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_precision_recall_curve_is_what_thresholding_gives(seed):
    p, truth = random_case(seed, n=50)
    thresholds, precision, recall = ProbabilityHistogram.of(p, truth).precision_recall()
    for index in (0, 1, 300, 777, 999):
        said = p >= thresholds[index]
        hits = float((said & truth).sum())
        assert recall[index] == pytest.approx(hits / float(truth.sum()))
        assert precision[index] == pytest.approx(hits / float(said.sum()), nan_ok=True)


def test_at_break_even_precision_is_recall():
    p, truth = random_case(3, n=400)
    threshold = ProbabilityHistogram.of(p, truth).break_even()
    got = metrics.guesses_at(p, truth, threshold)
    assert got.recall == pytest.approx(got.precision, abs=0.01)


def test_calibration_error_is_the_weighted_gap():
    p, truth = random_case(4, n=200)
    histogram = ProbabilityHistogram.of(p, truth)
    flat_p, flat_truth = p.flatten().double(), truth.flatten().double()
    which = (flat_p * metrics.BINS).floor().long() * 10 // metrics.BINS
    gap = 0.0
    for b in range(10):
        inside = which == b
        gap += float((flat_p[inside].mean() - flat_truth[inside].mean()).abs() * inside.sum())
    assert histogram.expected_calibration_error(10) == pytest.approx(gap / flat_p.numel(), abs=1e-6)


def test_an_honest_forecast_is_calibrated_and_a_boaster_is_not():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(4000, 1, 5, generator=generator)
    truth = torch.rand(p.shape, generator=generator) < p
    assert ProbabilityHistogram.of(p, truth).expected_calibration_error() < 0.02
    assert ProbabilityHistogram.of((p > 0.5).float(), truth).expected_calibration_error() > 0.2


def test_histograms_add_up():
    p, truth = random_case(5, n=10)
    whole = ProbabilityHistogram.of(p, truth)
    parts = ProbabilityHistogram.of(p[:4], truth[:4]) + ProbabilityHistogram.of(p[4:], truth[4:])
    for name in ("count", "positive", "p_sum"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_next_and_last_use_against_a_search():
    _, truth = random_case(6, n=9)
    ahead, ago = ranking.next_use(truth), ranking.last_use(truth)
    for t, layer, e in itertools.product(range(9), range(3), range(5)):
        later = [s - t for s in range(t + 1, 9) if truth[s, layer, e]]
        before = [t - s for s in range(t + 1) if truth[s, layer, e]]
        assert ahead[t, layer, e] == (min(later) if later else math.inf)
        assert ago[t, layer, e] == (min(before) if before else math.inf)


@pytest.mark.parametrize("seed", range(4))
def test_pairwise_accuracy_against_all_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 4, (8,), generator=generator).float()
    when = torch.randint(1, 5, (8,), generator=generator).float()
    when[0] = math.inf
    right, pairs = 0.0, 0
    for a, b in itertools.combinations(range(8), 2):
        if when[a] == when[b]:
            continue
        pairs += 1
        sooner, later = (a, b) if when[a] < when[b] else (b, a)
        right += 1.0 if score[sooner] > score[later] else 0.5 if score[sooner] == score[later] else 0.0
    assert ranking.pairwise_accuracy(score, when) == (pytest.approx(right / pairs), pairs)


def test_ranking_knows_the_oracle_and_the_coin():
    _, truth = random_case(7, n=60, layers=2, experts=8)
    ahead = ranking.next_use(truth)
    layer = torch.arange(2.0)[:, None]
    quality = ranking.ranking_quality(
        truth,
        {"oracle": lambda t: -(ahead[t] * 2 + layer), "nothing": lambda t: torch.zeros(2, 8)},
        num_resident=10,
        every=1,
    )
    assert quality["oracle"] == 1.0
    assert quality["nothing"] == 0.5
    assert {"recency", "frequency"} <= quality.keys()
