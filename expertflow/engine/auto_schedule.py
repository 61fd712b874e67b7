"""schedule=auto: sequences whose predicted paths are alike share a batch; predicted and grouped while others compute.

After a step of a unit its newest tokens are handed to the pipeline: predict their paths, group them. Before its next
step the unit takes what has been found, or stays as it sits when that is not there in time. Decides who sits where,
and no token; but a batch's shape is in the last bits of its logits, so only schedule=fixed repeats them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from expertflow.cache.expert_cache import ExpertCache
from expertflow.engine.batch import Batch, LiveSequence
from expertflow.engine.unit import Execution, Seating, Unit, arrival_order
from expertflow.models.foresight import Name, Question, Upcoming
from expertflow.models.predicting import Predicting
from expertflow.scheduler.batch_state import BatchState
from expertflow.scheduler.group import group
from expertflow.scheduler.pipeline import Pipeline

logger = logging.getLogger(__name__)

Schedule = Literal["fixed", "auto"]
SCHEDULES: tuple[Schedule, ...] = ("fixed", "auto")
Seats = list[list[LiveSequence]]

# At which sequences are copied between batches: measured regroupings are faster, so too few move rather than too many.
COPY_BYTES_PER_S = 2e9
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


class Prepared(NamedTuple):
    """For the next step of a unit. seats: None where everybody stays."""

    seats: Seats | None
    saved_activations: float = 0.0


class AutoSchedule:
    """One for the units of an engine, which are known by their numbers. `close` it."""

    def __init__(self, predicting: Predicting, cache: ExpertCache, execution: Execution):
        self.payoff = Payoff()
        self.pipeline: Pipeline[Prepared] = Pipeline()
        self._predicting, self._cache = predicting, cache
        self._groups = execution == "split"
        if not self._groups:
            logger.warning(
                "schedule='auto' groups nothing with execution='joint', where the batches of a unit share every "
                "load already; it only predicts while other units compute"
            )
        self._before = (0.0, 0)
        self.reset_stats()

    def reset_stats(self) -> None:
        self.pipeline.stats.reset()
        self.groupings = 0
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
        self._predicting.learn_later = None if alone else self._learn_later

    def stepped(self, number: int, unit: Unit, *, alone: bool) -> None:
        """Have the next step of a unit prepared. alone: no other unit computes before it."""
        stall_seconds, activations = (
            now - before for now, before in zip(self._counters(), self._before, strict=True)
        )
        self.payoff.stepped(stall_seconds, int(activations))
        question = self._predicting.question(number, [_upcoming(batch) for batch in unit.batches])
        if question is None:
            return
        seats = [list(batch.members) for batch in unit.batches]
        cost_N = None
        if self._groups and len(seats) > 1 and self.payoff.seconds_per_activation > 0:
            cost_N = torch.tensor(
                [
                    self.payoff.cost_of_moving(_row_bytes(batch.state))
                    for batch in unit.batches
                    for _ in batch.members
                ]
            )
        self.pipeline.submit(number, lambda: self._prepare(question, seats, cost_N, alone), alone=alone)

    def close(self) -> None:
        self._predicting.learn_later = None
        self.pipeline.close()

    def _learn_later(self, learn: Callable[[], None]) -> None:
        def timed() -> None:
            began = time.perf_counter()
            learn()
            self.hidden_predict_seconds += time.perf_counter() - began

        self.pipeline.later(timed)

    def _prepare(self, question: Question, seats: Seats, cost_N: Tensor | None, alone: bool) -> Prepared:
        """The job of the pipeline. alone: in the thread of the steps, which wait for it."""
        began = time.perf_counter()
        p_NLE = self._predicting.foresee(question, hidden=not alone)
        predicted = time.perf_counter()
        if not alone:
            self.hidden_predict_seconds += predicted - began
        if p_NLE is None or cost_N is None:
            return Prepared(None)
        found = group(p_NLE, len(seats), sizes=[len(batch) for batch in seats], cost_of_moving_N=cost_N)
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
        return Prepared(None if found.kept_arrival_order else _seated(seats, found.groups), saved)

    def _counters(self) -> tuple[float, int]:
        layers = self._cache.stats.layers
        return (
            sum(layer.stall_seconds for layer in layers),
            sum(layer.hits + layer.in_flight + layer.misses for layer in layers),
        )


def _upcoming(batch: Batch) -> Upcoming:
    return Upcoming(
        [Name(member, len(member.row.token_ids)) for member in batch.members],
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
