"""Admission under schedule=auto: who of the queue joins a unit, by what prompts say of the experts that answers need.

The rule is scheduler/admission.py's. A prompt's profile is asked for while it waits, and anew when twice as many steps
have been learnt from; a sequence keeps it as long as it decodes. Without profiles, order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from expertflow.engine.request import Row
from expertflow.models.predicting import Predicting
from expertflow.scheduler.admission import admit

_CANDIDATES = 256  # of those that wait, the first ones are looked at
_AT_ONCE = 4  # prompts that are asked about between two steps, while others compute
_FIRST_STEPS = 8  # a profile made at the start is made anew after so many


class _Profile(NamedTuple):
    row: Row  # kept alive: its id is the key
    p_LE: Tensor
    step: int


class Admitting:
    """`choose` and `next_question` in the thread that steps; the question may be answered in another."""

    def __init__(self, predicting: Predicting, patience: int):
        """patience: by how many that arrived later a sequence may be overtaken while it waits."""
        if patience < 0:
            raise ValueError(f"patience={patience}: give 0 (order of arrival) or more")
        self.patience = patience
        self.preferred = 0  # sequences that began before one that had arrived earlier
        self._predicting = predicting
        self._profiles: dict[int, _Profile] = {}
        self._overtaken: dict[int, int] = {}
        self._steps = 0

    def choose(self, waiting: Sequence[Row], sitting: Sequence[Row], count: int) -> list[Row]:
        """Who of those that wait, in order of arrival, join those that sit."""
        seen = waiting[:_CANDIDATES]
        known = [self._profiles[id(row)].p_LE for row in chain(seen, sitting) if id(row) in self._profiles]
        if not known or not self.patience:
            return list(waiting[:count])
        usual_LE = torch.stack(known).mean(0)  # of whom nothing is known

        def profiles(rows: Sequence[Row]) -> Tensor:
            found = [self._profiles[id(row)].p_LE if id(row) in self._profiles else usual_LE for row in rows]
            return torch.stack(found) if found else usual_LE.new_zeros(0, *usual_LE.shape)

        overtaken = [self._overtaken.get(id(row), 0) for row in seen]
        chosen, counts = admit(profiles(seen), profiles(sitting), count, overtaken, self.patience)
        left = [row for place, row in enumerate(seen) if place not in set(chosen)]
        self._overtaken = {id(row): times for row, times in zip(left, counts, strict=True)}
        first_left = min(set(range(len(seen))).difference(chosen), default=len(seen))
        self.preferred += sum(place > first_left for place in chosen)
        return [seen[place] for place in chosen]

    def next_question(
        self, waiting: Sequence[Row], others: Sequence[Row], *, hidden: bool
    ) -> Callable[[], None] | None:
        """A step is over: what to ask about those that wait, where there is something to ask.

        others: who decodes, whose profiles are kept. hidden: it will be answered in another thread.
        """
        self._steps += 1
        seen = waiting[:_CANDIDATES]
        there = {id(row) for row in chain(seen, others)}
        for gone in [key for key in list(self._profiles) if key not in there]:
            del self._profiles[gone]
        due = [row for row in seen if self._is_due(row)][: _AT_ONCE if hidden else 1]
        if not due:
            return None
        steps = self._steps

        def ask() -> None:
            for row in due:
                if (p_LE := self._predicting.profile(row.prompt_ids, hidden=hidden)) is not None:
                    self._profiles[id(row)] = _Profile(row, p_LE, steps)

        return ask

    def _is_due(self, row: Row) -> bool:
        profile = self._profiles.get(id(row))
        return profile is None or self._steps > 2 * profile.step + _FIRST_STEPS
