"""Every item, in the order of the page. A new one costs two edits: its module and its line here."""

from __future__ import annotations

from benchmarks.paper import ablation, fig6, fig7, fig8, fig9, fig10, sensitivity, table1, table2
from benchmarks.paper.item import Item

ITEMS: tuple[Item, ...] = (
    table1.ITEM,
    fig6.ITEM,
    fig7.ITEM,
    fig8.ITEM,
    fig9.ITEM,
    fig10.ITEM,
    table2.ITEM,
    ablation.ITEM,
    sensitivity.ITEM,
)
