"""The token scheduler on the virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import pytest

from expertflow.sim.clock import Outcome, Pass, Simulation
from expertflow.sim.hardware import Costs
from expertflow.sim.scheduling import (
    WAYS,
    By,
    Scheduling,
    Token,
    compare_scheduling,
    decode_steps,
    paths_of,
    simulate_scheduling,
)
from expertflow.sim.workload import Foretold, foretell, shape_of
from expertflow.trace import TracedSequence, read_trace

CHAT = Path(__file__).parents[2] / "zoo" / "traces" / "switch-32" / "chat"
LINK_BOUND = Costs(expert_s=1e-4, dense_s=1e-4, chunk_s=1e-3, chunks=1)
EVERY = [
    Scheduling(execution, grouping, admission, batch=4, num_units=3)
    for execution, grouping, admission in [*WAYS.values(), ("split", "predicted", "predicted")]
]


@pytest.fixture(scope="module")
def chat() -> Foretold:
    trace = read_trace(CHAT, weights=False)
    return foretell(trace.meta, trace.sequences[:120], "online")


def tokens_of(chat: Foretold, prompts: int) -> set[Token]:
    """Of the first sequences of so many different prompts."""
    first: dict[int, int] = {}
    for number, sequence in enumerate(chat.sequences):
        first.setdefault(sequence.prompt, number)
    lengths = {n: len(chat.sequences[n].target_ids_T) - chat.sequences[n].num_prefill for n in first.values()}
    return {Token(n, t) for n in list(first.values())[:prompts] for t in range(lengths[n])}


@pytest.mark.parametrize("how", EVERY)
def test_every_token_is_decoded_once_and_in_order(chat: Foretold, how: Scheduling) -> None:
    seen: list[Token] = []
    for step in decode_steps(chat, replace(how, prompts=30)):
        assert all(0 < len(batch) <= how.batch for batch in step.batches)
        assert len(step.batches) <= 2
        here = [token for batch in step.batches for token in batch]
        assert all(step == 0 or Token(sequence, step - 1) in seen for sequence, step in here)
        seen += here
    assert len(seen) == len(set(seen))
    assert set(seen) == tokens_of(chat, 30)


def test_places_are_filled_as_long_as_somebody_waits(chat: Foretold) -> None:
    rows = [sum(map(len, step.batches)) for step in decode_steps(chat, EVERY[4])]
    assert rows[:20] == [8] * 20


@pytest.mark.parametrize("execution", ["split", "joint"])
def test_what_is_counted_is_what_the_batches_need(chat: Foretold, execution: str) -> None:
    how = Scheduling(execution, batch=4, num_units=2)  # type: ignore[arg-type]
    done = simulate_scheduling(chat, how, LINK_BOUND, 8, "lru", max_steps=5)
    assert done.activations == done.outcome.uses == round(5 * 8 * activations(chat, how, 5))
    assert done.tokens == 5 * 8


def test_joint_batches_run_what_lies_between_the_layers_once_each(chat: Foretold) -> None:
    cost = Costs(expert_s=0.0, dense_s=1.0, chunk_s=1e-9, chunks=1)
    seconds = [
        simulate_scheduling(chat, Scheduling(way, batch=4, num_units=1), cost, 8, max_steps=3).outcome.seconds
        for way in ("split", "joint")
    ]
    assert seconds == pytest.approx([3 * 2 * shape_of(chat.meta).num_layers] * 2, rel=1e-3)


def activations(chat: Foretold, how: Scheduling, most: int) -> float:
    """Per token, over the first steps."""
    count = tokens = 0
    for _, step in zip(range(most), decode_steps(chat, how), strict=False):
        batches = step.batches if how.execution == "split" else [list(chain(*step.batches))]
        count += sum(int(paths_of(chat, batch).any(0).sum()) for batch in batches)
        tokens += sum(map(len, batches))
    return count / tokens


@pytest.mark.parametrize(("execution", "units"), [("split", 2), ("joint", 3)])
def test_grouping_saves_activations_most_with_true_paths(chat: Foretold, execution: str, units: int) -> None:
    arrival, predicted, true = (
        activations(chat, Scheduling(execution, by, batch=8, num_units=units), 20)  # type: ignore[arg-type]
        for by in ("arrival", "predicted", "true")
    )
    assert true < 0.95 * arrival
    assert true < predicted < 0.99 * arrival


@pytest.mark.parametrize(("by", "most"), [("true", 0.9), ("predicted", 0.97)])
def test_admission_tells_two_languages_apart(chat: Foretold, by: By, most: float) -> None:
    """Every other sequence uses the upper half of the experts alone, and token ids of its own."""

    def spoken(number: int, sequence: TracedSequence) -> TracedSequence:
        routes_TLK = sequence.target_routes_TLK % 16 + 16 * (number % 2)
        ids_S, ids_T = (
            sequence.source_ids_S + 10_000 * (number % 2),
            sequence.target_ids_T + 10_000 * (number % 2),
        )
        return replace(
            sequence, prompt=number, target_routes_TLK=routes_TLK, source_ids_S=ids_S, target_ids_T=ids_T
        )

    two = replace(chat, sequences=[spoken(n, sequence) for n, sequence in enumerate(chat.sequences)])
    how = Scheduling("joint", "arrival", "arrival", batch=4, num_units=2, patience=1000)
    assert activations(two, replace(how, admission=by), 150) < most * activations(two, how, 150)


def test_without_patience_everybody_is_admitted_in_order_of_arrival(chat: Foretold) -> None:
    how = Scheduling("joint", "arrival", "true", batch=4, num_units=2, patience=0)
    assert list(decode_steps(chat, how)) == list(decode_steps(chat, replace(how, admission="arrival")))


def test_the_table_stands_beside_split(chat: Foretold) -> None:
    rows = compare_scheduling(chat, LINK_BOUND, 8, batch=4, max_steps=8, ways=["joint", "split, TS"])
    assert [row["way"] for row in rows] == ["joint", "split, TS"]
    (split,) = compare_scheduling(chat, LINK_BOUND, 8, batch=4, max_steps=8, ways=["split"])
    assert split["to_split"] == 1
    for row in rows:
        assert row["to_split"] == pytest.approx(row["tokens_per_second"] / split["tokens_per_second"])


def test_what_cannot_be_is_refused(chat: Foretold) -> None:
    with pytest.raises(ValueError, match="grouping='best' is unknown"):
        Scheduling(grouping="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch=0"):
        Scheduling(batch=0)
    blind = Foretold(chat.meta, "none", chat.sequences, None, None)
    with pytest.raises(ValueError, match="predicts no paths"):
        next(decode_steps(blind, Scheduling(grouping="predicted")))


@pytest.mark.parametrize(("execution", "units"), [("joint", 2), ("split", 2), ("joint", 1), ("split", 1)])
def test_the_next_pass_is_expected_where_its_tokens_are_known(
    chat: Foretold, execution: str, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[Pass]] = []

    class Watched(Simulation):
        def run(self, passes: Sequence[Pass], settle: int = 0) -> Outcome:
            ran.append(list(passes))
            return super().run(passes, settle)

    monkeypatch.setattr("expertflow.sim.scheduling.Simulation", Watched)
    oracle = replace(chat, prediction="oracle", p_TLE=None, absent_TCLE=None)
    how = Scheduling(execution, batch=4, num_units=units)  # type: ignore[arg-type]
    simulate_scheduling(oracle, how, LINK_BOUND, 8, max_steps=6)
    (passes,) = ran
    assert passes[-1].next_LE is None
    told = []
    for now, after in pairwise(passes):
        told.append(now.next_LE is not None)
        if now.next_LE is not None:
            found = [[e for e, p in enumerate(p_E) if p == 1] for p_E in now.next_LE]
            assert found == [sorted(experts) for experts in after.experts_L]
    if units == 2:
        assert all(told)
    elif execution == "joint":
        assert not any(told), "its own next tokens are not there yet"
    else:
        assert told == [True, False] * 5 + [True], "of its other batch they are"
