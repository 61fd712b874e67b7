"""Every item, in the order of the page. A new one costs two edits: its module and its line here."""

from __future__ import annotations

from benchmarks.paper import (
    ablation,
    fig6,
    fig7,
    fig8,
    fig9,
    fig10,
    full_size,
    on_clock,
    sensitivity,
    serving,
    table1,
    table2,
)
from benchmarks.paper.item import Item

ITEMS: tuple[Item, ...] = (
    table1.ITEM,
    serving.FIG4,
    fig6.ITEM,
    on_clock.FIG6,
    fig7.ITEM,
    fig8.ITEM,
    fig9.ITEM,
    fig10.ITEM,
    on_clock.FIG10,
    table2.ITEM,
    serving.TABLE2,
    full_size.ITEM,
    ablation.ITEM,
    sensitivity.ITEM,
)
