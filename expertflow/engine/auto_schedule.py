"""schedule=auto: sequences whose predicted paths are alike run together; predicted and grouped while others compute.

After a step of a unit its newest tokens are handed to the pipeline: predict their paths, group them. Before its next
step the unit takes what has been found, or stays as it sits when that is not there in time. Under `split` the rows of
a unit's batches are grouped; under `joint` those of two units, while a third computes. Who joins a unit from the queue
is admitting.py's. Whether all this pays is tried: now and then steps are made without it, and the faster way is kept
(cache/gate.py). Decides who sits where, and no token; but a batch's shape is in the last bits of its logits, so only
schedule=fixed repeats them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from expertflow.cache.expert_cache import ExpertCache
from expertflow.cache.gate import PayoffGate
from expertflow.engine.admitting import Admitting
from expertflow.engine.batch import Batch, LiveSequence
from expertflow.engine.request import Row
from expertflow.engine.unit import Execution, Seating, Unit, arrival_order
from expertflow.models.foresight import Name, Question, Upcoming
from expertflow.models.predicting import Predicting
from expertflow.predictor.combine import at_once
from expertflow.scheduler.batch_state import BatchState
from expertflow.scheduler.group import group
from expertflow.scheduler.pipeline import Pipeline

Schedule = Literal["fixed", "auto"]
SCHEDULES: tuple[Schedule, ...] = ("fixed", "auto")
Seats = list[list[LiveSequence]]

# At which sequences are copied between batches: measured regroupings are faster, so too few move rather than too many.
COPY_BYTES_PER_S = 2e9
# Of a grouping, for each row: they bring .98 to 1 of what a search to its end brings, in .3 to .6 of its time, which
# steps that compute beside it on few cores feel (docs/log.md).
_SWAPS = 1 / 2
_KEEP = 0.8  # by step, of what an activation costs; by grouping, of what it saves


class Payoff:
    """What one more expert activated in a step costs, and what groupings save: measured, running means."""

    def __init__(self) -> None:
        self.seconds_per_activation = 0.0  # 0: nothing measured yet, or no step waits for a load
        self.saved_activations = 0.0  # by grouping, expected
        self._measured = self._grouped = False

    @property
    def seconds_saved(self) -> float:
        """What a grouping is worth."""
        return self.saved_activations * self.seconds_per_activation

    def stepped(self, stall_seconds: float, activations: int) -> None:
        """A step used so many experts, and waited so long for loads."""
        if activations > 0 and stall_seconds >= 0:
            found = stall_seconds / activations
            keep = _KEEP if self._measured else 0.0
            self.seconds_per_activation = keep * self.seconds_per_activation + (1 - keep) * found
            self._measured = True

    def grouped(self, saved_activations: float) -> None:
        keep = _KEEP if self._grouped else 0.0
        self.saved_activations = keep * self.saved_activations + (1 - keep) * saved_activations
        self._grouped = True

    def cost_of_moving(self, row_bytes: float) -> float:
        """In activations, which is what grouping counts."""
        return row_bytes / COPY_BYTES_PER_S / self.seconds_per_activation


class Exchange(NamedTuple):
    """Who runs with whom from now on, of two units that are joint."""

    other: int  # the unit whose turn comes later
    mine: list[LiveSequence]
    others: list[LiveSequence]


class Prepared(NamedTuple):
    """For the next step of a unit. None where everybody stays."""

    seats: Seats | None
    saved_activations: float = 0.0
    exchange: Exchange | None = None


class _Job(NamedTuple):
    """What is to be prepared. pair: of units that may exchange rows; named: who sits there, predicted by then."""

    question: Question
    seats: Seats
    pair: tuple[int, int] | None
    named: list[list[Name]]
    cost_N: Tensor | None  # of moving each row
    alone: bool


class AutoSchedule:
    """One for the units of an engine, which are known by their numbers. `close` it."""

    def __init__(self, predicting: Predicting, cache: ExpertCache, execution: Execution, patience: int):
        self.payoff = Payoff()
        self.gate = PayoffGate("the scheduler", ("step", "steps"))
        self.pipeline: Pipeline[Prepared] = Pipeline()
        self._predicting, self._cache = predicting, cache
        self._groups = execution == "split"
        self.admitting = Admitting(predicting, patience)
        self._said: dict[
            int, dict[Name, Tensor]
        ] = {}  # p_LE of the rows of each unit, at their newest tokens
        self._exchange_of: dict[
            int, int
        ] = {}  # of a unit whose turn comes, the lane that knows what to exchange
        self._before = (0.0, 0)
        self.reset_stats()

    def reset_stats(self) -> None:
        self.pipeline.stats.reset()
        self.groupings = self.exchanges = self.admitting.preferred = 0
        self.group_seconds = self.hidden_predict_seconds = self.hidden_group_seconds = 0.0

    def seats(self, unit: int, seating: Seating) -> Seats:
        """As a Scheduler: what was prepared, for those who are still there; others by order of arrival."""
        prepared = self.pipeline.take(unit, self.payoff.seconds_saved)
        if prepared is None or prepared.seats is None:
            return arrival_order(seating)
        there = {member for batch in seating.batches for member in batch}
        seated = [[member for member in batch if member in there] for batch in prepared.seats]
        there -= {member for batch in seated for member in batch}
        others = [member for batch in seating.batches for member in batch if member in there]
        batches = [batch for batch in seated if batch]
        return arrival_order(replace(seating, batches=batches, joining=[others, *seating.joining]))

    def begins(self, *, alone: bool) -> None:
        """A step begins: what follows is counted for it. alone: no other unit computes after it."""
        self._before = self._counters()
        # Alone, the next step would find the thread at it, and wait or go on without a prediction.
        hide = self.gate.open and not alone
        self._predicting.learn_later = self._learn_later if hide else None

    def runs(self, unit: Unit, after: Unit | None) -> None:
        """The passes of a unit begin, each followed by its next one, the last by those of the unit that comes after."""
        own = [_names([batch]) for batch in unit.batches]
        others = [_names([batch]) for batch in after.batches] if after is not None else []
        if (
            self._groups
        ):  # each batch has a pass of its own; so has each group of prompts behind them, which nobody expects
            following = [*own, *([] for _ in unit.prefills)][1:] + others[:1]
        else:
            following = [[name for names in others for name in names]]
        self._predicting.then(following)

    def exchange(self, number: int, units: Sequence[Unit]) -> Exchange | None:
        """The turn of this unit comes: who changes places with rows of one that rests, where that was found to pay."""
        lane = self._exchange_of.pop(number, None)
        if lane is None:
            return None
        prepared = self.pipeline.take(lane, self.payoff.seconds_saved, keep=True)
        if prepared is None or prepared.exchange is None:
            return None
        other, mine, others = prepared.exchange
        # Somebody may have left since; what was found for all is then not for the others.
        for unit, members in ((units[number], mine), (units[other], others)):
            if sum(len(batch.members) for batch in unit.batches) != len(members):
                return None
        there = {m for at in (number, other) for batch in units[at].batches for m in batch.members}
        return prepared.exchange if there == {*mine, *others} else None

    def stepped(
        self, number: int, units: Sequence[Unit], *, alone: bool, pair: tuple[int, int] | None = None
    ) -> None:
        """Have the next step of a unit prepared. alone: no other unit computes before it.

        pair: two that do not compute meanwhile, the first of which comes next after the one that does.
        """
        unit = units[number]
        stall_seconds, activations = (
            now - before for now, before in zip(self._counters(), self._before, strict=True)
        )
        self.payoff.stepped(stall_seconds, int(activations))
        if not self.gate.open:
            return
        question = self._predicting.question(number, [_upcoming(batch) for batch in unit.batches])
        if question is None:
            return
        seats = [list(batch.members) for batch in unit.batches]
        batches: list[Batch] = []
        if self._groups:
            batches = unit.batches if len(seats) > 1 else []
        elif pair is not None and all(units[at].batches for at in pair):
            batches = [batch for at in pair for batch in units[at].batches]
            self._exchange_of[pair[0]] = number
        cost_N = None
        if batches and self.payoff.seconds_per_activation > 0:
            cost_N = torch.tensor(
                [
                    self.payoff.cost_of_moving(_row_bytes(batch.state))
                    for batch in batches
                    for _ in batch.members
                ]
            )
        named = [_names(units[at].batches) for at in pair or ()]
        job = _Job(question, seats, pair, named, cost_N, alone)
        self.pipeline.submit(number, lambda: self._prepare(number, job), alone=alone)

    def ended(self, seconds: float, rows: int, *, prompts: bool) -> None:
        """A step took so long, for so many that decode, and prompts beside them or none: only those are compared."""
        prefetching = self._predicting.gate
        if not prompts and rows and prefetching.open and not prefetching.trying:
            self.gate.passed(seconds, rows)

    def profile(self, waiting: Sequence[Row], decoding: Sequence[Row], *, alone: bool) -> None:
        """Find out about those that wait: while others compute, or now."""
        ask = self.admitting.next_question(waiting, decoding, hidden=not alone)
        if ask is not None:
            (self._learn_later if not alone else at_once)(ask)

    def close(self) -> None:
        self._predicting.learn_later = None
        self.pipeline.close()

    def _learn_later(self, learn: Callable[[], None]) -> None:
        def timed() -> None:
            began = time.perf_counter()
            learn()
            self.hidden_predict_seconds += time.perf_counter() - began

        self.pipeline.later(timed)

    def _prepare(self, number: int, job: _Job) -> Prepared:
        """The job of the pipeline. alone: in the thread of the steps, which wait for it."""
        began = time.perf_counter()
        question, seats, alone = job.question, job.seats, job.alone
        p_NLE = self._predicting.foresee(question, hidden=not alone)
        predicted = time.perf_counter()
        if not alone:
            self.hidden_predict_seconds += predicted - began
        if p_NLE is None:
            return Prepared(None)
        sizes = [len(batch) for batch in seats]
        if not self._groups:
            self._said[number] = dict(zip(question.names, p_NLE, strict=True))
            said = {name: p_LE for lane in self._said.values() for name, p_LE in lane.items()}
            names = [name for named in job.named for name in named]
            if not all(name in said for name in names):
                return Prepared(None)
            sizes = [len(named) for named in job.named]
        if job.cost_N is None:
            return Prepared(None)
        if not self._groups:
            p_NLE = torch.stack([said[name] for name in names])
        most = max(1, round(_SWAPS * len(p_NLE)))
        found = group(p_NLE, len(sizes), sizes=sizes, cost_of_moving_N=job.cost_N, max_swaps=most)
        saved = found.activated_in_arrival_order - found.activated
        self.payoff.grouped(saved)
        self.groupings += 1
        ended = time.perf_counter()
        if alone:
            self.group_seconds += ended - predicted
        else:
            self.hidden_group_seconds += ended - predicted
        if (timeline := self._cache.timeline) is not None:
            timeline.add(
                "group", f"unit {question.lane}", predicted, ended, moved=found.moved, saved=round(saved, 1)
            )
        if found.kept_arrival_order:
            return Prepared(None, saved)
        if self._groups:
            return Prepared(_seated(seats, found.groups), saved)
        assert job.pair is not None
        mine, others = ([cast(LiveSequence, names[row].sequence) for row in rows] for rows in found.groups)
        return Prepared(None, saved, Exchange(job.pair[1], mine, others))

    def _counters(self) -> tuple[float, int]:
        layers = self._cache.stats.layers
        return (
            sum(layer.stall_seconds for layer in layers),
            sum(layer.hits + layer.in_flight + layer.misses for layer in layers),
        )


def _names(batches: Sequence[Batch]) -> list[Name]:
    return [Name(member, len(member.row.token_ids)) for batch in batches for member in batch.members]


def _upcoming(batch: Batch) -> Upcoming:
    return Upcoming(
        _names([batch]),
        batch.newest_B1,
        batch.state.cache,
        batch.state.encoder_BSD,
    )


def _row_bytes(state: BatchState) -> int:
    """What a sequence of this batch carries along."""
    return sum(part.row_bytes(part.width(state.length(part.axis))) for part in state.tensors().values())


def _seated(seats: Seats, groups: Sequence[Sequence[int]]) -> Seats:
    """The groups as batches, in which nobody who stays changes place. groups: of rows, batch by batch."""
    members = [member for batch in seats for member in batch]
    wanted = [[members[row] for row in rows] for rows in groups]
    found = []
    for batch, group_members in zip(seats, wanted, strict=True):
        staying = set(batch) & set(group_members)
        coming = iter([member for member in group_members if member not in staying])
        found.append([member if member in staying else next(coming) for member in batch])
    return found
