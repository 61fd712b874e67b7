"""Regrouping changes no text: every sequence gets the logits it would have had alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from torch import Tensor

from expertflow.scheduler.batch_state import BatchState
from expertflow.scheduler.regroup import regroup
from tests.scheduler.decoding import KINDS, alone, model_of, prefill, prompts, step

STEPS = 12


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return model_of(kind)


class Run:
    """Sequences decoded greedily while they change batches; each logit is compared with the lone run's."""

    def __init__(self, model, texts: Sequence[Sequence[int]]):
        self.model, self.texts = model, texts
        self.expected = [alone(model, text, STEPS) for text in texts]
        self.written: list[list[int]] = [[] for _ in texts]
        self.states: list[BatchState] = []
        self.members: list[list[int]] = []

    def start(self, members: Sequence[int]) -> None:
        logits_BV, state = prefill(self.model, [self.texts[member] for member in members])
        self._check(members, logits_BV)
        self.states.append(state)
        self.members.append(list(members))

    def step(self, batch: int) -> None:
        tokens = [self.written[member][-1] for member in self.members[batch]]
        logits_BV, self.states[batch] = step(self.model, self.states[batch], tokens)
        self._check(self.members[batch], logits_BV)

    def regroup(self, layout, move: Callable = regroup) -> None:
        self.states = move(self.states, layout)
        self.members = [[self.members[batch][row] for batch, row in rows] for rows in layout]

    def drop_finished(self, steps: int) -> list[tuple[int, int]]:
        """The places of those who have fewer tokens than that."""
        return [
            (batch, row)
            for batch, members in enumerate(self.members)
            for row, member in enumerate(members)
            if len(self.written[member]) < steps
        ]

    def _check(self, members: Sequence[int], logits_BV: Tensor) -> None:
        for member, logits_V in zip(members, logits_BV, strict=True):
            expected_V = self.expected[member][len(self.written[member])]
            error = (logits_V - expected_V).abs().max() / expected_V.abs().max()
            assert error < 1e-9, f"sequence {member}, token {len(self.written[member])}: {error:.1e}"
            self.written[member].append(int(logits_V.argmax()))


def random_layout(places: list[tuple[int, int]], batches: int, rng: random.Random):
    """Everybody somewhere, in batches of random sizes."""
    shuffled = rng.sample(places, len(places))
    cuts = sorted(rng.sample(range(1, len(places)), min(batches, len(places)) - 1))
    return [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(places)], strict=True)]


@pytest.mark.parametrize("seed", range(4))
def test_text_is_unchanged_by_regrouping(model, kind, seed):
    rng = random.Random(seed)
    run = Run(model, prompts(6, seed))
    run.start([0, 1, 2])
    if kind != "sinusoids":  # its sequences must have the same number of tokens; those below have not
        for _ in range(rng.randrange(1, 4)):
            run.step(0)
    run.start([3, 4, 5])
    while places := run.drop_finished(STEPS):
        run.regroup(random_layout(places, rng.choice([1, 2, 2, 3]), rng))
        for batch in range(len(run.members)):
            run.step(batch)
    texts = [logits_SV.argmax(-1).tolist() for logits_SV in run.expected]
    assert run.written == texts
