"""Sensitivity: when prediction helps, and when it does not, by link, expert size, experts, batch and predictor.

One thing is varied at a time, around conditions in the middle of the paper's: the recorded routes of
Qwen1.5-MoE, a quarter of its experts cached, batches of 8, an A40. What was not recorded (8 to 512 experts, batches
beyond the recording) is drawn by synthetic.py, as skewed and correlated as that recording, and labelled so; there the
predictor is an oracle degraded to the recall that ours has on the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from benchmarks.paper import recordings
from benchmarks.paper.degraded import degraded, recall
from benchmarks.paper.item import Item, Part, Result, Row, Say, Section, Settings, Table
from benchmarks.paper.simulated import A40, slots
from benchmarks.paper.synthetic import FAR, Knobs, as_trace, calibrate, draw, measure
from expertflow.sim.clock import Outcome, Simulation
from expertflow.sim.compare import KNOWN
from expertflow.sim.hardware import Hardware, ModelSize, costs, hardware, model_size
from expertflow.sim.workload import Foretold, Workload, foretell, make_workload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORDING, TASK, SIZE = "qwen1.5-moe", "chat", "qwen1.5-moe-a2.7b"
BATCH, SHARE = 8, 0.25  # of the experts that fit
STEPS, QUICK_STEPS, SETTLE = 16, 8, 4  # passes; the first ones fill the cache and do not count
LINKS = (1, 2, 4, 8, 16, 25, 32, 64)  # GB/s
EXPERT_MB = (1, 4, 17.3, 64, 350)  # Switch's is 18.9 in float32, Mixtral's 352
EXPERTS = (8, 16, 32, 60, 128, 256, 512)
BATCHES, DRAWN_BATCHES = (1, 2, 4, 8, 16, 32, 64), (32, 128, 256)
SWAPS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
DRAWN_LAYERS = 8
RECORDED, DRAWN = "recorded", "synthetic"
LRU, CACHE_MOE, OURS, ORACLE, BOUND = "lru", "cache-moe", "plec, predicted", "plec, oracle", "belady-prefetch"


@dataclass(frozen=True)
class Axis:
    """One thing that is varied. quick: every so many values."""

    name: str
    title: str
    unit: str
    values: Sequence[float]

    def chosen(self, quick: bool) -> Sequence[float]:
        return self.values[:: max(1, len(self.values) // 3)] if quick else self.values


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("link", "The link from slow to fast memory", "GB/s", LINKS),
        Axis("expert", "The size of an expert", "MB", EXPERT_MB),
        Axis("experts", "Experts per layer", "experts", EXPERTS),
        Axis("batch", "Sequences that decode together", "sequences", sorted({*BATCHES, *DRAWN_BATCHES})),
        Axis("predictor", "How good the predictor is", "of the named experts wrong", SWAPS),
    )
}


@dataclass(frozen=True)
class Condition:
    """Everything but the routes. expert_bytes scales what a product reads, too."""

    machine: Hardware
    size: ModelSize

    @staticmethod
    def usual() -> Condition:
        return Condition(hardware(A40), model_size(SIZE))


@dataclass(frozen=True)
class Routes:
    """The recorded routes with what ours predicts of them, and the knobs of synthetic ones like them; made once."""

    told: Callable[[], Foretold]
    knobs: Callable[[], Knobs]


def routes_of(settings: Settings, say: Say = lambda text: None) -> Routes:
    @cache
    def told() -> Foretold:
        return recordings.told(settings, RECORDING, TASK, say)["ours"]

    @cache
    def knobs() -> Knobs:
        routes = [s.target_routes_TLK[s.num_prefill :] for s in told().sequences]
        experts = max(told().meta.experts_per_layer)
        long_enough = [routes_TLK for routes_TLK in routes if len(routes_TLK) > FAR]
        return calibrate(measure(long_enough, experts), experts, told().top_k, settings.seed)

    return Routes(told, knobs)


def parts(settings: Settings) -> list[Part]:
    recordings.recording(settings, RECORDING, TASK)
    routes = routes_of(settings)
    return [
        Part(
            f"{axis.name} {value:g}, {source}",
            partial(_simulate, settings, routes, axis.name, value, source),
        )
        for axis in AXES.values()
        for value in axis.chosen(settings.quick)
        for source in sources(axis.name, value)
    ]


def sources(axis: str, value: float) -> list[str]:
    if axis == "experts":
        return [DRAWN]
    if axis == "batch":
        return [*([RECORDED] if value in BATCHES else []), *([DRAWN] if value in DRAWN_BATCHES else [])]
    return [RECORDED]


def _simulate(
    settings: Settings, routes: Routes, axis: str, value: float, source: str, say: Say
) -> list[Row]:
    batch = int(value) if axis == "batch" else BATCH
    steps = QUICK_STEPS if settings.quick else STEPS
    condition = Condition.usual()
    if axis == "link":
        condition = replace(condition, machine=replace(condition.machine, link_bytes_per_s=value * 1e9))
    if axis == "expert":
        condition = replace(condition, size=replace(condition.size, expert_bytes=round(value * 1e6)))
    told = routes.told()
    if source == DRAWN:
        experts = int(value) if axis == "experts" else condition.size.experts
        told = drawn(
            routes.knobs(), experts, min(told.top_k, experts // 4), batch, steps, recall(told), settings.seed
        )
    if axis == "predictor":
        told = degraded(replace(told, absent_TCLE=None), value, settings.seed)
    known = {"axis": axis, "value": value, "source": source, "recall": round(recall(told), 4)}
    return [known | row for row in compared(told, batch, condition, steps)]


def drawn(
    knobs: Knobs, experts: int, top_k: int, batch: int, steps: int, recalled: float, seed: int
) -> Foretold:
    """Synthetic routes of one batch, and a predictor of this recall."""
    trace = as_trace(draw(knobs, experts, top_k, DRAWN_LAYERS, batch, steps, seed), experts)
    return degraded(foretell(trace.meta, trace.sequences, "oracle"), 1 - recalled, seed)


def compared(told: Foretold, batch: int, condition: Condition, steps: int) -> list[Row]:
    """LRU, Cache-MoE, PLEC with this predictor, with an oracle, and the bound, on the same steps."""
    predicted = make_workload(told, batch, steps)
    oracle = make_workload(replace(told, prediction="oracle"), batch, steps)
    runs: dict[str, tuple[str, Workload]] = {
        LRU: ("lru", oracle),
        CACHE_MOE: ("cache-moe", oracle),
        OURS: ("plec", predicted),
        ORACLE: ("plec", oracle),
        BOUND: ("belady-prefetch", oracle),
    }
    cost = costs(condition.machine, condition.size.expert_bytes, condition.size.dense_bytes)
    num_slots = slots(oracle, SHARE * max(oracle.shape.experts_per_layer))
    found: dict[str, Outcome] = {}
    for name, (policy, workload) in runs.items():
        chosen = KNOWN[policy](workload.shape, num_slots)
        found[name] = Simulation(chosen, cost).run(workload.passes, min(SETTLE, len(workload.passes) // 2))
    return [
        {
            "system": name,
            "step_seconds": outcome.seconds / outcome.passes,
            "stall_seconds": outcome.stall_seconds / outcome.passes,
            "bytes_per_step": round(outcome.loads * condition.size.expert_bytes / outcome.passes),
            "hit_ratio": round(outcome.hit_ratio, 4),
            "ratio": round(found[LRU].link_seconds / found[LRU].compute_seconds, 3),
            "gain": round(found[LRU].seconds / outcome.seconds, 4),
        }
        for name, outcome in found.items()
    ]


def gains(rows: Sequence[Row], axis: str, source: str, system: str) -> list[tuple[float, float]]:
    """(value, how many times as fast as LRU), by value."""
    wanted = (axis, source, system)
    found = [(r["value"], r["gain"]) for r in rows if (r["axis"], r["source"], r["system"]) == wanted]
    return sorted(found)


HELPS, HARDLY = 1.10, 1.02  # times as fast as LRU


def sentences(rows: Sequence[Row], axis: Axis) -> list[str]:
    """What the numbers say of one axis, in words."""
    said = []
    for source in (RECORDED, DRAWN):
        ours = gains(rows, axis.name, source, OURS)
        bound = dict(gains(rows, axis.name, source, BOUND))
        if not ours:
            continue
        best, worst = max(ours, key=lambda pair: pair[1]), min(ours, key=lambda pair: pair[1])
        label = "On synthetic routes p" if source == DRAWN else "P"
        text = (
            f"{label}rediction is worth most at {best[0]:g} {axis.unit} ({best[1]:.2f} times as fast as LRU)"
        )
        if worst[1] < HARDLY:
            text += f" and least at {worst[0]:g} ({worst[1]:.2f})"
            if bound[worst[0]] < HELPS:
                text += f", where knowing all that comes would give no more than {bound[worst[0]]:.2f}"
        else:
            text += f", and never less than {worst[1]:.2f} (at {worst[0]:g})"
        said.append(text + ".")
        if helped := [f"{value:g}" for value, gain in ours if gain >= HELPS]:
            said.append(f"A tenth faster or more: at {', '.join(helped)}.")
        if lost := [f"{value:g} ({gain:.2f})" for value, gain in ours if gain < 1]:
            said.append(f"Slower than LRU: at {', '.join(lost)}.")
    return said


BINS: tuple[tuple[float, float], ...] = ((0, 0.5), (0.5, 1), (1, 2), (2, 4), (4, float("inf")))


def rule_of_thumb(rows: Sequence[Row]) -> Table:
    """Gains by the one number that decides: how long LRU's loads take beside its arithmetic."""
    lines = []
    for least, most in BINS:
        inside = [row for row in rows if least <= row["ratio"] < most and row["axis"] != "predictor"]
        cells = [_range([r["gain"] for r in inside if r["system"] == name]) for name in (OURS, ORACLE, BOUND)]
        label = f"{least:g} to {most:g}" if most < float("inf") else f"above {least:g}"
        lines.append((label, str(len(inside) // 5), *cells))
    header = (
        "loads / arithmetic under LRU",
        "conditions",
        "predicted",
        "oracle for this step",
        "knowing all that comes",
    )
    return Table("Times as fast as LRU: median (least to most)", header, lines)


def _range(gains: Sequence[float]) -> str:
    if not gains:
        return ""
    ordered = sorted(gains)
    return f"{ordered[len(ordered) // 2]:.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"


def axis_table(rows: Sequence[Row], axis: Axis) -> Table:
    lines = []
    for value, source in sorted({(r["value"], r["source"]) for r in rows if r["axis"] == axis.name}):
        by = {
            r["system"]: r for r in rows if (r["axis"], r["value"], r["source"]) == (axis.name, value, source)
        }
        lru = by[LRU]
        lines.append(
            (
                f"{value:g}", source, f"{lru['ratio']:.2f}", f"{lru['step_seconds'] * 1e3:.1f}",
                f"{lru['bytes_per_step'] / 1e6:.0f}", *(f"{by[name]['gain']:.2f}x" for name in SHOWN),
                f"{by[OURS]['recall']:.2f}",
            )
        )  # fmt: skip
    header = (axis.unit, "routes", "loads / arithmetic", "LRU: ms per step", "MB per step", *SHOWN, "recall")
    return Table(axis.title, header, lines)


SHOWN = (CACHE_MOE, OURS, ORACLE, BOUND)


def section(result: Result) -> Section:
    notes = ["[When ExpertFlow helps](when.md) has a figure for each, and how they were made."]
    notes += [f"{axis.title}: " + " ".join(sentences(result.rows, axis)) for axis in AXES.values()]
    return Section(
        "cache and batch sizes (Fig. 6) and three numbers of experts (Table 2).",
        notes,
        [rule_of_thumb(result.rows)],
    )


def figures(result: Result) -> dict[str, Figure]:
    return {f"when-{axis.name}": _figure(result.rows, axis) for axis in AXES.values()}


def _figure(rows: Sequence[Row], axis: Axis) -> Figure:
    from benchmarks.paper import style

    figure, axes = style.new_figure(1, width=4.6, height=3.0)
    panel = axes[0][0]
    colours = {CACHE_MOE: style.ORANGE, OURS: style.BLUE, ORACLE: style.SKY, BOUND: style.BLACK}
    for source, line in ((RECORDED, "-"), (DRAWN, "--")):
        for name, colour in colours.items():
            if points := gains(rows, axis.name, source, name):
                label = name if source == RECORDED or axis.name == "experts" else f"{name}, {source}"
                panel.plot(*zip(*points, strict=True), line, marker="o", ms=3, color=colour, label=label)
    panel.axhline(1, color="#999999", lw=0.8)
    if axis.name != "predictor":
        panel.set_xscale("log", base=2)
        panel.set_xticks(
            ticks := sorted({r["value"] for r in rows if r["axis"] == axis.name}), [f"{t:g}" for t in ticks]
        )
        panel.minorticks_off()
    panel.set_xlabel(f"{axis.title} ({axis.unit})")
    panel.set_ylabel("times as fast as LRU")
    panel.legend(fontsize=7)
    return figure


def conditions(settings: Settings) -> dict[str, Any]:
    return {
        "hardware": A40,
        "batch": BATCH,
        "share": SHARE,
        "steps": QUICK_STEPS if settings.quick else STEPS,
        **recordings.conditions(settings, [(RECORDING, TASK)]),
    }


ITEM = Item("sensitivity", "simulated", "Sensitivity: when it helps", conditions, parts, section, figures)
