"""Pinned host memory: page-locked, so that a device copies from it while the host goes on.

torch rounds each allocation up to a power of two and keeps it for the process. So memory is asked for in blocks of
such sizes, and a budget counts the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertflow.store.layout import PAGE, aligned_buffer

_LEAST_BLOCK_BYTES = 256 << 20
_PIECES_PER_BLOCK = 8  # at least, so that what is left at a block's end is at most a ninth of it


def pinned_block(nbytes: int) -> Tensor:
    """uint8[nbytes], page-aligned. RuntimeError where torch sees no accelerator to pin it for."""
    block = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    assert block.data_ptr() % PAGE == 0, "pinned memory is not page-aligned"
    return block


def pieces_per_block(budget_bytes: int, piece_bytes: int, most: int) -> list[int]:
    """How many pieces each pinned block holds, `most` in all, so that the blocks fit into the budget."""
    counts: list[int] = []
    block = max(_LEAST_BLOCK_BYTES, _power_of_two_from(_PIECES_PER_BLOCK * piece_bytes))
    while most > 0:
        if most * piece_bytes < block:
            block = min(block, _power_of_two_from(most * piece_bytes))
        while block > budget_bytes:
            block //= 2
        count = min(most, block // piece_bytes)
        if count == 0:
            break
        counts.append(count)
        budget_bytes -= block
        most -= count
    return counts


def host_pieces(per_block: Sequence[int], piece_bytes: int, pinned: bool) -> list[Tensor]:
    """Page-aligned pieces of host memory, so many in each block. piece_bytes: a page multiple."""
    assert piece_bytes % PAGE == 0, piece_bytes
    pieces: list[Tensor] = []
    for count in per_block:
        block = (pinned_block if pinned else aligned_buffer)(count * piece_bytes)
        pieces += block.split(piece_bytes)
    return pieces


def _power_of_two_from(nbytes: int) -> int:
    return 1 << (nbytes - 1).bit_length()
