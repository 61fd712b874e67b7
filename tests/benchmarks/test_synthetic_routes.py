"""Synthetic routes have the statistics they were asked for, and a degraded oracle the recall."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.paper.degraded import degraded, recall
from benchmarks.paper.synthetic import FAR, Knobs, Statistics, as_trace, calibrate, draw, measure
from expertflow.sim.workload import Foretold, foretell, make_workload

EXPERTS, TOP_K = 16, 2


def oracle(seed: int = 0) -> Foretold:
    trace = as_trace(draw(Knobs(), EXPERTS, TOP_K, layers=3, sequences=12, tokens=20, seed=seed), EXPERTS)
    return foretell(trace.meta, trace.sequences, "oracle")


def test_statistics_of_routes_counted_by_hand() -> None:
    """One layer, K = 1: 0 0 1 1 0 0 1 1 0 0. Five pairs of equal neighbours of nine; 8 apart both pairs agree."""
    routes = np.array([0, 0, 1, 1, 0, 0, 1, 1, 0, 0]).reshape(-1, 1, 1)
    got = measure([routes], experts=4)
    entropy = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4))
    assert got.evenness == pytest.approx(np.exp(entropy) / 4)
    assert (got.near, got.far) == (pytest.approx(5 / 9), 1.0)
    with pytest.raises(ValueError, match=f"more than {FAR} tokens"):
        measure([routes[:FAR]], 4)


def test_a_token_has_k_different_experts() -> None:
    routes_NTLK = draw(Knobs(stay=0.5), EXPERTS, 5, layers=2, sequences=4, tokens=6)
    assert routes_NTLK.shape == (4, 6, 2, 5)
    ordered = np.sort(routes_NTLK, axis=-1)
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    assert ordered.min() >= 0
    assert ordered.max() < EXPERTS
    with pytest.raises(ValueError, match="top_k=17 of 16 experts"):
        draw(Knobs(), EXPERTS, 17, 1, 1, 1)


def test_each_knob_moves_its_statistic() -> None:
    def of(knobs: Knobs) -> Statistics:
        return measure(list(draw(knobs, EXPERTS, TOP_K, 2, 64, 24)), EXPERTS)

    plain = of(Knobs(skew=0, taste=0, stay=0))
    assert plain.evenness > 0.98
    assert plain.near == pytest.approx(TOP_K / EXPERTS, abs=0.03)  # chance
    assert of(Knobs(skew=2, taste=0, stay=0)).evenness < plain.evenness - 0.3
    assert of(Knobs(skew=0, taste=2, stay=0)).far > plain.far + 0.2
    sticky = of(Knobs(skew=0, taste=0, stay=0.8))
    assert sticky.near > plain.near + 0.3
    assert sticky.far < sticky.near - 0.3  # forgotten by then


@pytest.mark.parametrize("wanted", [Statistics(0.8, 0.35, 0.25), Statistics(0.95, 0.2, 0.15)])
def test_calibrated_routes_have_the_statistics_of_the_recording(wanted: Statistics) -> None:
    knobs = calibrate(wanted, EXPERTS, TOP_K)
    got = measure(list(draw(knobs, EXPERTS, TOP_K, 3, 96, 24, seed=7)), EXPERTS)  # other draws
    assert got.evenness == pytest.approx(wanted.evenness, abs=0.05)
    assert (got.near, got.far) == (pytest.approx(wanted.near, abs=0.03), pytest.approx(wanted.far, abs=0.03))


def test_drawn_routes_are_what_the_simulator_decodes() -> None:
    routes_NTLK = draw(Knobs(), EXPERTS, TOP_K, layers=3, sequences=2, tokens=5)
    trace = as_trace(routes_NTLK, EXPERTS)
    workload = make_workload(foretell(trace.meta, trace.sequences, "oracle"), batch=2)
    assert len(workload.passes) == 5
    for t, step in enumerate(workload.passes):
        for layer, experts in enumerate(step.experts_L):
            assert set(experts) == set(routes_NTLK[:, t, layer].ravel().tolist())


@pytest.mark.parametrize("swap", [0.0, 0.25, 0.6])
def test_a_degraded_oracle_errs_as_often_as_it_says(swap: float) -> None:
    told = degraded(oracle(), swap)
    assert told.p_TLE is not None
    named = [p_TLE.float() == p_TLE.float().amax() for p_TLE in told.p_TLE]
    assert all((mask.sum(-1) == TOP_K).all() for mask in named)
    assert recall(told) == pytest.approx(1 - swap, abs=0.05)
    assert torch.cat(told.p_TLE).float().sum(-1).mean() == pytest.approx(TOP_K, rel=0.01)  # calibrated


def test_without_swaps_it_is_the_oracle_and_with_all_it_is_never_right() -> None:
    told = oracle()
    exact = make_workload(degraded(told, 0.0), batch=4)
    true = make_workload(told, batch=4)
    for got, wanted in zip(exact.passes, true.passes, strict=True):
        assert got.forecast is not None
        assert wanted.forecast is not None
        assert [[p > 0.5 for p in p_E] for p_E in got.forecast.p_LE] == [
            [p > 0.5 for p in p_E] for p_E in wanted.forecast.p_LE
        ]
    worst = degraded(told, 1.0)
    assert worst.p_TLE is not None
    for number, p_TLE in enumerate(worst.p_TLE):
        sequence = worst.sequences[number]
        true_TLK = torch.from_numpy(sequence.target_routes_TLK[sequence.num_prefill :])
        assert (p_TLE.gather(-1, true_TLK) > 0).all()  # those it named have probability 0
    with pytest.raises(ValueError, match=r"swap=1\.5 must lie between 0 and 1"):
        degraded(told, 1.5)


def test_another_seed_swaps_others() -> None:
    told = oracle()
    first, second, other = degraded(told, 0.5), degraded(told, 0.5), degraded(told, 0.5, seed=1)
    assert first.p_TLE is not None
    assert second.p_TLE is not None
    assert other.p_TLE is not None
    assert all(torch.equal(a, b) for a, b in zip(first.p_TLE, second.p_TLE, strict=True))
    assert not torch.equal(first.p_TLE[0], other.p_TLE[0])
    assert first.sequences == replace(told).sequences
