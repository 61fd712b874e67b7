"""Predictors taken apart, for the ablation: each says something of the same sequences in the same order.

Look-ahead needs the hidden states of the model that was recorded; the repository has the weights of the embedded
model alone, so the others go without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper import recordings
from benchmarks.paper.item import ROOT, Say, Settings
from expertflow.predictor import replay
from expertflow.predictor.combine import Combination
from expertflow.predictor.layer_baselines import GateLookAhead
from expertflow.predictor.model import RoutingPathPredictor
from expertflow.predictor.online_table import OnlineTokenTable
from expertflow.predictor.protocol import PathPredictor
from expertflow.predictor.recordings import load_predictors
from expertflow.predictor.replay import Group, Said, SaidAhead
from expertflow.sim.workload import Foretold, decoded, foretell, shape_of

NONE, TABLE, PAPER, OURS = "none", "online table", "RPP, the paper's", "RPP, ours"
AHEAD, BOTH, ORACLE = "look-ahead", "both", "oracle"
PAPER_MINUTES = 5.0
_WITH_WEIGHTS = {"tiny-moe": ROOT / "models" / "tiny-moe"}


def all_parts(
    settings: Settings, model: str, task: str, most_sequences: int, say: Say, warm: int = 64
) -> dict[str, Foretold]:
    """By predictor. A quick run trains none, and "both" is then the online table with look-ahead.

    ours: with the online table, as it is served; the paper's alone, as it is published.
    """
    read = recordings.recording(settings, model, task)
    sequences, served = read.test[:most_sequences], read.train[:warm]
    meta, seed = read.trace.meta, settings.seed
    table = foretell(meta, sequences, "online", warm=served, seed=seed)
    found = {
        NONE: replace(table, prediction="none", p_TLE=None),
        TABLE: table,
        ORACLE: replace(table, prediction="oracle"),
    }
    ours: RoutingPathPredictor | None = None
    if not settings.quick:
        paper = _papers(settings, model, task, say)
        found[PAPER] = replace(
            table, prediction=PAPER, p_TLE=_each(table, lambda group: replay.all_at_once(paper, group))
        )
        ours = recordings.trained(settings, model, task, say)
        found[OURS] = foretell(meta, sequences, OURS, ours, served, seed)
    if model in _WITH_WEIGHTS:
        said = _look_ahead(table, model, say)
        found[AHEAD] = replace(table, prediction=AHEAD, p_TLE=None, ahead_TLE=_in_order(table, said))
        combined = _combined(table, said, ours, served)
        found[BOTH] = replace(found.get(OURS, table), prediction=BOTH, ahead_TLE=_in_order(table, combined))
    return found


def _papers(settings: Settings, model: str, task: str, say: Say) -> RoutingPathPredictor:
    """The paper's architecture, trained on what ours is trained on."""
    read = recordings.recording(settings, model, task)
    folder = settings.out / "predictors" / f"{model}-{task}-paper"
    training = replace(recordings.TRAINING, minutes=PAPER_MINUTES, seed=settings.seed)
    recordings.train_once(read, folder, {"arch": "paper"}, training, say)
    (predictor,) = load_predictors([folder], read.trace.meta, [read.folder]).values()
    return predictor


def groups(foretold: Foretold) -> list[Group]:
    """The sequences as they were predicted: padding keeps their order, for they are in it already."""
    parts = range(0, len(foretold.sequences), replay.GROUP)
    return [replay.pad(foretold.sequences[first : first + replay.GROUP]) for first in parts]


def _each(foretold: Foretold, ask: Callable[[Group], Tensor]) -> list[Tensor]:
    """p_TLE of each sequence, of one that predicts group by group."""
    return _in_order(foretold, [ask(group) for group in groups(foretold)])


def _in_order(foretold: Foretold, p_GBTLE: list[Tensor]) -> list[Tensor]:
    parts = zip(groups(foretold), p_GBTLE, strict=True)
    return [p_TLE for group, p_BTLE in parts for p_TLE in decoded(group, p_BTLE)]


def _look_ahead(foretold: Foretold, model: str, say: Say) -> list[Tensor]:
    """p_BTLE of each group: the next layer's router asked about this layer's input, by running the model."""
    from expertflow import LLM
    from expertflow.engine.hidden_states import hidden_states, routers, say_ahead

    experts = max(shape_of(foretold.meta).experts_per_layer)
    longest = max(len(s.target_ids_T) for s in foretold.sequences)
    with (
        LLM(_WITH_WEIGHTS[model], cache_size=experts, context=longest + 1) as llm,
        hidden_states(llm) as read,
    ):
        weights = routers(llm)
        ahead = GateLookAhead([w for w, _ in weights], foretold.top_k, [bias for _, bias in weights])
        said = [say_ahead({AHEAD: ahead}, read, group, experts)[AHEAD] for group in groups(foretold)]
    say(f"look-ahead of {len(foretold.sequences)} sequences")
    return said


def _combined(
    foretold: Foretold, said: list[Tensor], trained: RoutingPathPredictor | None, served: Any
) -> list[Tensor]:
    """p_BTLE known when each layer begins: the mixture of all there are, corrected by look-ahead."""
    shape = shape_of(foretold.meta)
    layers, experts = shape.num_layers, max(shape.experts_per_layer)
    table, look, stand_in = (
        OnlineTokenTable(layers, experts, foretold.top_k),
        SaidAhead(),
        Said(torch.zeros(0)),
    )
    sources: list[PathPredictor] = [table] if trained is None else [stand_in, table]
    combination = Combination(sources, layers, experts, look)
    replay.serve(
        table,
        [replay.pad(served[n : n + replay.GROUP]) for n in range(0, len(served), replay.GROUP)],
        experts,
    )
    found = []
    for group, ahead_BTLE in zip(groups(foretold), said, strict=True):
        if trained is not None:
            stand_in.p_BTLE = replay.all_at_once(trained, group)
        group = replace(group, ahead_BTLE=ahead_BTLE)
        found.append(replay.stepped(combination, group, experts, [stand_in] if trained else [], look))
    return found
