"""Every item, in the order of the page. A new one costs two edits: its module and its line here."""

from __future__ import annotations

from benchmarks.paper import fig6, table1
from benchmarks.paper.item import Item

ITEMS: tuple[Item, ...] = (table1.ITEM, fig6.ITEM)
