"""Table 2 and Fig. 4 on the clock: units of two batches of a small model, grouped while another unit computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.paper import measured, recordings, table2
from benchmarks.paper.item import Item, Part, Result, Row, Say, Section, Settings, Table, Target
from expertflow.config import format_bandwidth
from expertflow.timeline import TRACKS, Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH, QUICK_BATCH, LINK = 16, 4, "20MB/s"
WITHOUT, WITH, AUTO, JOINT = "without TS", "with TS", "TS where it pays", "joint"
_WAYS: dict[str, dict[str, Any]] = {
    WITHOUT: {"schedule": "fixed", "execution": "split"},
    WITH: {"schedule": "auto", "execution": "split"},
    AUTO: {"schedule": "auto", "execution": "split", "tries": True},
    JOINT: {"schedule": "fixed", "execution": "joint"},
}
SEQUENTIAL, DUAL = "sequential", "dual-batch"
_STEPS_DRAWN = 6
_CALIBRATION_STEPS = 32
_ROUNDS = 2  # in turn: a processor's pace changes from minute to minute
_TOKENS = 48  # of each answer: enough steps to find out whether it pays, and to profit from it


def _batch(settings: Settings) -> int:
    return QUICK_BATCH if settings.quick else BATCH


def scheduler_parts(settings: Settings) -> list[Part]:
    """The ways of one model share a link, and so a part."""
    return [Part(small.name, partial(_serve, settings, small)) for small in _scheduled(settings)]


def _scheduled(settings: Settings) -> list[measured.Small]:
    """The paper's Switch models where they were trained, beside the embedded one."""
    first, *others = measured.models(settings)
    return [first, *(small for small in others if small.name.startswith("switch"))]


def _serve(settings: Settings, small: measured.Small, say: Say) -> list[Row]:
    said, link = measured.predictor(settings, small, say), LINK
    if small.folder != measured.TINY:
        bytes_per_s, _ = measured.choose_link(small, _batch(settings), _CALIBRATION_STEPS, say)
        link = format_bandwidth(bytes_per_s)
    rows = []
    for number in range(_rounds(settings)):
        for name, way in _WAYS.items():
            say(f"{small.name}, {name}, a link of {link}, round {number + 1} of {_rounds(settings)}")
            row = measured.serve(
                settings,
                small,
                batch=_batch(settings),
                units=2,
                link=link,
                predictor=said,
                tokens=_TOKENS,
                **way,
            )
            rows.append({"way": name, "round": number, **row})
    return rows


def _rounds(settings: Settings) -> int:
    return 1 if settings.quick else _ROUNDS


def scheduler_conditions(settings: Settings) -> dict[str, Any]:
    scheduled = _scheduled(settings)
    used = [(small.name, small.task) for small in scheduled]
    return {
        "models": [small.name for small in scheduled],
        "batch": _batch(settings),
        "rounds": _rounds(settings),
        "ways": list(_WAYS),
        "tokens": _TOKENS,
        "link of the embedded model": LINK,
        "ratio": measured.RATIO,
        **recordings.conditions(settings, used),
    }


def conditions(settings: Settings) -> dict[str, Any]:
    small = measured.models(settings)[0]
    used = [(small.name, small.task)]
    return {
        "model": small.name,
        "batch": _batch(settings),
        "link": LINK,
        **recordings.conditions(settings, used),
    }


def scheduler_section(result: Result) -> Section:
    rows, targets = [], []
    for model in dict.fromkeys(row["model"] for row in result.rows):
        found = {way: [r for r in result.rows if (r["model"], r["way"]) == (model, way)] for way in _WAYS}
        without = _rate(found[WITHOUT])
        for way, runs in found.items():
            gain, link, rates = _rate(runs) / without, runs[0]["link"], [row["tokens_per_s"] for row in runs]
            busy = max(row["stolen"] or 0.0 for row in runs), max(row["others"] or 0.0 for row in runs)
            counts = (sum(row["engine"][name] for row in runs) for name in ("regroupings", "late"))
            rows.append(
                (
                    *(
                        model,
                        link,
                        way,
                        f"{_rate(runs):.1f} ({gain:.2f}x)",
                        f"{min(rates):.1f} to {max(rates):.1f}",
                    ),
                    f"{sum(row['loads_per_token'] for row in runs) / len(runs):.2f}",
                    *(f"{count}" for count in counts),
                    f"{busy[0]:.0%}, {busy[1]:.0%}",
                )
            )
            if way == WITH:
                asked = 100 * (max(b / a for a, b in table2.IN_PAPER.values()) - 1)
                at = f"BS={runs[0]['batch']}, a link of {link}"
                name = f"{model}, gain of TS on the clock"
                targets.append(Target(name, asked, 100 * (gain - 1), "%", at))
    header = ("", "link", "", "tokens/s", "runs", "loads per token", "regroupings", "late", "stolen, others")
    return Section(
        table2.PAPER,
        [
            f"Two units of two batches of {result.conditions['batch']}, experts in RAM behind a link, a quarter of "
            f"them in slots; prompts included; {result.conditions['rounds']} runs of each, in turn, as one. The link "
            f"of a Switch is one over which LRU's loads take {result.conditions['ratio']:g} times its arithmetic. "
            "Late: steps that stayed as they sat, since nothing was prepared in time. `with TS` groups before every "
            "step; `TS where it pays` is what `--schedule auto` does: it tries steps with and without, and keeps to "
            "what was faster.",
            *measured.untrained(result),
            *_found_out(result),
            measured.quiet(result.rows),
        ],
        [Table("With and without the scheduler", header, rows)],
        targets,
    )


