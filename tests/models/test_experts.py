"""Grouping, padding and the fixed-order sum, on a plain in-memory stand-in for the cache."""

from __future__ import annotations

import torch

from expertflow.models.experts import pad_rows


def test_row_counts_collapse_to_a_few_sizes() -> None:
    """Each number of rows made oneDNN keep another kernel, 0.66 MiB apiece, outside the memory budget."""
    sizes = {pad_rows(torch.ones(rows, 4, dtype=torch.bfloat16)).shape[0] for rows in range(1, 1025)}
    assert len(sizes) <= 32
    for rows in range(1, 1025):
        padded = pad_rows(torch.ones(rows, 4, dtype=torch.bfloat16))
        assert rows <= padded.shape[0] <= max(8, rows * 1.25)
        assert padded[:rows].eq(1).all()
        assert padded[rows:].eq(0).all()


def test_full_precision_rows_are_left_alone() -> None:
    rows = torch.ones(5, 4)
    assert pad_rows(rows) is rows
