"""Fig. 6 and 10 on the clock: throughput and hit ratios of small trained models over a throttled link."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.paper import fig6, fig10, measured, recordings
from benchmarks.paper.item import Item, Part, Result, Row, Say, Section, Settings, Table, Target
from benchmarks.paper.measured import ALL, BOUND, System
from benchmarks.paper.simulated import CACHE_MOE, CACHE_MOE_BOTH, PREGATED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCHES, QUICK_BATCHES = (4, 16), (4,)
ON_DEMAND, OURS, OURS_JOINT = "ours, on demand", "ours, plec", "ours, joint"
SYSTEMS = {
    CACHE_MOE: System("cache-moe"),
    PREGATED: System("pregated-moe", predicts=True),
    ON_DEMAND: System("lru"),
    OURS: System("plec", predicts=True),
    OURS_JOINT: System("plec", predicts=True, together="joint"),
    CACHE_MOE_BOTH: System("cache-moe", together="both"),
}
ALONE = {name: system for name, system in SYSTEMS.items() if system.together == "one"}
DRAWN = (*ALONE, OURS_JOINT, BOUND)
SHARES = (1 / 4, 1 / 2)  # of the experts that fit


def parts(
    settings: Settings, most_models: int | None = None, systems: dict[str, System] = SYSTEMS
) -> list[Part]:
    batches = QUICK_BATCHES if settings.quick else BATCHES
    return [
        Part(f"{small.name}, batch {batch}", partial(_decode, settings, small, batch, systems))
        for small in measured.models(settings)[:most_models]
        for batch in batches
    ]


def _decode(
    settings: Settings, small: measured.Small, batch: int, systems: dict[str, System], say: Say
) -> list[Row]:
    shares = SHARES[:1] if settings.quick else SHARES
    sizes = [max(1, round(share * small.experts)) for share in shares]
    return measured.decode(settings, small, batch, sizes, systems, say)


def conditions(
    settings: Settings, most_models: int | None = None, systems: dict[str, System] = SYSTEMS
) -> dict[str, Any]:
    small = measured.models(settings)[:most_models]
    used = [(each.name, each.task) for each in small]
    return {
        "models": [each.name for each in small],
        "ratio": measured.RATIO,
        "systems": list(systems),
        **recordings.conditions(settings, used),
    }


def throughput(result: Result) -> Section:
    ahead = ("plec to Cache-MoE", "joint to Cache-MoE", "joint to both as one", "stolen, others")
    header = ("", "CS", "BS", *SYSTEMS, BOUND, ALL, *ahead)
    rows = []
    for (model, batch, size), found in _by_condition(result).items():
        rates = [f"{found[name]['tokens_per_s']:.1f}" for name in (*SYSTEMS, BOUND, ALL)]
        faster = [
            f"{found[ours]['tokens_per_s'] / found[rival]['tokens_per_s']:.2f}x"
            for ours, rival in ((OURS, CACHE_MOE), (OURS_JOINT, CACHE_MOE), (OURS_JOINT, CACHE_MOE_BOTH))
        ]
        ran = [row for name, row in found.items() if name != BOUND]
        busy = [max(row[who] or 0.0 for row in ran) for who in ("stolen", "others")]
        rows.append((model, f"{size}", f"{batch}", *rates, *faster, f"{busy[0]:.0%}, {busy[1]:.0%}"))
    return Section(
        fig6.PAPER,
        [
            f"Decode steps of known text, {', '.join(result.conditions['models'])}; experts in RAM behind a "
            f"link over which LRU's loads take {result.conditions['ratio']:g} times its arithmetic with a "
            "quarter of the experts. As in the simulation a rival holds one batch and ours two, where it is joint: "
            "they meet at every MoE layer, so that an expert is loaded once for both. Beside it Cache-MoE with both "
            "as one batch of twice the size, and ours with one batch alone. Bound: both batches as one with every "
            "expert in memory, or the loads of a cache that knows all that comes on that link, whichever takes longer. "
            f"SE-MoE is not here: no engine runs it. Predictor: {result.conditions['predictor']}.",
            *measured.untrained(result),
            measured.quiet([row for row in result.rows if row["system"] != BOUND]),
        ],
        [Table("Tokens per second on the clock", header, rows)],
        _fastest(result),
    )


def _fastest(result: Result) -> list[Target]:
    """Up to, over all conditions, against the least of the paper's: these models are none of its."""
    found = _by_condition(result)
    if not found:
        return []

    def faster(condition: tuple, name: str) -> float:
        return found[condition][name]["tokens_per_s"] / found[condition][CACHE_MOE]["tokens_per_s"]

    targets = []
    for name, how in ((OURS, "one batch"), (OURS_JOINT, "joint")):
        best = max(found, key=lambda condition: faster(condition, name))
        at, asked = f"{best[0]}, CS={best[2]}, BS={best[1]}", min(fig6.OVER_CACHE_MOE.values())
        title = f"small models over Cache-MoE, up to, {how}"
        targets.append(
            Target(title, asked, faster(best, name), "x", at, faster(best, BOUND), "knowing all that comes")
        )
    return targets


