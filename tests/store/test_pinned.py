from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertflow.store import pinned
from expertflow.store.layout import PAGE, aligned_buffer
from expertflow.store.pinned import host_pieces, pieces_per_block, pinned_block

MIB, GIB = 1 << 20, 1 << 30


def rounded(nbytes: int) -> int:
    """What torch's allocator of pinned memory takes for so many bytes."""
    return 1 << (nbytes - 1).bit_length()


@given(
    budget=st.integers(0, 64 * GIB), piece=st.integers(1, 800 * MIB // PAGE).map(PAGE.__mul__),
    most=st.integers(0, 3000),
)  # fmt: skip
def test_blocks_fit_into_the_budget_and_waste_little(budget, piece, most):
    counts = pieces_per_block(budget, piece, most)
    assert sum(counts) <= most
    assert sum(rounded(count * piece) for count in counts) <= budget
    if sum(counts) < most and budget > 0:
        # What is lost: a ninth of each block, and at the end less than half of what no full block fits into.
        block = max(256 * MIB, rounded(8 * piece))
        assert sum(counts) * piece >= 8 / 9 * (budget - block) - 2 * piece


@pytest.mark.parametrize(
    ("budget", "piece", "most", "expected"),
    [
        (2 * GIB, 256 * MIB, 100, [8]),
        (2 * GIB, 336 * MIB, 100, [6]),  # Mixtral: one in a block of its own would take 512 MiB
        (10 * GIB, 17 * MIB, 60, [15, 15, 15, 15]),
        (10 * GIB, 17 * MIB, 17, [15, 2]),
        (MIB, 17 * MIB, 17, []),
    ],
)
def test_examples(budget, piece, most, expected):
    assert pieces_per_block(budget, piece, most) == expected


def test_pieces_are_pages_that_do_not_touch():
    pieces = host_pieces([2, 1], 2 * PAGE, pinned=False)
    assert [piece.numel() for piece in pieces] == [2 * PAGE] * 3
    assert all(piece.data_ptr() % PAGE == 0 for piece in pieces)
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    assert [piece.unique().tolist() for piece in pieces] == [[0], [1], [2]]


def test_pinned_pieces_come_from_pinned_blocks(monkeypatch):
    blocks = []

    def block(nbytes: int) -> torch.Tensor:
        blocks.append(nbytes)
        return aligned_buffer(nbytes)

    monkeypatch.setattr(pinned, "pinned_block", block)
    assert len(host_pieces([2, 1], PAGE, pinned=True)) == 3
    assert blocks == [2 * PAGE, PAGE]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without accelerator")
def test_without_an_accelerator_nothing_is_pinned():
    with pytest.raises(RuntimeError, match="accelerator"):
        pinned_block(PAGE)
