"""Admission: who joins whom, and that nobody waits for ever."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertflow.scheduler.admission import admit

NOBODY = torch.zeros(0, 1, 4)
EVEN, ODD = [0.5, 0.0, 0.5, 0.0], [0.0, 0.5, 0.0, 0.5]


def profiles(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)[:, None]


def test_those_join_who_share_experts_with_those_that_sit() -> None:
    found = admit(profiles(ODD, EVEN, ODD, EVEN), profiles(EVEN), 2, [0] * 4, patience=9)
    assert found.rows == [1, 3]
    assert found.overtaken == [2, 1]


def test_those_who_join_together_share_too() -> None:
    assert admit(profiles(ODD, EVEN, EVEN, ODD), NOBODY, 2, [0] * 4, patience=9).rows == [0, 3]


def test_what_everybody_uses_speaks_for_nobody() -> None:
    """Expert 0 is used by all, so who uses only that adds nothing anywhere; who fits here must not wait for it."""
    everybody, fits = [1.0, 0.0, 0.0, 0.0], [1.0, 0.9, 0.0, 0.0]
    other = [1.0, 0.0, 0.9, 0.0]
    waiting = profiles(everybody, other, fits, everybody, other)
    assert admit(waiting, profiles(fits, fits), 1, [0] * 5, patience=9).rows == [2]


def test_alike_means_arrival_order() -> None:
    found = admit(profiles(EVEN, EVEN, EVEN), profiles(ODD), 2, [0] * 3, patience=9)
    assert found == ([0, 1], [0])


def test_more_places_than_sequences() -> None:
    assert sorted(admit(profiles(ODD, EVEN), NOBODY, 5, [0, 0], patience=9).rows) == [0, 1]
    assert admit(NOBODY, NOBODY, 3, [], patience=9) == ([], [])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nobody_is_overtaken_by_more_than_patience_allows(data: st.DataObject) -> None:
    """Sequences arrive, join and leave for as long as one likes, with whatever profiles."""
    patience = data.draw(st.integers(0, 5))
    share = st.floats(0, 1, width=32)
    waiting: list[tuple[int, Tensor]] = []
    counts: list[int] = []
    sitting: list[Tensor] = []
    arrived, begun = 0, []
    for _ in range(data.draw(st.integers(1, 8))):
        for _ in range(data.draw(st.integers(0, 4))):
            waiting.append(
                (arrived, torch.tensor(data.draw(st.lists(share, min_size=3, max_size=3))).view(1, 3))
            )
            counts.append(0)
            arrived += 1
        sitting = sitting[data.draw(st.integers(0, len(sitting))) :]
        room = data.draw(st.integers(0, 4))
        if not waiting:
            continue
        sitting_MLE = torch.stack(sitting) if sitting else torch.zeros(0, 1, 3)
        rows, counts = admit(torch.stack([p for _, p in waiting]), sitting_MLE, room, counts, patience)
        assert len(rows) == len(set(rows)) == min(room, len(waiting))
        begun += [waiting[row][0] for row in rows]
        sitting += [waiting[row][1] for row in rows]
        waiting = [one for row, one in enumerate(waiting) if row not in rows]
        assert len(counts) == len(waiting)
    order = begun + [number for number, _ in waiting]
    for place, number in enumerate(order):
        overtaken_by = sum(other > number for other in order[:place] if other in begun)
        assert overtaken_by <= patience
        if number in {n for n, _ in waiting}:
            assert overtaken_by == counts[[n for n, _ in waiting].index(number)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_next_adds_least_compared_with_chance(data: st.DataObject) -> None:
    """Against the definition, written out expert by expert."""
    share = st.integers(0, 8).map(lambda eighths: eighths / 8)
    draw = st.lists(st.lists(share, min_size=4, max_size=4), min_size=1, max_size=5)
    waiting, sitting = data.draw(draw), data.draw(draw)
    rows, _ = admit(profiles(*waiting), profiles(*sitting), 3, [0] * len(waiting), patience=9)

    def score(row: list[float], together: list[list[float]]) -> float:
        total = 0.0
        for expert, p in enumerate(row):
            absent = 1.0
            for other in together:
                absent *= 1 - other[expert]
            mean = sum(one[expert] for one in waiting + sitting) / len(waiting + sitting)
            total += p * (absent - (1 - mean) ** len(together))
        return total

    left, together = dict(enumerate(waiting)), list(sitting)
    for row in rows:
        assert score(left[row], together) <= min(score(one, together) for one in left.values()) + 1e-5
        together.append(left.pop(row))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="patience=-1"):
        admit(profiles(ODD), NOBODY, 1, [0], patience=-1)
    with pytest.raises(ValueError, match="shapes"):
        admit(profiles(ODD), torch.zeros(0, 2, 4), 1, [0], patience=1)
