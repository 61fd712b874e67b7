"""The gate keeps to what is faster, on a clock that the test makes up."""

from __future__ import annotations

import random

import pytest

from expertflow.cache.gate import HOLD, LEARNING, WINDOW, WINDOWS, PayoffGate

TRIAL = WINDOW * len(WINDOWS)


def drive(
    gate: PayoffGate, passes: int, with_it: float, without: float, rows: int = 1, noise: float = 0.1
) -> list[bool]:
    """Whether each pass prefetched; a pass takes the seconds of what it did, give or take `noise`."""
    draw = random.Random(passes)
    did = []
    for _ in range(passes):
        did.append(gate.open)
        gate.passed((with_it if gate.open else without) * draw.uniform(1 - noise, 1 + noise), rows)
    return did


def test_it_learns_first_then_tries_both_ways_in_turn():
    did = drive(PayoffGate(), LEARNING + TRIAL, 1.0, 2.0)
    assert did == [True] * (LEARNING + WINDOW) + [False] * WINDOW + [True] * WINDOW + [False] * WINDOW


@pytest.mark.parametrize(("with_it", "stays"), [(0.010, True), (0.020, False)])
def test_it_keeps_to_what_was_faster_and_says_why(with_it, stays):
    gate = PayoffGate()
    drive(gate, LEARNING + TRIAL, with_it, 0.015)
    assert gate.on == stays
    assert gate.switches == (not stays)
    assert set(drive(gate, HOLD, with_it, 0.015)) == {stays}
    assert gate.reason.startswith("on: " if stays else "off: ")
    assert "ms per pass with prefetching" in gate.reason
    assert "(1 row, after 72 passes)" in gate.reason


def test_it_says_what_is_tried():
    gate = PayoffGate("the scheduler", ("step", "steps"))
    drive(gate, LEARNING, 1.0, 2.0, rows=8)
    assert gate.trying
    drive(gate, TRIAL, 1.0, 2.0, rows=8, noise=0)
    assert not gate.trying
    expected = "on: 1000 ms per step with the scheduler, 2000 ms without (8 rows, after 72 steps)"
    assert gate.reason == expected


def test_a_tie_changes_nothing_in_either_state():
    gate = PayoffGate()
    for with_it, without, on in [(1.0, 1.0, True), (3.0, 1.0, False), (1.0, 1.0, False), (1.0, 3.0, True)]:
        while gate._window is None:
            gate.passed(1.0, 1)
        drive(gate, TRIAL, with_it, without, noise=0)
        assert gate.on == on


def test_it_finds_out_when_prefetching_begins_to_pay():
    gate = PayoffGate()
    drive(gate, LEARNING + TRIAL, 2.0, 1.0)
    assert not gate.on
    drive(gate, HOLD + TRIAL, 1.0, 2.0)
    assert gate.on
    assert gate.switches == 2


def test_the_same_answer_again_makes_trials_rarer():
    gate = PayoffGate()
    did = drive(gate, 20_000, 1.0, 2.0)
    assert did.count(False) < 0.01 * len(did)
    assert did.count(False) >= 4 * TRIAL / 2, "it tries now and then"


def test_passes_of_another_size_are_not_compared():
    """With them in the first window, eight rows once looked eight times as slow as one: a switch for nothing."""
    gate = PayoffGate()
    drive(gate, LEARNING + WINDOW, 1.0, 1.5)
    drive(gate, TRIAL, 8.0, 12.0, rows=8)
    assert gate._window is not None, "the trial began anew"
    drive(gate, WINDOW, 8.0, 12.0, rows=8)
    assert gate.on
    assert "8 rows" in gate.reason


def test_where_rows_come_and_go_it_does_what_was_decided():
    """Trials never end there. Each began with prefetching, so that 95 of 100 passes did what had lost."""
    gate = PayoffGate()
    drive(gate, LEARNING + TRIAL, 2.0, 1.0)
    assert not gate.on
    drive(gate, HOLD, 2.0, 1.0)
    did = [prefetched for number in range(500) for prefetched in drive(gate, 1, 2.0, 1.0, rows=number % 3)]
    assert not any(did)


def test_one_slow_pass_decides_nothing():
    gate = PayoffGate()
    drive(gate, LEARNING, 1.0, 1.2)
    for number in range(TRIAL):
        gate.passed(100.0 if number == 5 else (1.0 if gate.open else 1.2), 1)
    assert gate.on


def test_a_disturbance_of_one_window_decides_nothing():
    """Another program ran during the second window with prefetching: on the mean of all it would have been slower."""
    gate = PayoffGate()
    drive(gate, LEARNING + 2 * WINDOW, 1.0, 1.2)
    drive(gate, WINDOW, 5.0, 5.0)
    drive(gate, WINDOW, 1.0, 1.2)
    assert gate._window is None
    assert gate.on


def test_where_rows_change_a_little_a_trial_comes_to_its_end():
    """With continuous batching sequences come and go at every other step: it measured for ever."""
    gate = PayoffGate()
    rows = random.Random(0).choices((13, 14, 15, 16), k=1000)
    for number in rows:
        drive(gate, 1, 0.2 * number, 0.1 * number, rows=number)
    assert not gate.on
    assert "rows" in gate.reason


def test_a_few_passes_of_another_size_do_not_end_a_trial():
    gate = PayoffGate()
    for number in range(1000):
        drive(gate, 1, 2.0, 1.0, rows=1 if number % 5 == 0 else 16)
    assert not gate.on
