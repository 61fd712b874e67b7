"""The benchmark that asks whether prediction can lose: what it compares, and how it judges."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import never_worse
from expertflow.sim.compare import Conditions, compare
from expertflow.sim.hardware import hardware
from expertflow.sim.recordings import foretell_all, size_of
from expertflow.trace import read_trace

TRACE = Path(__file__).parents[2] / "zoo" / "traces" / "switch-32" / "translation"


def options(**given: object) -> argparse.Namespace:
    asked = {
        "predictors": ["noise"], "cache_size": [8, 32], "batch": [4, 10_000], "ratio": [1.0], "split": "test",
        "steps": 20,
    }  # fmt: skip
    return argparse.Namespace(**{**asked, **given})


def test_cells_are_what_the_simulator_says_of_the_same_conditions() -> None:
    """A batch beyond the recording and a cache of all experts are left out."""
    (cell,) = never_worse.cells(options(), TRACE)
    trace = read_trace(TRACE, weights=False)
    size, _ = size_of(trace.meta, None, None)
    conditions = Conditions(
        ("lru", "lfu", "plec"),
        (8,),
        (4,),
        (hardware("a40"),),
        size.expert_bytes,
        size.dense_bytes,
        (1.0,),
        20,
    )
    rows = compare(foretell_all(trace, TRACE, "test", ["noise"], warm=64), conditions)
    seconds = {(row["policy"], row["predictor"]): row["step_seconds"] for row in rows}
    better = min(("lru", "lfu"), key=lambda name: seconds[name, "-"])
    assert cell["better"] == better
    assert cell["to_better"] == pytest.approx(seconds["plec", "noise"] / seconds[better, "-"])


def test_the_worst_cell_decides_and_noise_may_lose_more() -> None:
    of = {"model": "m", "task": "t", "cache_size": 4, "ratio": 1.0, "better": "lru"}
    rows = [
        of | {"batch": batch, "predictor": predictor, "to_better": got}
        for batch, predictor, got in (
            (1, "online", 0.9),
            (4, "online", 1.03),
            (1, "noise", 1.03),
            (4, "noise", 1.0),
        )
    ]
    judged = never_worse.judge(rows)
    assert judged["m, t, online"] == {
        "asked": 1.02, "got": 1.03, "met": False, "at": {"batch": 4, "cache_size": 4, "ratio": 1.0, "better": "lru"},
    }  # fmt: skip
    assert judged["m, t, noise"]["met"]
