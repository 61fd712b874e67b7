"""Who had the processors, from two readings of the kernel's counters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from expertflow.disturbance import Disturbance, Watch, _Seconds, _seconds, between


def test_shares_by_hand():
    # Two processors for 10 s: 8 s busy, of which 6 our own; 1 s stolen.
    found = between(_Seconds(100, 5, 400, 3), _Seconds(108, 6, 420, 9))
    assert found == Disturbance(stolen=0.05, others=0.1)
    assert found.disturbed
    assert str(found) == "5% of the processors' time stolen, 10% taken by other processes"


@pytest.mark.parametrize(
    ("stolen", "others", "disturbed"),
    [(0.02, 0.1, False), (0.021, 0.0, True), (0.0, 0.11, True), (None, None, False)],
)
def test_limits(stolen, others, disturbed):
    found = Disturbance(stolen, others)
    assert found.disturbed is disturbed
    assert found.known is (stolen is not None)


def test_counters_are_those_of_the_kernel(tmp_path: Path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 400 50 6 7 80 999 999\ncpu0 1 2 3\n")
    hertz = os.sysconf("SC_CLK_TCK")
    found = _seconds(stat)
    assert found is not None
    assert found.busy * hertz == pytest.approx(100 + 20 + 30 + 6 + 7)
    assert (found.stolen * hertz, found.total * hertz) == (pytest.approx(80), pytest.approx(693))
    assert found.own > 0


@pytest.mark.parametrize("text", ["", "cpu  1 2 3\n", "cpu  a b c d e f g h i\n"])
def test_a_system_that_does_not_say(tmp_path: Path, text: str):
    stat = tmp_path / "stat"
    assert _seconds(stat) is None
    stat.write_text(text)
    assert _seconds(stat) is None
    unknown = between(None, None)
    assert not unknown.known
    assert "unknown" in str(unknown)


def test_a_watch_sees_shares():
    found = Watch().so_far()
    assert found.stolen is None or 0 <= found.stolen <= 1
