"""Ablation: predictor x policy x token scheduler x order of execution; which part earns what, in stalls and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.paper import recordings
from benchmarks.paper.item import Item, Part, Result, Row, Say, Section, Settings, Table
from benchmarks.paper.part_predictors import (
    AHEAD,
    BOTH,
    NONE,
    ORACLE,
    OURS,
    PAPER,
    PAPER_MINUTES,
    TABLE,
    all_parts,
)
from benchmarks.paper.simulated import A40, slots
from benchmarks.paper.units import Way, unit_workload
from expertflow.sim.clock import Outcome, Simulation
from expertflow.sim.compare import KNOWN
from expertflow.sim.hardware import Costs, costs, hardware, model_size
from expertflow.sim.workload import Workload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READY, BLOCKING = "ready first", "blocking"
TURNS, GROUPED, KNOWN_PATHS, JOINT = "turns", "grouped", "grouped by true paths", "joint"
_WAYS: dict[str, Way] = {TURNS: "split", GROUPED: "grouped", KNOWN_PATHS: "known", JOINT: "joint"}
BATCH, SHARE = 8, 0.25  # sequences of each of two batches; of the experts that fit
STEPS, QUICK_STEPS, SEQUENCES, QUICK_SEQUENCES = 8, 3, 64, 32


@dataclass(frozen=True)
class Case:
    """A recording at the size of a published model."""

    recording: str
    task: str
    size: str

    @property
    def name(self) -> str:
        return self.recording


CASES = (
    Case("tiny-moe", "chat", "qwen1.5-moe-a2.7b"),  # no published model has its shape; its experts as Qwen's
    Case("qwen1.5-moe", "chat", "qwen1.5-moe-a2.7b"),
    Case("switch-128", "translation", "switch-base-128"),
)


class Cell(NamedTuple):
    predictor: str
    policy: str
    way: str
    order: str


def cells(predictors: Sequence[str]) -> Iterator[Cell]:
    """Every combination that means something, of the predictors there are.

    lru and lfu ask no predictor. Grouping needs paths known before the pass: look-ahead alone has none.
    """
    groups_by = [name for name in predictors if name not in (NONE, AHEAD, ORACLE)]
    for order in (READY, BLOCKING):
        for policy in ("lru", "lfu"):
            yield Cell(NONE, policy, TURNS, order)
            yield from (Cell(name, policy, GROUPED, order) for name in groups_by[-1:])
        for policy in ("plec", "plec-paper"):
            for name in predictors:
                if policy == "plec-paper" and (name in (NONE, AHEAD) or order == BLOCKING):
                    continue  # as published it plans from a prediction
                yield Cell(name, policy, TURNS, order)
                if name in groups_by or name == ORACLE:
                    yield Cell(name, policy, KNOWN_PATHS if name == ORACLE else GROUPED, order)
    for name in (*groups_by[-1:], ORACLE):
        yield Cell(name, "plec", JOINT, READY)
    yield Cell(ORACLE, "belady-prefetch", KNOWN_PATHS, READY)
    yield Cell(ORACLE, "belady-prefetch", JOINT, READY)


def parts(settings: Settings) -> list[Part]:
    for case in CASES:
        recordings.recording(settings, case.recording, case.task)
    chosen = CASES[:1] if settings.quick else CASES
    return [Part(case.name, partial(_simulate, settings, case)) for case in chosen]


def _simulate(settings: Settings, case: Case, say: Say) -> list[Row]:
    most = QUICK_SEQUENCES if settings.quick else SEQUENCES
    foretold = all_parts(settings, case.recording, case.task, most, say)
    size = model_size(case.size)
    cost = costs(hardware(A40), size.expert_bytes, size.dense_bytes)
    steps = QUICK_STEPS if settings.quick else STEPS
    workloads: dict[tuple[str, str], Workload] = {}
    rows = []
    for cell in cells(list(foretold)):
        key = cell.predictor, cell.way
        if key not in workloads:
            workloads[key] = unit_workload(foretold[cell.predictor], BATCH, _WAYS[cell.way], steps)
        rows.append(
            {"case": case.name, **cell._asdict(), **run(cell, workloads[key], cost, size.expert_bytes)}
        )
    say(f"{case.name}: {len(rows)} combinations")
    return rows


def run(cell: Cell, workload: Workload, cost: Costs, expert_bytes: int) -> Row:
    """A step is one token of each sequence of both batches, whoever shares a pass."""
    policy = KNOWN[cell.policy]
    num_slots = slots(workload, SHARE * max(workload.shape.experts_per_layer))
    chosen = policy(workload.shape, num_slots)
    chosen.blocking = cell.order == BLOCKING
    outcome = Simulation(chosen, cost).run(workload.passes)
    return per_step(outcome, workload.rows / (2 * BATCH), expert_bytes)


def per_step(outcome: Outcome, steps: float, expert_bytes: int) -> Row:
    return {
        "step_seconds": outcome.seconds / steps,
        "stall_seconds": outcome.stall_seconds / steps,
        "arithmetic_seconds": outcome.compute_seconds / steps,
        "bytes_per_step": round(outcome.loads * expert_bytes / steps),
        "hit_ratio": round(outcome.hit_ratio, 4),
    }


# What is added, one part after the other; a rung whose predictor is not there is left out.
LADDER: tuple[tuple[str, Cell], ...] = (
    ("Cache-MoE: LRU, waits for all", Cell(NONE, "lru", TURNS, BLOCKING)),
    ("+ computes ready experts first", Cell(NONE, "lru", TURNS, READY)),
    ("+ PLEC, by frequencies alone", Cell(NONE, "plec", TURNS, READY)),
    ("+ the online table", Cell(TABLE, "plec", TURNS, READY)),
    ("or the paper's RPP", Cell(PAPER, "plec", TURNS, READY)),
    ("+ our RPP", Cell(OURS, "plec", TURNS, READY)),
    ("or look-ahead alone", Cell(AHEAD, "plec", TURNS, READY)),
    ("+ look-ahead", Cell(BOTH, "plec", TURNS, READY)),
    ("+ TS", Cell("best", "plec", GROUPED, READY)),
    ("joint instead of TS", Cell("best", "plec", JOINT, READY)),
    ("oracle, TS by true paths", Cell(ORACLE, "plec", KNOWN_PATHS, READY)),
    ("bound: belady-prefetch, TS by true paths", Cell(ORACLE, "belady-prefetch", KNOWN_PATHS, READY)),
    ("bound: belady-prefetch, joint", Cell(ORACLE, "belady-prefetch", JOINT, READY)),
)


def ladder(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    by = {Cell(row["predictor"], row["policy"], row["way"], row["order"]): row for row in rows}
    best = next((name for name in (BOTH, OURS, TABLE) if Cell(name, "plec", GROUPED, READY) in by), TABLE)
    found = []
    for title, cell in LADDER:
        wanted = cell._replace(predictor=best) if cell.predictor == "best" else cell
        if wanted in by:
            found.append((title, by[wanted]))
    return found


def earned(rows: Sequence[Row]) -> Iterator[str]:
    """What each part earns, taken alone out of the whole: in words, made of the numbers."""
    by = {Cell(row["predictor"], row["policy"], row["way"], row["order"]): row for row in rows}
    best = next((name for name in (BOTH, OURS, TABLE) if Cell(name, "plec", GROUPED, READY) in by), TABLE)
    whole = Cell(best, "plec", GROUPED, READY)
    without = {
        "computing ready experts first": whole._replace(order=BLOCKING),
        "the token scheduler": whole._replace(way=TURNS),
        "PLEC (LRU in its place, no prefetch)": whole._replace(policy="lru"),
        "our PLEC (the paper's in its place)": whole._replace(policy="plec-paper"),
    }
    if best == BOTH:
        without["look-ahead"] = whole._replace(
            predictor=OURS if Cell(OURS, "plec", GROUPED, READY) in by else TABLE
        )
    for part, cell in without.items():
        if cell in by:
            stall = by[cell]["stall_seconds"] - by[whole]["stall_seconds"]
            nbytes = by[cell]["bytes_per_step"] - by[whole]["bytes_per_step"]
            ratio = by[cell]["step_seconds"] / by[whole]["step_seconds"]
            yield (
                f"{part}: {stall * 1e3:+.1f} ms of stall and {nbytes / 1e6:+.0f} MB per step without it; a step takes "
                f"{ratio:.2f} times as long"
            )


def section(result: Result) -> Section:
    cases = list(dict.fromkeys(row["case"] for row in result.rows))
    tables, notes = [], [_how(result)]
    for case in cases:
        rows = [row for row in result.rows if row["case"] == case]
        tables.append(_table(case, ladder(rows)))
        notes.append(f"{case}, the whole with TS less one part: " + "; ".join(earned(rows)) + ".")
    notes.append(
        "Look-ahead needs the hidden states of the recorded model: the repository has the weights of the embedded "
        "model (tiny-moe) alone."
    )
    return Section(
        "hit ratios of PLEC and LRU (Fig. 10) and the scheduler (Table 2); no other part alone.",
        notes,
        tables,
    )


def _how(result: Result) -> str:
    said = result.conditions
    return (
        f"Two batches of {said['batch']}, a quarter of the experts cached, {said['hardware']}, {said['steps']} steps "
        f"of each answer. A step: one token of each sequence of both batches. Predictors: {said['predictor']}; the "
        f"paper's RPP at most {PAPER_MINUTES:g} minutes. The routes of tiny-moe stand for no published model and are "
        f"given the experts of Qwen1.5-MoE. All {len(result.rows)} combinations are in the JSON."
    )


def _table(case: str, rungs: Sequence[tuple[str, Row]]) -> Table:
    first = rungs[0][1]["step_seconds"] if rungs else 1.0
    lines = [
        (
            title,
            f"{row['step_seconds'] * 1e3:.1f}",
            f"{row['stall_seconds'] * 1e3:.1f}",
            f"{row['bytes_per_step'] / 1e6:.0f}",
            f"{row['hit_ratio']:.3f}",
            f"{first / row['step_seconds']:.2f}x",
        )
        for title, row in rungs
    ]
    header = ("", "ms per step", "stalled ms", "MB per step", "hits", "speed-up")
    return Table(f"{case}: one part after the other", header, lines)


def figures(result: Result) -> dict[str, Figure]:
    from benchmarks.paper import style

    cases: Mapping[str, list[tuple[str, Row]]] = {
        case: ladder([row for row in result.rows if row["case"] == case])
        for case in dict.fromkeys(row["case"] for row in result.rows)
    }
    figure, axes = style.new_figure(1, len(cases), width=7.0, height=2.6)
    for (panel,), (case, rungs) in zip(axes, cases.items(), strict=True):
        titles = [title for title, _ in rungs][::-1]
        stalls = [row["stall_seconds"] * 1e3 for _, row in rungs][::-1]
        sums = [row["arithmetic_seconds"] * 1e3 for _, row in rungs][::-1]
        panel.barh(titles, sums, color=style.GREEN, label="arithmetic")
        panel.barh(titles, stalls, left=sums, color=style.ORANGE, label="stalled")
        panel.set_title(case)
        panel.set_xlabel("ms per step")
        panel.grid(axis="y", visible=False)
    style.legend_above(figure, axes[0][0])
    return {f"{result.name}-{result.mode}": figure}


def conditions(settings: Settings) -> dict[str, Any]:
    chosen = CASES[:1] if settings.quick else CASES
    return {
        "hardware": A40,
        "batch": BATCH,
        "share": SHARE,
        "steps": QUICK_STEPS if settings.quick else STEPS,
        "sequences": QUICK_SEQUENCES if settings.quick else SEQUENCES,
        **recordings.conditions(settings, [(case.recording, case.task) for case in chosen]),
    }


ITEM = Item("ablation", "simulated", "Ablation: which part earns what", conditions, parts, section, figures)
