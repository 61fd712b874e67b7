from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expertflow.predictor.next_use import HORIZONS, NextUseMixture, expected_passes
from expertflow.predictor.ranking import next_use, ranking_quality

L, E, K = 3, 16, 4


def routes(passes: int, seed: int) -> Tensor:
    """truth_TLE of a subject that changes slowly: every expert has its own rate, redrawn every 100 passes."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.zeros(passes, L, E, dtype=torch.bool)
    for t in range(passes):
        if t % 100 == 0:
            rate_LE = torch.rand(L, E, generator=draw).pow(3) + 0.01
        chosen = torch.multinomial(rate_LE, K, generator=draw)
        truth[t] = torch.zeros(L, E, dtype=torch.bool).scatter(1, chosen, True)
    return truth


def quality(truth_TLE: Tensor, head_TLE: Tensor | None) -> dict[str, float]:
    """Pairwise accuracy in the second half, after the weights have had the first."""
    mixture = NextUseMixture(L, E, K)
    said = []
    for t, used_LE in enumerate(truth_TLE):
        mixture.observe(used_LE)
        said.append(mixture.expect(None if head_TLE is None else head_TLE[t]))
    half = len(truth_TLE) // 2
    scores = {"mixed": lambda t: -said[half + t]}
    if head_TLE is not None:
        scores["head"] = lambda t: -head_TLE[half + t]
    return ranking_quality(truth_TLE[half:], scores, L * E)


def test_expectation_is_the_sum_over_horizons():
    later_CLE = torch.tensor([0.9, 0.5, 0.25, 0.1, 0.02])[:, None, None]
    expected = 1 + 0.9 * 1 + 0.5 * 2 + 0.25 * 4 + 0.1 * 8 + 0.02 * 16
    assert expected_passes(later_CLE).item() == pytest.approx(expected)
    assert expected_passes(torch.zeros(5, L, E)).unique().tolist() == [1]
    assert expected_passes(torch.ones(5, L, E)).unique().tolist() == [32]


def test_a_longer_horizon_includes_a_shorter():
    later_CLE = torch.tensor([0.2, 0.7, 0.7, 0.7, 0.7])[:, None, None]
    assert expected_passes(later_CLE).item() == pytest.approx(1 + 0.2 * 31)


def test_without_a_head_it_beats_recency_and_is_calibrated():
    truth = routes(600, 0)
    found = quality(truth, None)
    assert found["mixed"] > found["recency"] + 0.05
    assert found["mixed"] > found["frequency"]
    mixture = NextUseMixture(L, E, K)
    guessed, came = 0.0, 0.0
    for t in range(580):
        mixture.observe(truth[t])
        passes = mixture.expect()
        if t > 300:
            guessed += passes.mean().item()
            came += next_use(truth[t : t + 33])[0].clamp(max=32).mean().item()
    # 24 of 32 is what lies beyond the last horizon on average, so the two agree only roughly.
    assert guessed == pytest.approx(came, rel=0.25)


def test_a_head_that_knows_is_followed():
    truth = routes(600, 1)
    knows = next_use(truth).clamp(max=32)
    found = quality(truth, knows)
    assert found["mixed"] > 0.95
    assert found["mixed"] > quality(truth, None)["mixed"] + 0.1


@pytest.mark.parametrize("kind", ["noise", "the opposite"])
def test_a_head_that_is_wrong_loses_its_say(kind):
    truth = routes(600, 2)
    wrong = torch.rand(truth.shape, generator=torch.Generator().manual_seed(3)) * 31 + 1
    if kind == "the opposite":
        wrong = 33 - next_use(truth).clamp(max=32)
    found, alone = quality(truth, wrong), quality(truth, None)
    assert found["head"] < 0.55
    assert found["mixed"] > alone["mixed"] - 0.02


def test_texts_are_kept_apart():
    """A guess whose outcome lies beyond the end of its text teaches nothing."""
    mixture = NextUseMixture(L, E, K)
    before = mixture.weight_CF.clone()
    for used_LE in routes(50, 4):
        mixture.observe(used_LE)
        mixture.expect()
        mixture.end_of_text()
    assert torch.equal(mixture.weight_CF, before)


def test_each_horizon_learns_from_its_own_outcome():
    """Experts that are used every second pass: within 1 pass half of the time, within 2 always."""
    mixture = NextUseMixture(1, 2, 1)
    for t in range(400):
        mixture.observe(torch.tensor([[t % 2 == 0, t % 2 == 1]]))
        passes = mixture.expect()
    assert mixture.weight_CF[0].ne(mixture.weight_CF[1]).any()
    assert passes.max() < 2.2
    assert len(HORIZONS) == len(mixture.weight_CF)
