"""A timeline is what was added to it, whoever reads it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from expertflow.timeline import Timeline

ticks = iter(range(100))


def example() -> Timeline:
    timeline = Timeline()
    timeline.add("link", "L1.E3", 10.0, 10.5, urgent=True)
    timeline.add("compute", "unit A", 10.25, 11.0)
    timeline.add("own", "x", 10.0, 10.25)
    timeline.add("link", "L1.E4", 10.25, 10.75)
    return timeline


def test_a_span_is_kept_even_if_its_block_fails() -> None:
    timeline = Timeline(clock=lambda: float(next(ticks)))
    with pytest.raises(KeyError), timeline.span("predict", "B", rows=3):
        raise KeyError
    (span,) = timeline.spans
    assert (span.track, span.name, span.end - span.begin, span.detail) == ("predict", "B", 1.0, {"rows": 3})


def test_the_last_spans_are_kept() -> None:
    timeline = Timeline(most=3)
    for number in range(5):
        timeline.add("link", str(number), number, number + 1)
    assert [span.name for span in timeline.spans] == ["2", "3", "4"]


def test_threads_may_add_while_others_read() -> None:
    timeline = Timeline()

    def add() -> None:
        for number in range(2000):
            timeline.add("link", str(number), number, number + 1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        try:
            assert timeline.spans is not None
        except RuntimeError as error:  # pragma: no cover
            pytest.fail(str(error))
    for thread in threads:
        thread.join()
    assert len(timeline.spans) == 8000


def test_time_that_spans_share_is_busy_once() -> None:
    timeline = example()
    timeline.add("link", "inside", 10.1, 10.2)
    timeline.add("link", "later", 20.0, 21.0)
    assert timeline.busy_seconds() == {"link": 1.75, "compute": 0.75, "own": 0.25}


def test_the_trace_is_in_the_trace_event_format(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    example().save(path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {0: "compute", 1: "link", 2: "own"}
    complete = [event for event in events if event["ph"] == "X"]
    assert [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in complete] == [
        ("link", "L1.E3", 0.0, 5e5),
        ("compute", "unit A", 2.5e5, 7.5e5),
        ("own", "x", 0.0, 2.5e5),
        ("link", "L1.E4", 2.5e5, 5e5),
    ]
    assert complete[0]["args"] == {"urgent": True}
    assert list(tmp_path.iterdir()) == [path]


def test_the_figure_shows_the_last_steps_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timeline = example()
    for number in range(4):
        timeline.add("compute", f"step-{number}", 20.0 + number, 21.0 + number)
    path = tmp_path / "run.svg"
    timeline.save(path)
    drawn = path.read_text()
    assert "step-3" in drawn
    assert "step-1" in drawn
    assert "step-0" not in drawn
    with pytest.raises(ValueError, match=r"name it FILE\.png"):
        timeline.save(tmp_path / "run.nonsense")


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing ran"):
        Timeline().save(tmp_path / "run.json")
