"""The pipeline: results on time or not at all, errors with their cause, and never a hang. Events, no sleeps."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator

import pytest

from expertflow.scheduler.pipeline import Pipeline

LONG = 60.0  # what no test waits for unless it fails


class Held:
    """A job that begins, says so, and ends when it is told."""

    def __init__(self, result: str = "result", error: BaseException | None = None):
        self.begun, self.released, self.thread = threading.Event(), threading.Event(), ""
        self.result, self.error = result, error

    def __call__(self) -> str:
        self.thread = threading.current_thread().name
        self.begun.set()
        assert self.released.wait(LONG)
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture
def pipeline() -> Iterator[Pipeline[str]]:
    with Pipeline[str]() as pipeline:
        yield pipeline


def test_a_job_runs_while_others_work_and_its_result_is_taken_once(pipeline: Pipeline[str]) -> None:
    job = Held()
    pipeline.submit(0, job)
    assert job.begun.wait(LONG), "it runs although nobody asks for it"
    assert job.thread == "pipeline"
    job.released.set()
    assert pipeline.take(0, LONG) == "result"
    assert pipeline.take(0, LONG) is None
    assert (pipeline.stats.on_time, pipeline.stats.late) == (1, 0)


def test_nobody_waits_for_what_is_worth_nothing(pipeline: Pipeline[str]) -> None:
    slow, queued, next_one = Held(), Held("never"), Held("next")
    pipeline.submit(0, slow)
    pipeline.submit(1, queued)
    assert slow.begun.wait(LONG)
    assert pipeline.take(0, 0.0) is None
    assert pipeline.take(1, -1.0) is None
    assert pipeline.stats.late == 2
    pipeline.submit(0, next_one)
    next_one.released.set()
    slow.released.set()
    assert pipeline.take(0, LONG) == "next", "not the result that was late"
    assert not queued.begun.is_set(), "a job that nobody will ask for is not begun"


def test_a_result_is_waited_for_as_long_as_it_is_worth(pipeline: Pipeline[str]) -> None:
    job = Held()
    pipeline.submit(0, job)
    assert pipeline.take(0, 0.01) is None
    assert 0.01 <= pipeline.stats.wait_seconds < LONG / 2
    other = Held()
    pipeline.submit(1, other)
    job.released.set()
    assert other.begun.wait(LONG)
    threading.Thread(target=other.released.set).start()
    assert pipeline.take(1, math.inf) == "result"


def test_a_lane_that_runs_alone_runs_its_job_when_it_is_taken(pipeline: Pipeline[str]) -> None:
    job = Held()
    job.released.set()
    pipeline.submit(0, job, alone=True)
    assert not job.begun.is_set()
    assert pipeline.take(0, 0.0) == "result", "no waiting: it is computed, whatever it is worth"
    assert job.thread == threading.current_thread().name
    assert threading.active_count() == len([t for t in threading.enumerate() if t.name != "pipeline"])


def test_two_jobs_never_run_at_once(pipeline: Pipeline[str]) -> None:
    """Jobs share a predictor: one that was late is still at it when the last unit goes on alone."""
    slow, alone = Held(), Held("alone")
    alone.released.set()
    pipeline.submit(0, slow)
    assert slow.begun.wait(LONG)
    assert pipeline.take(0, 0.0) is None
    pipeline.submit(0, alone, alone=True)
    assert pipeline.take(0, 0.0) is None
    assert not alone.begun.is_set()
    assert pipeline.stats.late == 2
    slow.released.set()
    pipeline.submit(0, alone, alone=True)
    assert pipeline.take(0, LONG) == "alone"


@pytest.mark.parametrize("alone", [True, False])
def test_an_error_surfaces_with_its_cause(pipeline: Pipeline[str], alone: bool) -> None:
    job = Held(error=ArithmeticError("no number"))
    job.released.set()
    pipeline.submit(0, job, alone=alone)
    with pytest.raises(RuntimeError, match=r"ArithmeticError: no number.*schedule='fixed'") as raised:
        pipeline.take(0, LONG)
    assert isinstance(raised.value.__cause__, ArithmeticError)
    good = Held()
    good.released.set()
    pipeline.submit(0, good, alone=alone)
    assert pipeline.take(0, LONG) == "result", "the next one is not affected"


def test_an_error_of_a_late_job_surfaces_too(pipeline: Pipeline[str]) -> None:
    job, other = Held(error=ArithmeticError("no number")), Held()
    pipeline.submit(0, job)
    assert job.begun.wait(LONG)
    assert pipeline.take(0, 0.0) is None
    other.released.set()
    pipeline.submit(1, other)
    job.released.set()
    assert pipeline.take(1, LONG) == "result"
    with pytest.raises(RuntimeError, match="no number"):
        pipeline.submit(0, other)
    pipeline.submit(0, other)


def test_an_error_of_a_job_that_is_never_taken_surfaces_too(pipeline: Pipeline[str]) -> None:
    job, other = Held(error=ArithmeticError("no number")), Held()
    job.released.set()
    other.released.set()
    pipeline.submit(0, job)
    pipeline.submit(1, other)
    assert pipeline.take(1, LONG) == "result", "by now the first one has failed"
    pipeline.submit(0, other)
    with pytest.raises(RuntimeError, match="no number"):
        pipeline.submit(0, other)


def test_what_is_for_later_runs_in_order_and_never_piles_up(pipeline: Pipeline[str]) -> None:
    slow, result, ran = Held(), Held(), []
    pipeline.later(slow)
    assert slow.begun.wait(LONG)
    for number in range(40):
        pipeline.later(lambda number=number: ran.append(number))  # type: ignore[misc]
    result.released.set()
    pipeline.submit(0, result)
    slow.released.set()
    assert pipeline.take(0, LONG) == "result"
    assert ran == list(range(16))
    assert pipeline.stats.left_out == 24


def test_closing_ends_the_thread_and_begins_nothing(pipeline: Pipeline[str]) -> None:
    running, queued = Held(), Held()
    pipeline.submit(0, running)
    pipeline.submit(1, queued)
    assert running.begun.wait(LONG)
    closing = threading.Thread(target=pipeline.close)
    closing.start()
    running.released.set()
    closing.join(LONG)
    assert not closing.is_alive()
    assert not queued.begun.is_set()
    pipeline.close()
    with pytest.raises(RuntimeError, match="closed"):
        pipeline.submit(0, queued)


def test_a_pipeline_that_nobody_closed_ends_with_its_last_user() -> None:
    pipeline = Pipeline[str]()
    job = Held()
    job.released.set()
    pipeline.submit(0, job)
    assert pipeline.take(0, LONG) == "result"
    thread = pipeline._thread
    assert thread is not None
    del pipeline
    gc.collect()
    thread.join(LONG)
    assert not thread.is_alive()
