"""Table 1: layers, parameters, experts and their share, counted from the published configurations."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.paper.item import Item, Part, Result, Row, Say, Section, Settings, Table
from benchmarks.paper.published import MODELS, Published, count, on_meta

_CLOSE = 0.02  # of the paper's number; it prints two digits


def parts(settings: Settings) -> list[Part]:
    return [Part(model.name, partial(_count, model)) for model in MODELS]


def _count(model: Published, say: Say) -> list[Row]:
    found = count(on_meta(model.config()))
    row = asdict(found) | {"activated": found.activated, "in_paper": asdict(model.in_paper)}
    return [{"model": model.name, **row}]


def section(result: Result) -> Section:
    header = (
        "",
        "layers",
        "activated / all parameters",
        "experts",
        "routed experts' share",
        "with shared experts",
    )
    rows = []
    notes = [
        "Layers are those with routed experts (both stacks of Switch). Activated: by one token, embeddings "
        "and everything dense included. In brackets the paper's."
    ]
    for row in result.rows:
        paper, total = row["in_paper"], row["total"]
        rows.append(
            (
                row["model"],
                f"{row['layers']} ({paper['layers']})",
                f"{row['activated'] / 1e9:.2f} / {total / 1e9:.2f} B ({paper['activated']:.2f} / "
                f"{paper['total']:.2f})",
                f"{row['top_k']} of {row['experts']} ({paper['top_k']} of {paper['experts']})",
                f"{row['routed'] / total:.2%} ({paper['share']:.2f} %)",
                f"{(row['routed'] + row['shared']) / total:.2%}" if row["shared"] else "",
            )
        )
        notes += _differences(row)
    return Section(
        "six models, 0.22 to 12.9 billion of their 1.98 to 46.7 billion parameters activated, 88.95 to "
        "97.75 % of all experts'.",
        notes,
        [Table("Counted from the configurations", header, rows)],
    )


def _differences(row: Row) -> list[str]:
    """A sentence for each number that is further from the paper's than its rounding explains."""
    paper, total = row["in_paper"], row["total"]
    ours: dict[str, tuple[float, float]] = {
        "activated parameters in billions": (row["activated"] / 1e9, paper["activated"]),
        "parameters in billions": (total / 1e9, paper["total"]),
    }
    shares = [100 * row["routed"] / total, 100 * (row["routed"] + row["shared"]) / total]
    ours["the experts' share in per cent"] = (
        min(shares, key=lambda s: abs(s - paper["share"])),
        paper["share"],
    )
    return [
        f"{row['model']}: {what}: {got:.2f} by the configuration, {said:.2f} in the paper."
        for what, (got, said) in ours.items()
        if abs(got - said) > max(_CLOSE * said, 0.005)
    ]


def conditions(settings: Settings) -> dict[str, Any]:
    return {"models": [model.size for model in MODELS]}


ITEM = Item("table1", "counted", "Table 1: the models", conditions, parts, section)