def _by_condition(result: Result) -> dict[tuple, dict[str, Row]]:
    """What ran under each condition, where all did."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in result.rows:
        if row["system"] != ALL:
            found.setdefault((row["model"], row["batch"], row["cache_size"]), {})[row["system"]] = row
    for row in result.rows:
        if row["system"] == ALL:
            for condition, systems in found.items():
                if condition[:2] == (row["model"], row["batch"]):
                    systems[ALL] = row
    needed = {*result.conditions["systems"], BOUND, ALL}
    return {c: systems for c, systems in found.items() if systems.keys() >= needed}


def throughput_figure(result: Result) -> dict[str, Figure]:
    return {"fig6-measured": _bars(result, "tokens_per_s", 1.0, "tokens per second", DRAWN)}


def _bars(result: Result, key: str, scale: float, label: str, names: Sequence[str]) -> Figure:
    from benchmarks.paper import style

    found = _by_condition(result)
    palette = (style.ORANGE, style.YELLOW, style.SKY, style.BLUE, style.GREEN, style.BLACK)
    colours = dict(zip(DRAWN, palette, strict=True))
    shown = list(dict.fromkeys(condition[0] for condition in found)) or ["nothing"]
    figure, axes = style.new_figure(len(shown))
    for column, model in enumerate(shown):
        panel, here = axes[0][column], [condition for condition in found if condition[0] == model]
        heights = {name: [scale * found[condition][name][key] for condition in here] for name in names}
        style.grouped_bars(panel, [f"{size}\n{batch}" for _, batch, size in here], heights, colours)
        panel.set(title=model, xlabel="CS, BS")
    axes[0][0].set_ylabel(label)
    style.legend_above(figure, axes[0][0], columns=3)
    return figure


def hits(result: Result) -> Section:
    header = ("", "CS", "BS", *ALONE, "plec above on demand")
    rows = []
    for (model, batch, size), found in _by_condition(result).items():
        ratios = [found[name]["hit_ratio"] for name in ALONE]
        above = 100 * (found[OURS]["hit_ratio"] - found[ON_DEMAND]["hit_ratio"])
        rows.append(
            (model, f"{size}", f"{batch}", *(f"{ratio:.1%}" for ratio in ratios), f"{above:.1f} points")
        )
    return Section(
        fig10.PAPER,
        [
            "The engine's own counters in runs such as those of Fig. 6 on the clock, of the embedded model; hits "
            "of on-demand policies do not depend on time, those of plec do.",
            measured.quiet([row for row in result.rows if row["system"] != BOUND]),
        ],
        [Table("Hit ratios on the clock", header, rows)],
    )


def hits_figure(result: Result) -> dict[str, Figure]:
    return {"fig10-measured": _bars(result, "hit_ratio", 100.0, "hits, %", tuple(ALONE))}


FIG6 = Item("fig6", "measured", "Fig. 6: throughput", conditions, parts, throughput, throughput_figure)
FIG10 = Item(
    "fig10", "measured", "Fig. 10: hit ratios", partial(conditions, most_models=1, systems=ALONE),
    partial(parts, most_models=1, systems=ALONE), hits, hits_figure,
)  # fmt: skip
