"""Statistics for people: tables on a terminal, a heat map of experts by layer, and the JSON between them.

`collect` takes everything from a loaded model once; all else works on that plain dictionary, so that
`expertflow stats FILE.json` shows what `--stats` showed. No torch here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from expertflow.config import format_bytes
from expertflow.whole_file import write_whole

if TYPE_CHECKING:
    from expertflow.budget import MemoryPlan
    from expertflow.engine.engine import Engine
    from expertflow.engine.llm import LLM

_FORMAT = "expertflow-stats-1"


def collect(llm: LLM, engine: Engine | None = None) -> dict[str, Any]:
    """Everything about a run so far, as plain JSON. engine: where requests ran through one."""
    plan, predicting = llm.experts.plan, llm.experts.predicting
    return {
        "format": _FORMAT,
        "model": llm.name,
        "memory": {
            "budget_bytes": plan.budget_bytes,
            "total_bytes": plan.total_bytes,
            "rows": plan_rows(plan),
        },
        "timing": llm.timing.to_dict(),
        "cache": llm.stats.to_dict(),
        "prediction": predicting.stats.to_dict() if predicting is not None else None,
        "engine": engine.stats.to_dict() if engine is not None else None,
    }


def plan_rows(plan: MemoryPlan) -> list[dict[str, Any]]:
    return [{"what": what, "bytes": nbytes, "remark": remark} for what, nbytes, remark in plan.rows()]


def save_json(report: dict[str, Any], path: Path) -> None:
    write_whole(path, json.dumps(report, indent=1) + "\n")


def load_json(path: Path) -> dict[str, Any]:
    """A report that save_json wrote; ValueError for any other file."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); make one with `expertflow run ... --stats-json`"
        ) from None
    if not isinstance(report, dict) or report.get("format") != _FORMAT:
        raise ValueError(
            f"{path} holds no statistics of expertflow; make them with `expertflow run ... --stats-json`"
        )
    return report


def tables(report: dict[str, Any]) -> list[Table]:
    """Memory, experts by layer, speed."""
    return [memory_table(report), layer_table(report), speed_table(report)]


def memory_table(report: dict[str, Any]) -> Table:
    memory = report["memory"]
    table = Table(title=f"memory of {report['model']}", title_justify="left")
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("", overflow="fold")
    for row in memory["rows"]:
        table.add_row(row["what"], format_bytes(row["bytes"]), row["remark"])
    table.add_section()
    budget = memory["budget_bytes"]
    remark = (
        f"of a budget of {format_bytes(budget)}" if budget is not None else "the number of slots was given"
    )
    table.add_row("in all", format_bytes(memory["total_bytes"]), remark)
    return table