def _found_out(result: Result) -> Iterator[str]:
    for row in result.rows:
        if row["way"] == AUTO:
            yield f"Found out by {row['model']}, round {row['round'] + 1}: {row['engine']['scheduler']}."


def _rate(runs: Sequence[Row]) -> float:
    """Tokens per second of runs of as many tokens, one after the other."""
    return len(runs) / sum(1 / row["tokens_per_s"] for row in runs)


def timeline_parts(settings: Settings) -> list[Part]:
    small = measured.models(settings)[0]
    return [
        Part(name, partial(_record, settings, small, name, units))
        for name, units in ((SEQUENTIAL, 1), (DUAL, 2))
    ]


def _record(settings: Settings, small: measured.Small, name: str, units: int, say: Say) -> list[Row]:
    """One unit has nobody to hide behind: prediction and grouping are then part of its step."""
    timeline = Timeline()
    row = measured.serve(
        settings, small, batch=_batch(settings), units=units, link=LINK, schedule="auto", timeline=timeline,
        predictor=measured.predictor(settings, small, say),
    )  # fmt: skip
    spans = timeline.spans
    computed = sorted((span for span in spans if span.track == "compute"), key=lambda span: span.begin)
    start = computed[-_STEPS_DRAWN].begin if len(computed) >= _STEPS_DRAWN else computed[0].begin
    drawn = [[s.track, s.name, max(0.0, s.begin - start), s.end - start] for s in spans if s.end > start]
    return [
        {
            "pipeline": name,
            **row,
            "busy": timeline.busy_seconds(),
            "spans": drawn,
        }
    ]


def hidden_share(engine: Row) -> float | None:
    """Of the time of prediction and grouping, the part beside which another unit computed; None where there was none.

    engine: EngineStats as plain JSON.
    """
    hidden = engine["hidden_predict_seconds"] + engine["hidden_group_seconds"]
    total = hidden + engine["predict_seconds"] + engine["group_seconds"]
    return hidden / total if total else None


def timeline_section(result: Result) -> Section:
    rows = []
    for row in result.rows:
        busy, stats = row["busy"], row["engine"]
        hidden = hidden_share(stats)
        share = "" if hidden is None else f"{hidden:.0%}"
        seconds = [f"{busy.get(track, 0.0):.2f}" for track in TRACKS]
        rows.append(
            (
                row["pipeline"],
                *seconds,
                share,
                f"{stats['scheduling_share']:.1%}",
                f"{row['tokens_per_s']:.1f}",
            )
        )
    header = ("", *(f"{track}, s" for track in TRACKS), "hidden", "scheduling's share of steps", "tokens/s")
    return Section(
        "prediction and grouping of the next unit run while this one computes (dual-batch), instead of "
        "before each step (sequential).",
        [
            f"{result.conditions['model']}, schedule=auto, batches of {result.conditions['batch']}; "
            "sequential is one unit, which has nobody to hide behind, dual-batch two. Hidden: the part of "
            "prediction and grouping beside which a unit computed.",
            measured.quiet(result.rows),
        ],
        [Table("Busy seconds of a run", header, rows)],
    )


def timeline_figure(result: Result) -> dict[str, Figure]:
    from benchmarks.paper import style

    colours = dict(zip(TRACKS, (style.PINK, style.ORANGE, style.BLUE, style.RED, style.GREEN), strict=True))
    figure, axes = style.new_figure(1, max(1, len(result.rows)), width=8.0, height=1.9)
    for number, row in enumerate(result.rows):
        panel = axes[number][0]
        for place, track in enumerate(TRACKS):
            bars = [(1e3 * begin, 1e3 * (end - begin)) for of, _, begin, end in row["spans"] if of == track]
            edge = "white" if track == "compute" else "none"  # a border would hide what is short
            panel.broken_barh(bars, (place - 0.4, 0.8), facecolors=colours[track], edgecolor=edge)
        panel.set(yticks=range(len(TRACKS)), yticklabels=TRACKS, title=row["pipeline"])
        panel.invert_yaxis()
    axes[-1][0].set_xlabel(f"ms, the last {_STEPS_DRAWN} steps")
    return {"fig4-measured": figure}


TABLE2 = Item(
    "table2",
    "measured",
    "Table 2: the token scheduler",
    scheduler_conditions,
    scheduler_parts,
    scheduler_section,
)
FIG4 = Item(
    "fig4",
    "measured",
    "Fig. 4: the dual-batch pipeline",
    conditions,
    timeline_parts,
    timeline_section,
    timeline_figure,
)
