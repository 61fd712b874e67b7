"""Fig. 9: how well routes are predicted, layer by layer, at home and on another task."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.paper import recordings
from benchmarks.paper.item import Item, Part, Result, Row, Say, Section, Settings, Table
from benchmarks.paper.published import MODELS, Published
from expertflow.predictor.evaluate import Conditions, evaluate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 8
ELSEWHERE = {"chat": "translation", "translation": "chat", "math": "chat"}  # where else a predictor is tried
MAX_TOKENS, QUICK_TOKENS, WARM_TOKENS = 2500, 600, 2000
TLP, SLP, OURS, UNTRAINED = "TLP", "SLP", "ours", "online table"


def parts(settings: Settings) -> list[Part]:
    for model in MODELS:
        for task in (model.task, ELSEWHERE[model.task]):
            recordings.recording(settings, model.recording, task)
    models = (
        [model for model in MODELS if model.name in ("Switch-32", "Qwen1.5")] if settings.quick else MODELS
    )
    return [Part(model.name, partial(_evaluate, settings, model)) for model in models]


def _evaluate(settings: Settings, model: Published, say: Say) -> list[Row]:
    home, away = (
        recordings.recording(settings, model.recording, task) for task in (model.task, ELSEWHERE[model.task])
    )
    predictors = (
        {} if settings.quick else {"trained": recordings.trained(settings, model.recording, model.task, say)}
    )
    found = evaluate(
        home.trace.meta,
        [*home.trace, *away.trace],
        predictors,
        fitted_on=[model.task],
        conditions=Conditions(
            batches=(1, BATCH),
            max_tokens=QUICK_TOKENS if settings.quick else MAX_TOKENS,
            warm_tokens=WARM_TOKENS,
            seed=settings.seed,
        ),
    )
    rows = []
    for row in found["results"]:
        ours = row["predictor"] if row["predictor"] in (TLP, SLP, UNTRAINED, "popularity") else None
        if row["predictor"] == "trained + online table":
            ours = OURS
        elif row["predictor"] == "trained":
            ours = "trained alone"
        if ours is None or (row["side"], row["phase"]) != ("decoder", "decode") or "batches" not in row:
            continue
        batch = row["batches"].get(str(BATCH), {})
        rows.append(
            {
                "model": model.name,
                "predictor": ours,
                "task": row["task"],
                "in_domain": row["in_domain"],
                "tokens": row["tokens"],
                "layers": row["layers"],
                "recall_equal_budget": row["recall_equal_budget"],
                "accuracy": batch.get("accuracy"),
                "accuracy_by_layer": batch.get("accuracy_by_layer"),
                "precision": batch.get("precision"),
            }
        )
    return rows


def conditions(settings: Settings) -> dict[str, Any]:
    predictors = recordings.conditions(settings, [(model.recording, model.task) for model in MODELS])
    return {"batch": BATCH, "max_tokens": QUICK_TOKENS if settings.quick else MAX_TOKENS, **predictors}


def _domains(row: Row) -> str:
    return "in-domain" if row["in_domain"] else "cross-domain"


def section(result: Result) -> Section:
    header = (
        "",
        "task",
        "domain",
        "accuracy: ours",
        "TLP",
        "SLP",
        "online table",
        "precision: ours",
        "recall per token: ours",
    )
    rows = []
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in result.rows):
        found = {row["predictor"]: row for row in result.rows if (row["model"], row["task"]) == (model, task)}
        best = found.get(OURS) or found[UNTRAINED]
        rows.append(
            (
                *(model, task, _domains(best), _share(best["accuracy"])),
                *(_share(found[name]["accuracy"]) if name in found else "" for name in (TLP, SLP, UNTRAINED)),
                _share(best["precision"]),
                _share(best["recall_equal_budget"]),
            )
        )
    return Section(
        "over 90 % of the experts of a batch named in most in-domain cases, 5 to 10 points less "
        "cross-domain, over 95 % on Qwen1.5, 80 to 90 % on Switch-64, where TLP and SLP stay below 20 %.",
        [
            f"Accuracy: the paper's formula (4.3.3), batches of {result.conditions['batch']}, decode, "
            "decoder side; at the threshold where a token's precision equals its recall, since accuracy "
            f"alone is highest for naming everything. Ours: {result.conditions['predictor']}; with the "
            "online table. Recall per token: as many experts named as used.",
            *_short(result),
        ],
        [Table("Share of the experts used that were named", header, rows)],
    )


def _short(result: Result) -> Iterator[str]:
    """Where we stay below the paper's 90 % in-domain, by rule."""
    below = [
        f"{row['model']} {row['accuracy']:.0%}"
        for row in result.rows
        if row["predictor"] == OURS and row["in_domain"] and row["accuracy"] < 0.9
    ]
    if below:
        yield (
            f"Below the paper's 90 % in-domain: {', '.join(below)}. The paper trains on 30,000 sequences, "
            "these predictors on at most 261 of small models' text."
        )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def figures(result: Result) -> dict[str, Figure]:
    from benchmarks.paper import style

    models = list(dict.fromkeys(row["model"] for row in result.rows))
    columns = min(3, len(models))
    figure, axes = style.new_figure(columns, -(-len(models) // columns), sharey=True)
    colours = {OURS: style.BLUE, UNTRAINED: style.SKY, TLP: style.ORANGE, SLP: style.PINK}
    for number, model in enumerate(models):
        panel = axes[number // columns][number % columns]
        for row in result.rows:
            if row["model"] != model or row["predictor"] not in colours or row["accuracy_by_layer"] is None:
                continue
            values = [float("nan") if value is None else value for value in row["accuracy_by_layer"]]
            panel.plot(
                [layer + 1 for layer in row["layers"]], values, marker=".", markersize=4, linewidth=1.2,
                color=colours[row["predictor"]], linestyle="-" if row["in_domain"] else "--",
                label=f"{row['predictor']}, {_domains(row)}",
            )  # fmt: skip
        panel.set(title=model, ylim=(0, 1.02), xlabel="MoE layer")
    for unused in axes.flat[len(models) :]:
        unused.set_visible(False)
    axes[0][0].set_ylabel(f"accuracy, batches of {BATCH}")
    style.legend_above(figure, axes[0][0])
    return {"fig9-simulated": figure}


ITEM = Item(
    "fig9", "simulated", "Fig. 9: accuracy of prediction by layer", conditions, parts, section, figures
)
