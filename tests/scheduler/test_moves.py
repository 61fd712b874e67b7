"""The order of moves against a plain dictionary, and the weighing of a move."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow.scheduler.moves import Place, checked, move_pays, ordered

ROWS = [Place(batch, row) for batch in range(3) for row in range(4)]


@st.composite
def partial_permutations(draw) -> dict[Place, Place]:
    count = draw(st.integers(0, len(ROWS)))
    targets, sources = (draw(st.permutations(ROWS))[:count] for _ in range(2))
    return {target: source for target, source in zip(targets, sources, strict=True) if target != source}


@given(partial_permutations())
def test_every_row_arrives_before_it_is_overwritten(source_of):
    content = {place: place for place in ROWS}
    chains = ordered(source_of)
    for chain in chains:
        set_aside = content[chain.moves[-1].source]
        for move in chain.moves:
            content[move.target] = content[move.source]
        if chain.cyclic:
            content[chain.moves[-1].target] = set_aside
    assert content == {place: source_of.get(place, place) for place in ROWS}


@given(partial_permutations())
def test_no_row_is_copied_without_need(source_of):
    """One copy for each row that moves, and one more for each cycle, which nothing can avoid."""
    chains = ordered(source_of)
    assert sum(len(chain.moves) for chain in chains) == len(source_of)
    for chain in chains:
        sources, targets = ({getattr(move, end) for move in chain.moves} for end in ("source", "target"))
        assert chain.cyclic == (sources == targets)


def test_the_layout_is_checked():
    assert checked([[(1, 0)], [(0, 1), (0, 0)]], [2, 1]) == [[(1, 0)], [(0, 1), (0, 0)]]
    with pytest.raises(ValueError, match=r"row 2 of batch 0, and the batches have \[2, 1\]"):
        checked([[(0, 2)]], [2, 1])
    with pytest.raises(ValueError, match="row -1"):
        checked([[(0, -1)]], [2, 1])
    with pytest.raises(ValueError, match="batch 2"):
        checked([[(2, 0)]], [2, 1])
    with pytest.raises(ValueError, match="row 0 of batch 1 twice"):
        checked([[(1, 0)], [(0, 0), (1, 0)]], [2, 1])
    with pytest.raises(ValueError, match="without rows"):
        checked([[(1, 0)], []], [2, 1])


def test_a_move_pays_when_the_loads_it_saves_take_longer():
    """1 GB at 10 GB/s is 100 ms; a load of 15 ms is worth it from the seventh on."""
    assert not move_pays(1e9, 10e9, loads_saved=6, seconds_per_load=0.015)
    assert move_pays(1e9, 10e9, loads_saved=7, seconds_per_load=0.015)
    assert not move_pays(1e9, 10e9, loads_saved=1000, seconds_per_load=0.0), "hidden loads cost nothing"
    assert not move_pays(0, 10e9, loads_saved=0, seconds_per_load=0.015), "arrival order is kept at a tie"
    with pytest.raises(ValueError, match="bytes_per_second=0"):
        move_pays(1e9, 0, 1, 1)
