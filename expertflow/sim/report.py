"""Rows of a comparison as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

from expertflow.sim.compare import NOBODY

LEGEND = (
    "hits: there when the layer opened, as the paper counts. LRU: shares per layer, loads overlapped. ratio: time "
    "on the link to arithmetic. belady: the fewest bytes anyone can move. belady-prefetch: knows all that comes; "
    "plec, oracle: knows this step. Prompts are not simulated."
)


def tables(rows: Sequence[dict[str, Any]], title: str) -> Iterator[Table]:
    """One table for each batch, cache size and link; `title` says what the trace stands for."""

    def condition(row: dict[str, Any]) -> tuple:
        return row["batch"], row["in_turn"], row["cache_size"], row["hardware"], row["lru_ratio"]

    for (batch, in_turn, cache_size, hardware, ratio), group in groupby(rows, condition):
        batches = f"two batches of {batch} in turn" if in_turn else f"batch {batch}"
        link = hardware if ratio is None else f"a link on which LRU's ratio is {ratio:g}"
        table = Table(
            title=f"{title}\n{batches}, {cache_size:g} experts per layer, {link}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("policy (predictor)", no_wrap=True)
        for header in ("slots", "hits", "MB/step", "ms/step", "stall", "link busy", "ratio", "to LRU"):
            table.add_column(header, justify="right")
        for row in group:
            table.add_row(
                row["policy"] if row["predictor"] == NOBODY else f"{row['policy']} ({row['predictor']})",
                str(row["slots"]),
                f"{row['hit_ratio']:.3f}",
                f"{row['bytes_per_step'] / 1e6:.1f}",
                f"{row['step_seconds'] * 1e3:.2f}",
                f"{row['stall_seconds'] / row['step_seconds']:.0%}",
                f"{row['link_busy']:.0%}",
                f"{row['transfer_to_compute']:.2f}",
                f"{row['time_to_lru']:.2f}",
            )
        yield table
