from __future__ import annotations

import math
from itertools import chain

import numpy as np
import pytest
import torch

from expertflow.predictor.next_use import HORIZONS
from expertflow.predictor.pass_forecast import _DISCOUNT, PassForecast, worth_as_passes


def absent(passes: int) -> torch.Tensor:
    """Certain to be used exactly so many passes from now: absent_C11."""
    return torch.tensor([[[float(passes > horizon)]] for horizon in HORIZONS])


@pytest.mark.parametrize("passes", [1, 2])
def test_a_certain_use_counts_as_itself(passes):
    assert worth_as_passes(absent(passes)).item() == pytest.approx(passes)


def test_later_counts_as_later_and_uncertain_lies_between():
    ordered = [worth_as_passes(absent(passes)).item() for passes in (1, 2, 4, 8, 16, 40)]
    assert ordered == sorted(ordered)
    half = worth_as_passes((absent(1) + absent(2)) / 2).item()
    assert half == pytest.approx(math.log((_DISCOUNT + _DISCOUNT**2) / 2) / math.log(_DISCOUNT))


def test_without_anything_said_it_goes_by_how_often_experts_were_used():
    forecast = PassForecast(1, 4, 1, has_prediction=False, has_head=True)
    for _ in range(20):
        forecast.forecast(None)
        forecast.observe(torch.tensor([[True, False, False, False]]))
    p_LE, later_LE = forecast.forecast(None)
    assert p_LE[0, 0] > 0.8 > 0.2 > p_LE[0, 1]
    assert later_LE is not None
    assert later_LE[0, 0] < 2 < 4 < later_LE[0, 1]


def test_without_a_head_nothing_is_said_or_learnt_of_later_passes() -> None:
    forecast = PassForecast(1, 4, 1, has_prediction=True, has_head=False)
    for _ in range(20):
        p_LE, later_LE = forecast.forecast(torch.rand(1, 4))
        assert p_LE.shape == (1, 4)
        assert later_LE is None
        forecast.observe(torch.tensor([[True, False, False, False]]))
    assert len(forecast.weight_CF) == 1


@pytest.mark.parametrize("has_head", [False, True])
def test_a_peek_says_the_same_and_leaves_no_trace(has_head):
    draw = torch.Generator().manual_seed(0)
    peeking, other = (PassForecast(2, 6, 2, has_prediction=True, has_head=has_head) for _ in range(2))
    for _ in range(30):
        p_LE, used_LE = torch.rand(2, 6, generator=draw), torch.rand(2, 6, generator=draw) < 0.4
        peeking.peek(torch.rand(2, 6, generator=draw))
        peeked_LE = peeking.peek(p_LE)
        said, told = (one.forecast(p_LE) for one in (peeking, other))
        torch.testing.assert_close(peeked_LE, said[0])
        assert torch.equal(said[0], told[0])
        torch.testing.assert_close(said[1], told[1])
        for one in (peeking, other):
            one.observe(used_LE)


def test_guesses_are_not_judged_by_other_texts():
    """A pass that follows another text says nothing of what was expected to come after the last."""
    forecast = PassForecast(1, 4, 1, has_prediction=False, has_head=True)
    forecast.forecast(None)
    forecast.observe(torch.tensor([[True, False, False, False]]))
    forecast.end_of_text()
    before = forecast.weight_CF.copy()
    forecast.forecast(None)
    forecast.observe(torch.tensor([[False, True, True, True]]))
    assert np.array_equal(forecast.weight_CF, before), "a lot is not full yet"
    for _ in range(2):
        forecast.end_of_text()
        forecast.forecast(None)
        forecast.observe(torch.tensor([[False, True, True, True]]))
    assert not np.array_equal(forecast.weight_CF[0], before[0]), "these passes were guessed and came"
    assert np.array_equal(forecast.weight_CF[1:], before[1:])


def test_guesses_are_judged_by_the_passes_that_they_spoke_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this pass, and of any use within each horizon after it: against lists of all that was said and came."""
    forecast = PassForecast(1, 6, 2, has_prediction=True, has_head=True)
    learnt: list = []
    monkeypatch.setattr(forecast, "_learn", learnt.extend)
    draw = torch.Generator().manual_seed(0)
    said, used, expected = [], [], []
    for number in range(24):
        forecast.forecast(torch.rand(1, 6, generator=draw))
        said.append(forecast._waiting[-1])
        used.append((torch.rand(1, 6, generator=draw) < 0.3).numpy())
        forecast.observe(torch.from_numpy(used[-1]))
        decided = {0: (said[number][0], used[number])}
        for c, horizon in enumerate(HORIZONS, 1):
            if horizon <= number:
                after = np.stack(used[number + 1 - horizon : number + 1])
                decided[c] = (said[number - horizon][c], after.any(0))
        expected.append(decided)
    assert max(map(len, expected)) == 1 + len(HORIZONS)
    lots = [sorted(expected[begin : begin + 4], key=list) for begin in range(0, 24, 4)]
    for lesson, decided in zip(learnt, chain(*lots), strict=True):
        assert lesson.which == tuple(decided)
        assert np.array_equal(lesson.x_CLEF, np.stack([x_LEF for x_LEF, _ in decided.values()]))
        assert np.array_equal(lesson.came_CLE, np.stack([came_LE for _, came_LE in decided.values()]))


@pytest.mark.parametrize("experts", [32, 128, 512])
def test_however_many_experts_there_are_those_used_often_are_expected_sooner(experts):
    """With 512 of them the weights once ran away after a few passes: those used most were expected last."""
    draw = torch.Generator().manual_seed(experts)
    layers, wanted = 4, experts / 16
    popularity_E = (1 + torch.arange(experts)).float() ** -0.7
    p_E = (wanted * popularity_E / popularity_E.sum()).clamp(max=0.9)
    forecast = PassForecast(layers, experts, 4, has_prediction=True, has_head=True)
    found = []
    for _ in range(48):
        used_LE = torch.rand((layers, experts), generator=draw) < p_E
        _, later_LE = forecast.forecast(used_LE.float())
        assert later_LE is not None
        found.append(ranked_right(-later_LE, p_E))
        forecast.observe(used_LE)
    assert min(found[8:]) > 0.55
    assert sum(found[-8:]) / 8 > 0.65


def ranked_right(said_LE: torch.Tensor, p_E: torch.Tensor) -> float:
    """Of pairs of experts, one among the more popular half and one not, the share that is put in this order."""
    half = p_E >= p_E.median()
    more, less = said_LE[:, half].mean(0), said_LE[:, ~half].mean(0)
    return (more[:, None] > less).float().mean().item()
