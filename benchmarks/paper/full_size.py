"""Fig. 8 on the clock: models at their published size in the paper's memory, by benchmarks.full_size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.paper.item import (
    ROOT,
    Item,
    Part,
    Result,
    Row,
    Say,
    Section,
    Settings,
    Skipped,
    Table,
    Target,
)
from benchmarks.rivals import ACCELERATE, LLAMA_CPP
from benchmarks.shapes import PUBLISHED

TOKENS, THREADS = 24, 2
FASTER = 7.0  # asked of us, not by the paper, which has neither of these rivals


def parts(settings: Settings) -> list[Part]:
    if settings.quick:
        raise Skipped("a quick run writes no checkpoints of tens of gigabytes; leave --quick out")
    return [Part(name, partial(_measure, settings, name)) for name in PUBLISHED]


def _measure(settings: Settings, name: str, say: Say) -> list[Row]:
    """In processes of its own; raises ValueError where it failed. A model without room is a row that says so."""
    answer = settings.out / f"full-size-{name}.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.full_size",
        "--models",
        name,
        "--json",
        str(answer.resolve()),
    ]
    command += ["--folder", str((settings.out / "checkpoints").resolve()), "--tokens", str(TOKENS)]
    if settings.llama_cpp is not None:
        command += ["--llama-cpp", str(settings.llama_cpp.resolve())]
    settings.out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [*command, "--threads", str(THREADS)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode != 0:
        raise ValueError(f"benchmarks.full_size failed: {' | '.join(done.stderr.strip().splitlines()[-3:])}")
    metrics: dict[str, Any] = json.loads(answer.read_text())["metrics"]
    answer.unlink()
    rows = [{"model": model, "not_run": why} for model, why in metrics["skipped"].items()]
    say(f"{name}: {len(metrics['runs'])} systems{', skipped' if rows else ''}")
    return rows + metrics["runs"]


def section(result: Result) -> Section:
    ran = [row for row in result.rows if "tokens_per_s" in row]
    others = [row for row in result.rows if "tokens_per_s" not in row]
    notes = [
        "Published shapes, all layers and every byte on the disk; random weights, so nothing here is of text. Tokens "
        "and experts are those of recordings of small models with the same layers, experts and top-k (`zoo/traces`), "
        "decoded at batch 1 in a memory cgroup. Bound: direct reads as fast as they were measured beside it."
    ]
    if any(row["system"] == LLAMA_CPP for row in ran):
        notes.append(
            "llama.cpp cannot be told what to route: it decodes random tokens, as many experts for each, by the "
            "checkpoint's random routers. So its hits are other ones than ours, which are in the table."
        )
    if disturbed := [row for row in ran if row.get("disturbed")]:
        worst = max((row["others"] or 0.0) + (row["stolen"] or 0.0) for row in disturbed)
        notes.append(
            f"{len(disturbed)} of {len(ran)} runs were disturbed, others having up to {worst:.0%} of the processors: "
            "their tokens per second are not to be believed; bytes, hits and peaks are."
        )
    notes += [f"{row['model']}, {row.get('system', 'all')}: not run: {reason(row)}" for row in others]
    return Section(
        "15.26 to 1.03 GB on Switch-128, 31.35 to 6.38 GB on DeepSeek-MoE, 35.21 to 6.52 GB on Qwen1.5 (Fig. 8).",
        notes,
        [_table(ran)],
        [target for row in ran if row["system"] == "ours" for target in _targets(row, ran)],
    )


def reason(row: Row) -> str:
    return str(row.get("not_run") or row.get("error"))


def _targets(ours: Row, ran: list[Row]) -> Iterator[Target]:
    """The paper's memory where all layers ran; over the rivals that decoded the same, what we asked of ourselves."""
    model = PUBLISHED[ours["model"]]
    if ours["layers"] == ours["published_layers"]:
        at = f"a cgroup of {ours['limit_bytes'] / 1e9:.2f} GB, the interpreter and libraries included"
        peak, asked = ours["peak_bytes"] / 1e9, model.limit_bytes / 1e9
        yield Target(f"peak memory, {model.title}", asked, peak, "GB", at, lower_is_better=True)
    for rival in ran:
        if rival["model"] == ours["model"] and rival["system"] in (ACCELERATE, LLAMA_CPP):
            share = ours["limit_bytes"] / ours["checkpoint_bytes"]
            at = f"batch {ours['batch']}, memory of {share:.2f} of the weights, the same cgroup"
            name, theirs = f"{model.title} over {rival['system']}", rival["tokens_per_s"]
            read = ours.get("bound_tokens_per_s")  # None where nothing had to be read
            bound = None if read is None else read / theirs
            of = "our bytes at the disk's pace"
            yield Target(name, FASTER, ours["tokens_per_s"] / theirs, "x", at, bound, of, in_paper=False)


def _table(rows: list[Row]) -> Table:
    lines = [
        (
            f"{row['model']}, {row['layers']} of {row['published_layers']} layers",
            f"{row['checkpoint_bytes'] / 1e9:.1f} GB",
            row["system"],
            f"{row['peak_bytes'] / 1e9:.2f} GB" if row["peak_bytes"] else "",
            f"{row['tokens_per_s']:.2f}" + (" (disturbed)" if row.get("disturbed") else ""),
            f"{row['bound_tokens_per_s']:.2f}" if "bound_tokens_per_s" in row else "",
            f"{row['hit_ratio']:.3f}" if "hit_ratio" in row else "",
            f"{row['bytes_per_step'] / 1e6:.0f}" if "bytes_per_step" in row else "",
            str(row.get("major_faults", "")),
        )
        for row in rows
    ]
    header = ("", "checkpoint", "system", "peak", "tokens/s", "bound", "hits", "MB per step", "major faults")
    return Table("Decoding at full size", header, lines)


def conditions(settings: Settings) -> dict[str, Any]:
    return {"models": list(PUBLISHED), "tokens": TOKENS, "threads": THREADS}


ITEM = Item("full-size", "measured", "Models at full size", conditions, parts, section)
