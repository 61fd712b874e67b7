"""Units: the batches whose decode steps belong together, and who sits where in them.

A step of a unit runs its batches one after the other (`split`, the plain loop) or side by side, so that they meet at
each MoE layer and an expert is loaded once for all (`joint`). Chunks of newcomers' prompts run along with either.
Between steps sequences that are done leave, those whose prompt is read take a place, and a scheduler may move others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Literal, NamedTuple

from torch import Tensor

from expertflow.engine.batch import Batch, LiveSequence, Prefill
from expertflow.engine.request import Row
from expertflow.engine.runner import GenerativeModel
from expertflow.models.meeting import run_together
from expertflow.scheduler.batch_state import positions_follow_cache
from expertflow.scheduler.regroup import regroup

Execution = Literal["joint", "split"]
EXECUTIONS: tuple[Execution, ...] = ("joint", "split")


@dataclass(frozen=True)
class Seating:
    """What a scheduler is asked about between two steps of a unit.

    batches: who sits together now; those that left are gone already. joining: who needs a place, their prompts read;
    those that read together as one.
    At most `num_batches` batches of at most `rows` sequences. keep_apart: sequences may share a batch only with those
    they began with, since what this model computes depends on the length of the batch.
    """

    batches: list[list[LiveSequence]]
    joining: list[list[LiveSequence]]
    rows: int
    num_batches: int
    keep_apart: bool


# Who sits together from now on: everybody once, in any order, in batches that are not empty. Asked before each step,
# and after it, when some have left or joined.
Scheduler = Callable[[Seating], list[list[LiveSequence]]]


def arrival_order(seating: Seating) -> list[list[LiveSequence]]:
    """Everybody stays; newcomers fill the batches in order. The scheduler of `schedule=fixed`."""
    if seating.keep_apart:
        return [*seating.batches, *seating.joining]
    batches = [list(batch) for batch in seating.batches]
    joining = [member for group in seating.joining for member in group]
    for batch in batches:
        room = seating.rows - len(batch)
        batch += joining[:room]
        joining = joining[room:]
    while joining:
        batches.append(joining[: seating.rows])
        joining = joining[seating.rows :]
    return batches


class Outcome(NamedTuple):
    """What a step has found for one sequence: logits for its next token."""

    member: LiveSequence
    logits_V: Tensor


class Unit:
    """At most two batches of `rows` sequences, `most` sequences in all."""

    def __init__(
        self,
        model: GenerativeModel,
        rows: int,
        most: int,
        chunk: int,
        pad_token: int,
        scheduler: Scheduler = arrival_order,
    ):
        """chunk: tokens of a prompt that run at once, as the model was loaded for."""
        self._model = model
        self._pad_token = pad_token
        self.scheduler = scheduler
        self.rows, self.most, self._chunk = rows, most, chunk
        self.num_batches = -(-most // rows)
        self.keep_apart = positions_follow_cache(model)
        self._seq2seq: bool = model.config.is_encoder_decoder
        self.batches: list[Batch] = []
        self.prefills: list[Prefill] = []  # groups of newcomers: a long prompt does not hold up a short one
        self.regroupings = 0  # in which a scheduler moved somebody who had a place

    @property
    def members(self) -> list[Row]:
        """All rows that hold memory here."""
        return [member.row for batch in self.batches for member in batch.members] + self._reading

    @property
    def _reading(self) -> list[Row]:
        return [row for prefill in self.prefills for row in prefill.rows]

    def room(self, waiting: Sequence[Row]) -> int:
        """How many of the first of those that wait may join now. No more prompts are read at once than a batch has."""
        most = min(self.most - len(self.members), self.rows - len(self._reading), len(waiting))
        if not self.keep_apart or not most:
            return most
        if len(self.batches) + len(self.prefills) == self.num_batches:
            return 0
        # Padding counts as length. What an encoder reads may be padded: its decoder begins with one token for all.
        first = len(waiting[0].prompt_ids)
        alike = takewhile(lambda row: self._seq2seq or len(row.prompt_ids) == first, islice(waiting, most))
        return sum(1 for _ in alike)

    def admit(self, rows: Sequence[Row]) -> None:
        """Have these read their prompts, from the next step on. Not more than there is `room` for.

        Those of as many chunks read together: a short prompt is not padded to a long one, nor does it wait for it.
        """
        groups: dict[int, list[Row]] = {}
        for row in rows:
            groups.setdefault(-(-len(row.prompt_ids) // self._chunk), []).append(row)
        self.prefills += [Prefill(self._model, group, self._pad_token) for group in groups.values()]

    def step(self, execution: Execution) -> list[Outcome]:
        """One forward pass of every batch, and of the next chunk of every group of newcomers.

        After an error the KV caches are in no known state: `clear` the unit.
        """
        passes: list[Callable[[], Tensor | None]] = [batch.decode for batch in self.batches]
        passes += [prefill.advance for prefill in self.prefills]
        if execution == "joint" and len(passes) > 1:
            found = run_together(passes)
        else:
            found = [run() for run in passes]
        members = [batch.members for batch in self.batches] + [prefill.members for prefill in self.prefills]
        return [
            Outcome(member, logits_V)
            for together, logits_BV in zip(members, found, strict=True)
            if logits_BV is not None
            for member, logits_V in zip(together, logits_BV, strict=True)
        ]

    def settle(self) -> None:
        """Between two steps: those that are done leave, those whose prompt is read take their places."""
        for prefill in self.prefills:
            prefill.drop()
        read = [prefill for prefill in self.prefills if prefill.finished]
        self.prefills = [prefill for prefill in self.prefills if prefill.rows and not prefill.finished]
        read = [prefill for prefill in read if any(member.alive for member in prefill.members)]
        joining = [[member for member in prefill.members if member.alive] for prefill in read]
        old = [*self.batches, *(prefill.batch() for prefill in read)]
        seated = [[member for member in batch.members if member.alive] for batch in self.batches]
        self._seat(old, self._ask([batch for batch in seated if batch], joining))

    def exchange(self, other: Unit, mine: list[LiveSequence], others: list[LiveSequence]) -> None:
        """Between two steps: from now on these sit here and those there, all who sat in either. Whoever stays in a unit
        keeps the place, so as many come as go."""
        old = [*self.batches, *other.batches]
        here = len(self.batches)
        layout = []
        for batches, wanted in ((self.batches, mine), (other.batches, others)):
            sitting = {member for batch in batches for member in batch.members}
            assert len(wanted) == len(sitting), "a sequence came, and none went for it"
            staying = sitting.intersection(wanted)
            coming = iter([member for member in wanted if member not in sitting])
            layout += [
                [member if member in staying else next(coming) for member in batch.members]
                for batch in batches
            ]
        seated = _regrouped(self._model, old, layout)
        self.batches, other.batches = seated[:here], seated[here:]
        self.regroupings += 1

    def clear(self) -> None:
        """Forget everybody."""
        self.batches, self.prefills = [], []

    def _ask(
        self, seated: list[list[LiveSequence]], joining: list[list[LiveSequence]]
    ) -> list[list[LiveSequence]]:
        if not seated and not joining:
            return []
        seating = Seating(seated, joining, self.rows, self.num_batches, self.keep_apart)
        wanted = self.scheduler(seating)
        asked = [member for batch in [*seated, *joining] for member in batch]
        named = [member for batch in wanted for member in batch]
        if len(named) != len(asked) or set(named) != set(asked):
            raise ValueError(f"the scheduler seated {len(named)} sequences where there are {len(asked)}")
        if len(wanted) > self.num_batches or any(not 0 < len(batch) <= self.rows for batch in wanted):
            raise ValueError(
                f"the scheduler made batches of {[len(batch) for batch in wanted]} sequences; a unit has at most "
                f"{self.num_batches} of 1 to {self.rows}"
            )
        self.regroupings += not _only_added(seated, wanted)
        return wanted

    def _seat(self, old: list[Batch], wanted: list[list[LiveSequence]]) -> None:
        if [batch.members for batch in old] == wanted:
            self.batches = old
        else:
            self.batches = _regrouped(self._model, old, wanted)


def _regrouped(
    model: GenerativeModel, old: Sequence[Batch], wanted: Sequence[Sequence[LiveSequence]]
) -> list[Batch]:
    place = {
        member: (index, row) for index, batch in enumerate(old) for row, member in enumerate(batch.members)
    }
    layout = [[place[member] for member in batch] for batch in wanted]
    states = regroup([batch.state for batch in old], layout) if layout else []
    return [Batch(model, members, state) for members, state in zip(wanted, states, strict=True)]


def _only_added(seated: list[list[LiveSequence]], wanted: list[list[LiveSequence]]) -> bool:
    """Whether everybody kept batch and order, newcomers behind them."""
    return len(wanted) >= len(seated) and all(
        batch[: len(before)] == before for before, batch in zip(seated, wanted, strict=False)
    )
