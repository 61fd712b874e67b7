"""From which passes to learn weights, and when: in lots of some rows; once they have settled, from one lot in a few.

What is learnt while serving takes time of the step wherever nobody else can do it, and about as much of one row as
of eight. Weights and trust change slowly; what was seen (tables, frequencies) is noted after every pass.
"""

from __future__ import annotations

from typing import Generic, TypeVar

LOT_ROWS = 8  # a pass of as many is a lot by itself
SETTLED_ROWS = 512  # mixtures settle after some hundred tokens
EVERY = 4  # lots, from then on

Item = TypeVar("Item")


class Lots(Generic[Item]):
    """What passes leave to learn from, until there is enough of it."""

    def __init__(self, lot_rows: int = LOT_ROWS, settled_rows: int = SETTLED_ROWS, every: int = EVERY):
        self._lot_rows, self._settled_rows, self._every = lot_rows, settled_rows, every
        self._learnt_rows = self._rows = self._lots = 0
        self._items: list[Item] = []

    def add(self, item: Item, rows: int) -> list[Item]:
        """A pass over so many rows is over: what to learn from now, itself among it; often nothing."""
        self._rows += rows
        settled = self._learnt_rows >= self._settled_rows
        wanted = not settled or (self._lots + 1) % self._every == 0
        if wanted:
            self._items.append(item)
        if self._rows < self._lot_rows:
            return []
        full, self._items = self._items, []
        if wanted:
            self._learnt_rows += self._rows
        self._rows = 0
        self._lots += 1
        return full
