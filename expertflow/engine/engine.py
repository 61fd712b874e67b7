"""Engine: requests from any thread, decoded together by continuous batching.

`submit` queues a request, `step` makes one decode step of one unit: sequences that are done leave, those that wait take
their places in order of arrival, and the units take turns. One thread steps; the others submit, read and cancel.
The arithmetic is batch.py's and unit.py's. Which token is taken belongs to (request, position) alone: sampler.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from expertflow.engine.auto_schedule import SCHEDULES, AutoSchedule, Schedule
from expertflow.engine.batch import check_sequences_can_move
from expertflow.engine.engine_stats import EngineStats
from expertflow.engine.logprobs import token_logprobs
from expertflow.engine.request import RequestOutput, Row
from expertflow.engine.sampling import SamplingParams
from expertflow.engine.submitted import OnDone, OnText, OnToken, Submitted
from expertflow.engine.unit import EXECUTIONS, Execution, Outcome, Scheduler, Unit, arrival_order
from expertflow.scheduler.batch_state import positions_follow_cache

if TYPE_CHECKING:
    from expertflow.engine.llm import LLM, Prompt


logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over a loaded model.

    Holds `settings.sequences` sequences in units of two batches of `settings.batch`. execution: "joint" loads an
    expert once for all batches of a unit, "split" runs them one after the other. schedule: "fixed" seats sequences in
    order of arrival; "auto" has those run together whose predicted paths are alike, and needs a predictor.
    scheduler: instead of "fixed", who sits together, asked between steps. patience: under "auto", how many that came
    later may begin before a sequence that waits; None: four times as many as are held. clock: seconds, for
    deadlines. One engine at a time may use a model's KV budget. Close it.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        execution: Execution = "joint",
        schedule: Schedule = "fixed",
        scheduler: Scheduler = arrival_order,
        patience: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if execution not in EXECUTIONS:
            raise ValueError(f"execution={execution!r} is unknown; use {' or '.join(map(repr, EXECUTIONS))}")
        check_sequences_can_move(llm.model)
        self._llm = llm
        self._execution = execution
        if patience is not None and schedule != "auto":
            raise ValueError(
                f"patience={patience} is of schedule='auto'; schedule={schedule!r} admits in order"
            )
        patience = 4 * llm.settings.held if patience is None else patience
        self._auto = _auto_schedule(llm, execution, schedule, scheduler, patience)
        self._schedule = schedule
        self._clock = clock
        settings = llm.settings
        self._units: list[Unit] = []
        left = settings.held
        while left > 0:
            most = min(left, settings.unit)
            if self._auto is not None:
                scheduler = partial(self._auto.seats, len(self._units))
            self._units.append(
                Unit(llm.model, settings.batch, most, settings.prefill_chunk, llm.pad_token, scheduler)
            )
            left -= most
        self._turn = 0
        self._requests: dict[int, Submitted] = {}  # by id of each of their rows, those not done
        self._queue: deque[Row] = deque()
        self._changed = threading.Condition()  # guards the queue and who is in it
        self._stepping = threading.Lock()
        self._closed = False
        self._stats = EngineStats(execution, schedule)

    @property
    def stats(self) -> EngineStats:
        if (auto := self._auto) is not None:
            self._stats.group_seconds = auto.group_seconds
            self._stats.wait_seconds, self._stats.late = (
                auto.pipeline.stats.wait_seconds,
                auto.pipeline.stats.late,
            )
            self._stats.hidden_predict_seconds = auto.hidden_predict_seconds
            self._stats.hidden_group_seconds = auto.hidden_group_seconds
            self._stats.groupings, self._stats.exchanges = auto.groupings, auto.exchanges
            self._stats.preferred = auto.admitting.preferred
            self._stats.scheduler = auto.gate.reason
        with self._changed:
            self._stats.waiting = len(self._queue)
            self._stats.running = sum(len(unit.members) for unit in self._units)
            self._stats.regroupings = sum(unit.regroupings for unit in self._units)
        return self._stats

    def reset_stats(self) -> None:
        self._stats = EngineStats(self._execution, self._schedule)
        if self._auto is not None:
            self._auto.reset_stats()
        for unit in self._units:
            unit.regroupings = 0

    @property
    def units(self) -> Sequence[Unit]:
        """In their turn; to be looked at between steps."""
        return self._units

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_text: OnText | None = None,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
        deadline_seconds: float | None = None,
    ) -> Submitted:
        """Queue a prompt (text or token ids) and return at once. Thread-safe.

        ValueError when it does not fit, for this request alone. on_text: is told new text in the thread that steps, and
        on_token each token; if one raises, this request fails. on_done: when nothing more will come. deadline_seconds:
        from now, after which it is cancelled.
        """
        ((text, ids, rows),) = self._llm.checked_requests([prompt], params)
        expires = None if deadline_seconds is None else self._clock() + deadline_seconds
        return self._enqueue(Submitted(text, ids, rows, on_text, expires, self._wake, on_token, on_done))

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Submit all, step until they are done, and return them in order. Every prompt is checked before the first.

        The first error of any of them is raised, and then the others are cancelled.
        """
        checked = self._llm.checked_requests(prompts, params)
        requests = [self._enqueue(Submitted(text, ids, rows, wake=self._wake)) for text, ids, rows in checked]
        try:
            for request in requests:
                while not request.done:
                    self.step()
                request.output()
        except BaseException:
            for request in requests:
                request.cancel()
            raise
        return [request.output() for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The answer to one prompt in pieces, stepping for it (and for all others). Close it to stop early."""
        ((text, ids, rows),) = self._llm.checked_requests([prompt], params)
        if len(rows) > 1:
            raise ValueError(f"stream gives one answer, not {len(rows)}; use generate")
        return self._stream(text, ids, rows)

    def _stream(self, text: str | None, ids: list[int], rows: list[Row]) -> Iterator[str]:
        texts: list[str] = []
        request = self._enqueue(
            Submitted(text, ids, rows, on_text=lambda answer, piece: texts.append(piece), wake=self._wake)
        )
        try:
            while not request.done:
                self.step()
                yield from texts
                texts.clear()
            request.output()
        finally:
            request.cancel()

    def step(self) -> bool:
        """One decode step of the unit whose turn it is. False when there was nothing to do.

        An error in the arithmetic ends the requests of that unit, which carry it, and not the engine; Ctrl-C is raised.
        RuntimeError when another thread is at it.
        """
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("another thread is stepping this engine; step in one thread, submit in any")
        try:
            with self._llm.interrupts.deferred():
                return self._step()
        finally:
            self._stepping.release()

    def wait_for_work(self, timeout_seconds: float | None = None) -> bool:
        """Return when there is something to do, or the engine is closed, or time is up; whether there is something."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests or self._closed, timeout_seconds)
            return bool(self._requests)

    def close(self) -> None:
        """Cancel everything; nothing can be submitted any more. Not while another thread steps. Idempotent."""
        with self._changed:
            self._closed = True
            for request in self._requests.values():
                request.cancel()
        self._leave()
        if self._auto is not None:
            self._auto.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _enqueue(self, request: Submitted) -> Submitted:
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed; make a new one to submit to")
            self._requests |= {id(row): request for row in request.rows}
            self._queue.extend(request.rows)
            self._changed.notify_all()
        return request

    def _step(self) -> bool:
        self._leave()
        self._admit()
        unit = self._next_unit()
        if unit is None:
            return False
        started, (predicted, looked_ahead) = time.perf_counter(), self._predict_seconds()
        decoding, prompts = 0, False
        if self._auto is not None:
            self._exchange(self._auto, unit)
        with self._failing(unit):
            # Since the unit's last step its scheduler may have found out more about the newest tokens.
            unit.settle()
            decoding, prompts = sum(len(batch.members) for batch in unit.batches), bool(unit.prefills)
            if self._auto is not None:
                self._auto.runs(unit, self._following(unit))
            self._take(unit.step(self._execution))
            unit.settle()
            if self._auto is not None:
                self._prepare(self._auto, unit)
            self._stats.steps += 1
            self._stats.decode_rows += decoding
        ended = time.perf_counter()
        self._stats.step_seconds += ended - started
        if self._auto is not None:
            self._auto.ended(ended - started, decoding, prompts=prompts)
        predicted_now, looked_ahead_now = self._predict_seconds()
        self._stats.predict_seconds += predicted_now - predicted
        self._stats.look_ahead_seconds += looked_ahead_now - looked_ahead
        if (timeline := self._llm.timeline) is not None:
            timeline.add("compute", f"unit {self._units.index(unit)}", started, ended, decoding=decoding)
        return True

    def _exchange(self, auto: AutoSchedule, unit: Unit) -> None:
        """Before a unit's step, rows that pay for it change places with those of a unit that rests."""
        exchange = None
        with self._failing(unit):
            auto.begins(alone=self._alone(unit))
            exchange = auto.exchange(self._units.index(unit), self._units)
        if exchange is not None:
            other = self._units[exchange.other]
            with self._failing(unit, other):
                unit.exchange(other, exchange.mine, exchange.others)
                auto.exchanges += 1

    def _prepare(self, auto: AutoSchedule, unit: Unit) -> None:
        """What concerns steps to come, while others compute."""
        alone = self._alone(unit)
        number, count = self._units.index(unit), len(self._units)
        after = [(number + offset) % count for offset in range(1, count)]
        resting = [at for at in after if self._units[at].members][1:]  # the first one computes meanwhile
        pair = None
        if resting:
            # Each of the others in turn: pairs that stay would never mix.
            others = [number, *resting[1:]] if unit.members else resting[1:]
            if others:
                pair = resting[0], others[self._stats.steps // count % len(others)]
        auto.stepped(number, self._units, alone=alone, pair=pair)
        with self._changed:
            waiting = list(self._queue)
        decoding = [row for one in self._units for row in one.members]
        auto.profile(waiting, decoding, alone=alone)

    def _following(self, unit: Unit) -> Unit | None:
        """Whose turn comes after this one's; None where it is its own."""
        number = self._units.index(unit)
        later = [*self._units[number + 1 :], *self._units[:number]]
        return next((other for other in later if other.members), None)

    def _alone(self, unit: Unit) -> bool:
        """Whether no other unit computes between two steps of this one."""
        return not any(other.members for other in self._units if other is not unit)

    def _predict_seconds(self) -> tuple[float, float]:
        """Of the thread that steps, so far: all, and look-ahead alone."""
        predicting = self._llm.experts.predicting
        if predicting is None:
            return 0.0, 0.0
        return predicting.stats.predict_seconds, predicting.stats.look_ahead_seconds

    @contextmanager
    def _failing(self, *units: Unit) -> Iterator[None]:
        """An error within ends the units' requests: their caches are in no known state. Ctrl-C and the like go on."""
        # Now: an error may come while somebody is on the way from one place to another.
        rows = [row for unit in units for row in unit.members]
        try:
            with torch.no_grad():
                yield
        except BaseException as error:
            for unit in units:
                unit.clear()
            for row in rows:
                if (request := self._requests.get(id(row))) is not None:
                    self._abort(request, error)
            if not isinstance(error, Exception):
                raise

    def _leave(self) -> None:
        """Requests that were cancelled, or whose time is up, end here."""
        now = self._clock()
        with self._changed:
            requests = list(dict.fromkeys(self._requests.values()))
        for request in requests:
            if request.cancelled or (request.expires is not None and now >= request.expires):
                self._abort(request)
        for unit in self._units:
            if any(row.finish_reason is not None for row in unit.members):
                with self._failing(unit):
                    unit.settle()

    def _admit(self) -> None:
        with self._changed:
            # Those that were cancelled, or failed by another answer of theirs.
            self._queue = deque(row for row in self._queue if row.finish_reason is None)
            for unit in self._units:
                if not (count := unit.room(self._queue)):
                    continue
                if self._auto is None:
                    joining = [self._queue.popleft() for _ in range(count)]
                else:
                    joining = self._auto.admitting.choose(list(self._queue), unit.members, count)
                    chosen = {id(row) for row in joining}
                    self._queue = deque(row for row in self._queue if id(row) not in chosen)
                for row in joining:
                    row.admitted = self._clock()
                unit.admit(joining)

    def _next_unit(self) -> Unit | None:
        for offset in range(len(self._units)):
            turn = (self._turn + offset) % len(self._units)
            if self._units[turn].members:
                self._turn = turn + 1
                return self._units[turn]
        return None

    def _take(self, outcomes: Sequence[Outcome]) -> None:
        """Choose the next token of every sequence. What goes wrong with one request is that one's alone."""
        for member, logits_V in outcomes:
            row = member.row
            request = self._requests.get(id(row))
            if request is None or not member.alive:  # cancelled, or failed by another of its answers
                continue
            if not row.token_ids:
                self._stats.prompt_tokens += len(row.prompt_ids)
            try:
                token = member.choose(logits_V)
                piece = row.push(token, token_logprobs(logits_V, token, row.params.logprobs))
                self._stats.generated_tokens += 1
                request.tell(row, piece)
            except Exception as error:
                self._abort(request, error)
                continue
            if all(row.finish_reason is not None for row in request.rows):
                self._stats.finished += 1
                self._forget(request)
                request.finish()

    def _abort(self, request: Submitted, error: BaseException | None = None) -> None:
        for row in request.rows:
            row.abort()
        if error is not None and not isinstance(error, Exception):
            # Not to be raised in whatever thread waits for this request.
            error, cause = (
                RuntimeError("the engine was interrupted in the middle of a step; submit it again"),
                error,
            )
            error.__cause__ = cause
        if error is None:
            self._stats.cancelled += 1
        else:
            self._stats.failed += 1
        self._forget(request)
        request.finish(error)

    def _forget(self, request: Submitted) -> None:
        with self._changed:
            for row in request.rows:
                self._requests.pop(id(row), None)


def _auto_schedule(
    llm: LLM, execution: Execution, schedule: Schedule, scheduler: Scheduler, patience: int
) -> AutoSchedule | None:
    """None where sequences are seated otherwise. Raises ValueError for what cannot be had."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; use {' or '.join(map(repr, SCHEDULES))}")
    if schedule == "fixed":
        return None
    if scheduler is not arrival_order:
        raise ValueError("schedule='auto' and scheduler= both say who sits together; give one of them")
    if llm.settings.predictor == "none":
        raise ValueError(
            "schedule='auto' groups sequences by predicted experts, and predictor='none'; give predictor='online' "
            "(--predictor online) or a trained one"
        )
    if llm.settings.predictor == "draft":
        raise ValueError(
            "schedule='auto' groups by what is foreseen while another unit runs, and predictor='draft' says it when a "
            "pass begins; give predictor='online' or a trained one"
        )
    if positions_follow_cache(llm.model):
        raise ValueError(
            f"schedule='auto' cannot move sequences of {type(llm.model).__name__}, which takes positions from the "
            f"length of the batch; use schedule='fixed'"
        )
    settings = llm.settings
    if execution == "joint" and settings.held <= 2 * settings.unit:
        logger.warning(
            "schedule='auto' exchanges sequences of execution='joint' from three units on, and only chooses who joins "
            "where there are fewer; give sequences=%d or more (--sequences), or execution='split'",
            2 * settings.unit + 1,
        )
    predicting = llm.experts.predicting
    if predicting is None:
        logger.info("schedule='auto' moves nobody: every expert has a slot, so no load can be saved")
        return None
    return AutoSchedule(predicting, llm.experts.cache, execution, patience)
