"""Which passes to learn weights from: all until they have settled, then one in a few.

What is learnt while serving takes time of the step wherever nobody else can do it. Weights and trust change slowly;
what was seen (tables, frequencies) is noted after every pass.
"""

from __future__ import annotations

SETTLED_ROWS = 512  # mixtures settle after some hundred tokens
EVERY = 4  # passes, from then on


class Pace:
    def __init__(self, settled_rows: int = SETTLED_ROWS, every: int = EVERY):
        self._settled_rows, self._every = settled_rows, every
        self._rows = self._passes = 0

    def due(self, rows: int) -> bool:
        """A pass over so many rows is over: whether to learn from it."""
        self._passes += 1
        if self._rows < self._settled_rows:
            self._rows += rows
            return True
        return self._passes % self._every == 0