def layer_table(report: dict[str, Any]) -> Table:
    cache = report["cache"]
    held = f"{cache['num_slots']} of {cache['num_experts']} held"
    table = Table(title=f"experts by layer ({held}, I/O: {cache['io_mode']})", title_justify="left")
    for column in ("layer", "hits", "in flight", "misses", "hit ratio", "read", "GB/s", "stalled"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, layer in enumerate(cache["layers"]):
        table.add_row(str(number), *_cells(layer))
    total = {key: sum(layer[key] for layer in cache["layers"]) for key in cache["layers"][0]}
    total["read_seconds"] = cache["read_seconds"]
    table.add_section()
    table.add_row("all", *_cells(total))
    return table


def _cells(layer: dict[str, Any]) -> list[str]:
    late = layer["misses"] + layer["in_flight"]
    needed = layer["hits"] + late
    seconds = layer.get("read_seconds", 0.0)
    return [
        str(layer["hits"]),
        str(layer["in_flight"]),
        str(layer["misses"]),
        f"{layer['hits'] / needed:.1%}" if needed else "-",
        format_bytes(layer["bytes_read"]),
        f"{layer['bytes_read'] / seconds / 1e9:.2f}" if seconds else "-",
        f"{layer['stall_seconds']:.2f} s",
    ]


def speed_table(report: dict[str, Any]) -> Table:
    timing, cache = report["timing"], report["cache"]
    table = Table(title="speed", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("loading the model", f"{timing['load_seconds']:.2f} s")
    if engine := report.get("engine"):
        table.add_row("prompts", f"{engine['prompt_tokens']} tokens")
        table.add_row("generated", f"{engine['generated_tokens']} tokens in {engine['step_seconds']:.2f} s")
        table.add_row("prompts and decoding", f"{engine['tokens_per_second']:.2f} tokens/s")
        together = f"{engine['rows_per_step']:.1f} sequences, {engine['execution']}"
        table.add_row("steps", f"{engine['steps']} of {together}")
        if engine["regroupings"]:
            table.add_row("regroupings", str(engine["regroupings"]))
        if engine.get("schedule") == "auto":
            hidden = engine["hidden_predict_seconds"] + engine["hidden_group_seconds"]
            # A file that an earlier version saved does not tell look-ahead apart.
            critical = engine.get("paths_share", engine["scheduling_share"])
            ahead = engine["scheduling_share"] - critical
            share = f"{critical:.1%} of steps (look-ahead {ahead:.1%} more), {hidden:.2f} s hidden"
            table.add_row("predicting and grouping", f"{share}, late {engine['late']} times")
            if engine.get("scheduler"):  # nor does it tell of this
                table.add_row("the scheduler", engine["scheduler"])
    else:
        if timing["prefill_seconds"]:
            table.add_row("time to first token", f"{timing['first_token_seconds']:.2f} s")
            table.add_row("prompt", f"{timing['prompt_tokens']} tokens in {timing['prefill_seconds']:.2f} s")
        else:  # read beside others that decoded
            table.add_row("prompts", f"{timing['prompt_tokens']} tokens, in the time below")
        table.add_row("generated", f"{timing['generated_tokens']} tokens")
        table.add_row("decoding", f"{timing['tokens_per_second']:.2f} tokens/s")
    if cache["prefetches"]:
        useful = f"{cache['prefetches_useful']} useful, " if "prefetches_useful" in cache else ""
        unused = f"{useful}{cache['prefetches_unused']} unused, {cache['cancelled']} cancelled"
        table.add_row("prefetches", f"{cache['prefetches']} ({unused})")
    if prediction := report.get("prediction"):
        found = f"recall {prediction['recall']:.0%}, precision {prediction['precision']:.0%}"
        table.add_row("predictions", f"{found}, {prediction['predict_seconds']:.2f} s of work")
        if prediction["failed"]:
            table.add_row("the predictor failed", prediction["failed"])
        else:
            table.add_row("prefetching", prediction["gate"])
    return table


def require_matplotlib() -> None:
    """Asked before a long run, so that it does not end without its picture."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "a heat map needs matplotlib, which is not installed; `pip install 'expertflow-moe[plots]'`"
        ) from None


def save_heatmap(report: dict[str, Any], path: Path) -> None:
    """PNG (or what the suffix says): how often each layer used each expert, and how often it was read."""
    require_matplotlib()
    # Figure without pyplot: no global state, no display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    cache = report["cache"]
    panels = (("times used", cache["uses_LE"]), ("times read", cache["loads_LE"]))
    layers, experts = len(cache["uses_LE"]), max(len(row) for row in cache["uses_LE"])
    size = (max(6.0, 1.5 + 0.12 * experts), max(4.0, 2.0 + 2 * 0.16 * layers))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{report['model']}: {cache['num_slots']} of {cache['num_experts']} experts held")
    for axes, (title, counts_LE) in zip(figure.subplots(len(panels), 1), panels, strict=True):
        # Layers may differ in their number of experts; what does not exist stays blank.
        padded = [[*row, *[float("nan")] * (experts - len(row))] for row in counts_LE]
        image = axes.imshow(padded, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
        axes.set(title=title, xlabel="expert", ylabel="MoE layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise ValueError(f"cannot write the heat map to {path}: {error}; name it FILE.png") from None
