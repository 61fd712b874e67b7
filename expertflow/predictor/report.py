"""What an evaluation found, for people: a table on the terminal, and the figures of the paper.

Works on the plain dictionary of evaluate.py alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from expertflow.whole_file import write_whole

_BATCH = "8"  # of the table and of Fig. 9: the paper does not say which it drew
_OURS = 2.4  # line width of what is not a baseline
_BASELINES = ("oracle", "TLP", "SLP", "popularity", "token table", "online table", "look-ahead", "pre-gate")


def save_json(found: dict[str, Any], path: Path) -> None:
    write_whole(path, json.dumps(found, indent=1) + "\n")


def cases(found: dict[str, Any]) -> Iterator[tuple[tuple[str, str, str], list[dict[str, Any]]]]:
    """(task, side, phase) and the results of every predictor there, in the order of the evaluation."""
    keys = dict.fromkeys((row["task"], row["side"], row["phase"]) for row in found["results"])
    for key in keys:
        yield key, [row for row in found["results"] if (row["task"], row["side"], row["phase"]) == key]


def tables(found: dict[str, Any], expert_bytes: int | None = None) -> Iterator[Table]:
    """One table by task, side and phase. With expert_bytes, what wrong guesses move in MB, else in experts."""
    unit = "experts" if expert_bytes is None else "MB"
    scale = 1.0 if expert_bytes is None else expert_bytes / 1e6
    for (task, side, phase), rows in cases(found):
        domain = "in-domain" if rows[0]["in_domain"] else "cross-domain"
        title = f"{task} ({domain}), {phase}, {side}: {rows[0]['tokens']} tokens; wasted and missed in {unit}"
        table = Table(title=title, title_justify="left")
        table.add_column("predictor")
        size = _shown(rows)
        for column in ("token", f"batch {size}", "accuracy", "precision", "wasted", "missed", "ECE"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row["predictor"], *_cells(row, size, scale))
        yield table


def next_use_table(found: dict[str, Any]) -> Table | None:
    """Pairwise accuracy of eviction orders, by task; None in evaluations without it."""
    rows = [row for row in found.get("next_use", []) if row["sequences"]]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row["pairwise_accuracy"]))
    table = Table(
        title=f"Who of {rows[0]['residents']} resident experts is used sooner? Pairs in the true order, batch 1",
        title_justify="left",
    )
    table.add_column("task")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["task"], *(_share(row["pairwise_accuracy"].get(name)) for name in names))
    return table


def _shown(rows: list[dict[str, Any]]) -> str:
    """The batch size of the table: the largest that was measured, where the usual one was not."""
    sizes = {size for row in rows for size in row.get("batches", {})}
    return _BATCH if _BATCH in sizes or not sizes else max(sizes, key=int)


def _cells(row: dict[str, Any], size: str, scale: float) -> list[str]:
    if "threshold" not in row:
        return ["-"] * 7
    batch = row["batches"].get(size)
    cells = [_share(row["recall_equal_budget"])]
    if batch is None:
        cells += ["-"] * 5
    else:
        cells += [_share(batch[name]) for name in ("recall_equal_budget", "accuracy", "precision")]
        cells += [f"{batch[name] * scale:.1f}" for name in ("experts_wasted", "experts_missed")]
    return [*cells, _share(row["calibration_error"])]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


LEGEND = (
    "token, batch N: recall at equal budget, as many predicted as active. accuracy: the paper's batch-level "
    "accuracy for batches of N, its precision beside it, at the threshold where a token's precision equals "
    "its recall. wasted, missed: by batch and step, at that threshold. ECE: calibration error. SLP, look-ahead "
    "and pre-gate say nothing of the first layer: their figures leave it out."
)


def save_figures(found: dict[str, Any], folder: Path) -> list[Path]:
    """Fig. 9 (accuracy by layer), precision-recall and calibration, each as PNG and SVG, by side and phase.

    Returns the files; none where matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    written = []
    for side, phase in dict.fromkeys((row["side"], row["phase"]) for row in found["results"]):
        panels = [(key[0], rows) for key, rows in cases(found) if key[1:] == (side, phase)]
        for name, draw in (("accuracy", _accuracy), ("curves", _curve), ("calibration", _calibration)):
            written += _save(
                panels, draw, folder / f"{name}-{side}-{phase}", f"{found['model']}, {phase}, {side}"
            )
    return written


def _save(
    panels: Sequence[tuple[str, list[dict[str, Any]]]], draw: Any, stem: Path, title: str
) -> list[Path]:
    # Figure without pyplot: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels) + 2.4, 4.4), layout="constrained")
    figure.suptitle(title)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (task, rows) in zip(all_axes, panels, strict=True):
        for row in rows:
            if "threshold" in row:
                baseline = row["predictor"] in _BASELINES
                draw(axes, row, {"lw": 1.2 if baseline else _OURS, "ls": "--" if baseline else "-"})
        domain = "in-domain" if rows[0]["in_domain"] else "cross-domain"
        axes.set_title(f"{task} ({domain})")
        axes.grid(alpha=0.3)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    files = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=120)
    return files


def _accuracy(axes: Any, row: dict[str, Any], style: dict[str, Any]) -> None:
    batches = row["batches"]
    size = _BATCH if _BATCH in batches else next(iter(batches), None)
    if size is None:
        return
    values = [float("nan") if v is None else v for v in batches[size]["accuracy_by_layer"]]
    axes.plot(row["layers"], values, label=row["predictor"], marker=".", **style)
    axes.set(xlabel="MoE layer", ylabel=f"accuracy (batch of {size})", ylim=(0, 1.02))


def _curve(axes: Any, row: dict[str, Any], style: dict[str, Any]) -> None:
    points = [
        (recall, precision)
        for recall, precision in zip(row["curve"]["recall"], row["curve"]["precision"], strict=True)
        if precision is not None
    ]
    axes.plot(*zip(*points, strict=True), label=row["predictor"], **style)
    axes.set(xlabel="recall (by token)", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))


def _calibration(axes: Any, row: dict[str, Any], style: dict[str, Any]) -> None:
    said, came_true = row["reliability"]["said"], row["reliability"]["came_true"]
    points = [(s, c) for s, c in zip(said, came_true, strict=True) if s is not None]
    axes.plot(*zip(*points, strict=True), label=row["predictor"], marker=".", **style)
    axes.axline((0, 0), slope=1, color="grey", lw=0.8)
    axes.set(xlabel="probability said", ylabel="share that came true", xlim=(0, 1), ylim=(0, 1))
