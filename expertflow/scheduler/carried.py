"""One tensor that a batch carries, by its sequences and positions: the rows and columns that regrouping moves.

No meaning is attached to the numbers in it; kv_tensors.py knows where such tensors come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F


class Axis(Enum):
    """What the positions of a tensor count, and so on which side shorter sequences are padded."""

    TOKENS = "left"  # what the decoder has seen: the newest token of every row is in the last column
    SOURCE = "right"  # what the encoder read
    NONE = "no positions"  # recurrent states, all of one size


@dataclass(frozen=True, eq=False)
class Carried:
    """Sequences lie along dimension 0, positions along dimension `columns` (None for Axis.NONE).

    limit: a sliding window keeps no more columns than this.
    """

    tensor: Tensor
    axis: Axis
    columns: int | None = 2
    limit: int | None = None

    @property
    def num_rows(self) -> int:
        return self.tensor.shape[0]

    @property
    def num_columns(self) -> int:
        return 0 if self.columns is None else self.tensor.shape[self.columns]

    def width(self, length: int) -> int:
        """Columns this tensor has in a batch that is `length` positions long."""
        if self.columns is None:
            return 0
        return length if self.limit is None else min(length, self.limit)

    def layout(self) -> tuple[object, ...]:
        """What tensors of one name have in common in all batches of one model."""
        shape = [size for dim, size in enumerate(self.tensor.shape) if dim not in (0, self.columns)]
        return (shape, self.axis, self.columns, self.limit, self.tensor.dtype, self.tensor.device)

    def row(self, row: int, at_most: int | None = None) -> Tensor:
        """View of one sequence, positions first; only the `at_most` that padding would leave of it."""
        if self.columns is None:
            return self.tensor[row]
        view = self.tensor[row].movedim(self.columns - 1, 0)
        return view if at_most is None else self._kept(view, min(at_most, len(view)))

    def put(self, row: int, values: Tensor) -> None:
        """Overwrite one sequence by what `row` gave; cut off or filled with zeros on the padded side."""
        target = self.row(row)
        if self.columns is None:
            target.copy_(values)
            return
        count = min(len(values), len(target))
        self._kept(target, count).copy_(self._kept(values, count))
        padding = len(target) - count
        (target[:padding] if self.axis is Axis.TOKENS else target[count:]).zero_()

    def row_bytes(self, at_most: int) -> int:
        """Bytes of row(r, at_most)."""
        row_bytes = self.tensor[0].numel() * self.tensor.element_size()
        if self.columns is None:
            return row_bytes
        return row_bytes // max(1, self.num_columns) * min(at_most, self.num_columns)

    def empty(self, rows: int, width: int) -> Carried:
        """New memory of this layout, not filled."""
        shape = list(self.tensor.shape)
        shape[0] = rows
        if self.columns is not None:
            shape[self.columns] = width
        return replace(self, tensor=self.tensor.new_empty(shape))

    def cut(self, rows: int, width: int) -> Carried:
        """View of the first rows, and of the columns that are farthest from the padding."""
        view = self.tensor[:rows]
        if self.columns is not None:
            start = self.num_columns - width if self.axis is Axis.TOKENS else 0
            view = view.narrow(self.columns, start, width)
        return replace(self, tensor=view)

    def padded(self, width: int) -> Tensor:
        """A copy with zeros on the padded side, up to this width."""
        if self.columns is None:
            return self.tensor.clone()
        padding = width - self.num_columns
        sides = (padding, 0) if self.axis is Axis.TOKENS else (0, padding)
        behind = self.tensor.dim() - 1 - self.columns
        return F.pad(self.tensor, (0, 0) * behind + sides)

    def chosen(self, rows: Sequence[int], width: int) -> Tensor:
        """A copy of these rows in this order, cut to this width."""
        index = torch.tensor(rows, device=self.tensor.device)
        return replace(self, tensor=self.tensor.index_select(0, index)).cut(len(rows), width).tensor.clone()

    def _kept(self, row: Tensor, count: int) -> Tensor:
        return row[len(row) - count :] if self.axis is Axis.TOKENS else row[:count]
