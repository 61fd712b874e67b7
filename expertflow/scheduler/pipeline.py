"""The dual-batch pipeline: while one unit computes a step, what concerns the next one is prepared (paper, 3.3.4).

A job of each lane (unit) at a time, in a thread of its own, in the order in which they were handed in. Whoever wants
a result waits for it no longer than it is worth; then it is late, and the unit goes on without. A lane that runs alone
has nobody to hide behind: its job runs when its result is wanted. What a job does is not known here.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

_MOST_WAITING = 16  # a thread that cannot keep up must not hoard what it has to do


@dataclass(eq=False)
class _Ticket(Generic[Result]):
    job: Callable[[], Result]
    alone: bool
    done: bool = False
    abandoned: bool = False  # nobody will ask for the result
    result: Result | None = None
    error: BaseException | None = None


@dataclass
class PipelineStats:
    """Since the start or the last reset."""

    on_time: int = 0  # results that were there when they were wanted, or soon enough
    late: int = 0  # results that nobody waited for any longer
    wait_seconds: float = 0.0  # for results
    left_out: int = 0  # jobs of `later`, since too many were waiting

    def reset(self) -> None:
        self.on_time = self.late = self.left_out = 0
        self.wait_seconds = 0.0


@dataclass
class _Queue(Generic[Result]):
    """What both threads see, under one lock."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[_Ticket[Result]] = field(default_factory=deque)
    closed: bool = False
    error: BaseException | None = None  # of a job whose result nobody will ask for


class Pipeline(Generic[Result]):
    """`submit` a job of a lane after its step, `take` its result before the next one. One thread calls both.

    The thread is started with the first job that can be hidden. `close` it, or use it in a `with` block.
    """

    def __init__(self) -> None:
        self.stats = PipelineStats()
        self._queue: _Queue[Result] = _Queue()
        self._tickets: dict[int, _Ticket[Result]] = {}
        self._working = threading.Lock()  # one job at a time, whichever thread runs it
        self._thread: threading.Thread | None = None
        # The thread knows of the queue alone, so a pipeline that nobody closed ends with its last user.
        weakref.finalize(self, _end, self._queue)

    def submit(self, lane: int, job: Callable[[], Result], *, alone: bool = False) -> None:
        """Prepare for this lane; a result that was not taken is forgotten.

        alone: no other lane computes meanwhile, so the job runs when it is taken. RuntimeError when the pipeline is
        closed, or a job has failed whose result was late.
        """
        ticket = _Ticket(job, alone)
        queue = self._queue
        with queue.changed:
            if queue.closed:
                raise RuntimeError("the pipeline is closed; make a new one to prepare steps")
            self._raise_late_error()
            self._abandon(self._tickets.pop(lane, None))
            self._tickets[lane] = ticket
            if alone:
                return
            queue.waiting.append(ticket)
            queue.changed.notify_all()
        self._start()

    def later(self, job: Callable[[], Any]) -> None:
        """Run a job of no lane, behind those that are waiting. Left out when too many are; its error is told late."""
        queue = self._queue
        with queue.changed:
            if queue.closed or len(queue.waiting) >= _MOST_WAITING:
                self.stats.left_out += 1
                return
            queue.waiting.append(_Ticket(job, alone=False, abandoned=True))
            queue.changed.notify_all()
        self._start()

    def take(self, lane: int, worth_seconds: float, *, keep: bool = False) -> Result | None:
        """The result of this lane's job; None without one, and when it would take longer than `worth_seconds`.

        keep: then it is not given up, and can be taken later. RuntimeError, with its cause, when a job has failed.
        """
        ticket = self._tickets.pop(lane, None)
        if ticket is None:
            return None
        patience = max(0.0, min(worth_seconds, threading.TIMEOUT_MAX))  # longer than that no lock can wait
        queue = self._queue
        began = time.perf_counter()
        if ticket.alone:
            # An abandoned job may still be under way in the thread.
            ready = self._working.acquire(timeout=patience)
        else:
            with queue.changed:
                ready = queue.changed.wait_for(lambda: ticket.done, patience)
        self.stats.wait_seconds += time.perf_counter() - began
        if ready and ticket.alone:
            try:
                _run(ticket)
            finally:
                self._working.release()
        with queue.changed:
            if not ready:
                self.stats.late += 1
                if keep:
                    self._tickets[lane] = ticket
                else:
                    self._abandon(ticket)
                self._raise_late_error()
                return None
        if ticket.error is not None:
            raise _failure(ticket.error) from ticket.error
        self.stats.on_time += 1
        return ticket.result

    def close(self) -> None:
        """Forget all jobs; on return none is under way. Idempotent."""
        _end(self._queue)
        self._tickets.clear()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Pipeline[Result]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._queue, self._working), name="pipeline", daemon=True
            )
            self._thread.start()

    def _abandon(self, ticket: _Ticket[Result] | None) -> None:
        """Not to be begun any more. One that has been begun is let run to its end, and its failure is told later."""
        if ticket is None:
            return
        ticket.abandoned = True
        if ticket in self._queue.waiting:
            self._queue.waiting.remove(ticket)
        elif ticket.error is not None:
            self._queue.error = ticket.error

    def _raise_late_error(self) -> None:
        error, self._queue.error = self._queue.error, None
        if error is not None:
            raise _failure(error) from error


def _failure(error: BaseException) -> RuntimeError:
    return RuntimeError(
        f"preparing a step failed ({type(error).__name__}: {error}); report this, and use schedule='fixed' meanwhile"
    )


def _end(queue: _Queue[Result]) -> None:
    with queue.changed:
        queue.closed = True
        queue.waiting.clear()
        queue.changed.notify_all()


def _run(ticket: _Ticket[Result]) -> None:
    try:
        ticket.result = ticket.job()
    except BaseException as error:
        if not isinstance(error, Exception) and ticket.alone:
            raise  # Ctrl-C, in the thread that it is meant for
        ticket.error = error


def _work(queue: _Queue[Result], working: threading.Lock) -> None:
    while True:
        with queue.changed:
            queue.changed.wait_for(lambda: queue.waiting or queue.closed)
            if queue.closed:
                return
            ticket = queue.waiting.popleft()
        with working:
            _run(ticket)
        with queue.changed:
            ticket.done = True
            if ticket.abandoned and ticket.error is not None:
                queue.error = ticket.error
            queue.changed.notify_all()
        del ticket  # a job holds on to sequences
