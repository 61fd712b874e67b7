"""How well predictors do on held-out prompts, all baselines beside them, always.

Decode and prefill apart, task by task (in-domain: a task that the fitted ones were fitted on), batches of
different sequences at the same decode step. `evaluate` returns plain JSON; report.py shows it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expertflow.predictor import replay
from expertflow.predictor.baselines import SLP, TLP, Popularity, TokenTable, multi_hot
from expertflow.predictor.combine import Combination
from expertflow.predictor.metrics import (
    Guesses,
    ProbabilityHistogram,
    accuracy_by_row,
    guesses_at_equal_budget,
    guesses_of,
    log_absent,
)
from expertflow.predictor.next_use import NextUseMixture
from expertflow.predictor.online_table import OnlineTokenTable
from expertflow.predictor.protocol import NextUsePredictor, PathPredictor, SourcePredictor
from expertflow.predictor.ranking import ranking_quality
from expertflow.predictor.replay import Group, Said, SaidAhead
from expertflow.trace import TracedSequence, TraceMeta

FORMAT = "expertflow-predictor-evaluation-1"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CURVE_POINTS = 50
RANKED_LENGTH = 16  # tokens of an answer from which next uses are judged
RANKED_TOKENS = 4000  # of each task: every pair of residents is compared

# Given a group, what a predictor of hidden states says: name -> p_BTLE, nan at the first layer.
HiddenPredictors = Callable[[Group], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Conditions:
    """How the evaluation is run. max_tokens bounds each task; warm_tokens are served before, and learnt from."""

    batches: tuple[int, ...] = BATCHES
    max_tokens: int = 50_000
    max_length: int = 1024
    warm_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1 or max(self.batches) > replay.GROUP:
            raise ValueError(f"batch sizes {self.batches} must lie between 1 and {replay.GROUP}")
        if self.max_tokens < 1 or self.max_length < 2:
            raise ValueError(
                f"max_tokens={self.max_tokens}, max_length={self.max_length}: give at least 1 and 2"
            )


@dataclass(frozen=True)
class Side:
    """One stack of MoE layers: the decoder's, or the encoder's of an encoder-decoder model."""

    name: str
    layers: int
    num_experts: int
    top_k: int
    of_source: bool


def sides(meta: TraceMeta) -> list[Side]:
    found = []
    source, target = (
        meta.experts_per_layer[: meta.source_layers],
        meta.experts_per_layer[meta.source_layers :],
    )
    if target:
        found.append(Side("decoder", len(target), max(target), meta.top_k, False))
    if source:
        found.append(Side("encoder", len(source), max(source), meta.top_k, True))
    return found


def check_tasks(
    sequences: Sequence[TracedSequence], fitted_on: Sequence[str], tasks: Sequence[str] | None
) -> tuple[list[TracedSequence], list[str]]:
    """(those that baselines are counted on, the tasks that have held-out sequences). ValueError as `evaluate`."""
    train = [s for s in sequences if s.split == "train" and s.task in fitted_on]
    if not train:
        counted = sorted({s.task for s in sequences if s.split == "train"})
        raise ValueError(
            f"no sequence of the split 'train' is of the tasks {list(fitted_on)}, so the baselines have "
            f"nothing to count; there it has {counted}: name one of them, or record more prompts"
        )
    there = sorted({s.task for s in sequences if s.split == "test"})
    for task in tasks or ():
        if task not in there:
            raise ValueError(f"no held-out sequence is of the task {task!r}; the split 'test' has {there}")
    if not there:
        raise ValueError("the split 'test' is empty: record more prompts, so that some are held out")
    return train, there


def evaluate(
    meta: TraceMeta,
    sequences: Sequence[TracedSequence],
    predictors: Mapping[str, PathPredictor],
    fitted_on: Sequence[str],
    tasks: Sequence[str] | None = None,
    conditions: Conditions | None = None,
    hidden: HiddenPredictors | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Everything about these predictors and all baselines, as plain JSON.

    sequences: of both splits. Baselines are counted on the split "train" of the tasks `fitted_on`; all are
    judged on the split "test" of `tasks` (all by default). Raises ValueError when a split is empty.
    """
    conditions = conditions or Conditions()
    train, there = check_tasks(sequences, fitted_on, tasks)
    results = []
    next_use: list[dict[str, Any]] = []
    for side in sides(meta):
        fitted = Fitted.on(train, side, meta.vocab_size)
        warm = _groups(_up_to(train, conditions.warm_tokens, conditions), side, conditions)
        for task in tasks or there:
            held_out = [s for s in sequences if s.split == "test" and s.task == task]
            groups = _groups(_up_to(held_out, conditions.max_tokens, conditions), side, conditions)
            for name, p_GBTLE in _said(side, fitted, predictors, groups, warm, hidden):
                progress(f"{task}, {side.name}: {name}")
                for phase, rows in _phases(groups, p_GBTLE, side):
                    row = {"predictor": name, "task": task, "in_domain": task in fitted_on}
                    results.append(row | {"side": side.name, "phase": phase} | judge(rows, conditions))
            if not side.of_source:
                progress(f"{task}, next use")
                row = {"task": task, "in_domain": task in fitted_on}
                next_use.append(row | _next_use(predictors, held_out, side, conditions))
    return {
        "format": FORMAT,
        "model": meta.model,
        "fingerprint": meta.fingerprint,
        "experts_per_layer": list(meta.experts_per_layer),
        "source_layers": meta.source_layers,
        "top_k": meta.top_k,
        "fitted_on": list(fitted_on),
        "seed": conditions.seed,
        "warm_tokens": conditions.warm_tokens,
        "results": results,
        "next_use": next_use,
    }


def _next_use(
    predictors: Mapping[str, PathPredictor],
    sequences: Sequence[TracedSequence],
    side: Side,
    conditions: Conditions,
) -> dict[str, Any]:
    """Whether scores order the residents of a cache as their next uses will: mean over sequences, batch 1.

    Residents are the quarter of all experts that was used last. Only predictors that look beyond the pass
    are asked, alone and mixed with what was used (`NextUseMixture`, which learns over the sequences as they come);
    recency, frequency and that mixture without a head stand beside them. Sequences of fewer than 16 answer
    tokens are left out.
    """
    asked = {
        name: p for name, p in predictors.items() if isinstance(p, NextUsePredictor) and _looks_further(p)
    }
    resident = max(2, side.layers * side.num_experts // 4)
    layer_L1 = torch.arange(side.layers, dtype=torch.float32)[:, None]
    mixtures = {name: NextUseMixture(side.layers, side.num_experts, side.top_k) for name in (*asked, None)}
    totals: dict[str, float] = {}
    long = [s for s in sequences if len(s.target_ids_T) - s.num_prefill >= RANKED_LENGTH]
    judged = _up_to(long, RANKED_TOKENS, conditions)
    for sequence in judged:
        group = replay.pad([sequence], False, conditions.max_length)
        truth_TLE = multi_hot(group.routes_BTLK[0], side.num_experts)
        scores: dict[str, Callable[[int], Tensor]] = {}
        for name, predictor in asked.items():
            passes_TLE = predictor.next_use_path(group.context(group.length, group.length))[0]
            when_TLE = passes_TLE * side.layers + layer_L1
            scores[name] = _soonest_first(when_TLE)
            mixed_TLE = _mixed(mixtures[name], truth_TLE, passes_TLE)
            scores[f"{name} + use"] = _soonest_first(mixed_TLE * side.layers + layer_L1)
        alone_TLE = _mixed(mixtures[None], truth_TLE, None)
        scores["use, learnt"] = _soonest_first(alone_TLE * side.layers + layer_L1)
        for name, accuracy in ranking_quality(truth_TLE, scores, resident).items():
            totals[name] = totals.get(name, 0.0) + accuracy / len(judged)
    ranked = {name: _number(total) for name, total in totals.items()}
    return {"sequences": len(judged), "residents": resident, "pairwise_accuracy": ranked}


def _mixed(mixture: NextUseMixture, truth_TLE: Tensor, passes_TLE: Tensor | None) -> Tensor:
    """What the mixture expected just after each pass of one sequence, knowing what it had seen by then."""
    expected = []
    for t, used_LE in enumerate(truth_TLE):
        mixture.observe(used_LE)
        expected.append(mixture.expect(None if passes_TLE is None else passes_TLE[t]))
    mixture.end_of_text()
    return torch.stack(expected)


def _soonest_first(when_TLE: Tensor) -> Callable[[int], Tensor]:
    return lambda t: -when_TLE[t]


def _looks_further(predictor: object) -> bool:
    """A predictor of a class that can may have been trained without that head."""
    return getattr(predictor, "next_use_head", True) is not None


@dataclass(frozen=True)
class Fitted:
    """Baselines counted on the training split."""

    popularity: Popularity
    token_table: TokenTable

    @staticmethod
    def on(train: Sequence[TracedSequence], side: Side, vocab_size: int) -> Fitted:
        streams = list(replay.streams(train, side.of_source))
        return Fitted(
            Popularity.fit(streams, side.num_experts), TokenTable.fit(streams, side.num_experts, vocab_size)
        )


def _up_to(sequences: Sequence[TracedSequence], tokens: int, conditions: Conditions) -> list[TracedSequence]:
    """A seeded shuffle, cut after so many tokens."""
    shuffled = list(sequences)
    random.Random(conditions.seed).shuffle(shuffled)
    taken = []
    for sequence in shuffled:
        if tokens <= 0:
            break
        taken.append(sequence)
        tokens -= min(len(sequence.target_ids_T), conditions.max_length)
    return taken


def _groups(sequences: Sequence[TracedSequence], side: Side, conditions: Conditions) -> list[Group]:
    usable = [s for s in sequences if len(s.source_ids_S if side.of_source else s.target_ids_T)]
    return [
        replay.pad(usable[first : first + replay.GROUP], side.of_source, conditions.max_length)
        for first in range(0, len(usable), replay.GROUP)
    ]


def _said(
    side: Side,
    fitted: Fitted,
    predictors: Mapping[str, PathPredictor],
    groups: Sequence[Group],
    warm: Sequence[Group],
    hidden: HiddenPredictors | None,
) -> Iterator[tuple[str, list[Tensor]]]:
    """Name and p_BTLE of each group, of every predictor there is."""
    experts = side.num_experts
    yield "oracle", [multi_hot(group.routes_BTLK, experts).float() for group in groups]
    yield "TLP", [_tlp(group, experts) for group in groups]
    yield "SLP", [replay.layer_by_layer(SLP(experts), group, experts) for group in groups]
    yield "popularity", [replay.all_at_once(fitted.popularity, group) for group in groups]
    yield "token table", [replay.all_at_once(fitted.token_table, group) for group in groups]
    yield "online table", _stepped([], side, groups, warm, None)
    ahead: list[Tensor] | None = None
    if hidden is not None and not side.of_source:
        by_group = [hidden(group) for group in groups]
        for name in by_group[0]:
            yield name, [said[name] for said in by_group]
        ahead = [said["look-ahead"] for said in by_group]
        yield "untrained default", _stepped([], side, groups, warm, ahead)
    for name, predictor in predictors.items():
        if side.of_source and not isinstance(predictor, SourcePredictor):
            continue
        alone = [replay.all_at_once(predictor, group) for group in groups]
        yield name, alone
        yield f"{name} + online table", _stepped([alone], side, groups, warm, None)
        if ahead is not None:
            yield f"{name} + online table + look-ahead", _stepped([alone], side, groups, warm, ahead)


def _tlp(group: Group, num_experts: int) -> Tensor:
    """A prompt has no step before."""
    p_BTLE = replay.all_at_once(TLP(num_experts), group)
    p_BTLE[:, : group.prefill] = float("nan")
    return p_BTLE


def _stepped(
    others: Sequence[list[Tensor]],
    side: Side,
    groups: Sequence[Group],
    warm: Sequence[Group],
    ahead: list[Tensor] | None,
) -> list[Tensor]:
    """The online table, in combination with what others said of each group and with look-ahead."""
    table = OnlineTokenTable(side.layers, side.num_experts, side.top_k)
    stand_ins = [Said(p_GBTLE[0]) for p_GBTLE in others]
    look = SaidAhead() if ahead is not None else None
    predictor: PathPredictor = table
    if others or look is not None:
        predictor = Combination([*stand_ins, table], side.layers, side.num_experts, look)
    replay.serve(table, warm, side.num_experts)
    out = []
    for index, group in enumerate(groups):
        for stand_in, p_GBTLE in zip(stand_ins, others, strict=True):
            stand_in.p_BTLE = p_GBTLE[index]
        if ahead is not None:
            group = replace(group, ahead_BTLE=ahead[index])
        out.append(replay.stepped(predictor, group, side.num_experts, stand_ins, look))
    return out


@dataclass(frozen=True)
class Rows:
    """What was said and what came true at N tokens, and which tokens ran side by side.

    step_N: equal for tokens of one group at the same step of different sequences. p is nan where nothing was
    said (layers that the predictor cannot know).
    """

    p_NLE: Tensor
    truth_NLE: Tensor
    step_N: Tensor


def _phases(groups: Sequence[Group], p_GBTLE: Sequence[Tensor], side: Side) -> Iterator[tuple[str, Rows]]:
    for phase in ("decode", "prefill"):
        parts = []
        for index, (group, p_BTLE) in enumerate(zip(groups, p_GBTLE, strict=True)):
            columns = slice(group.prefill, None) if phase == "decode" else slice(0, group.prefill)
            mask_TB = group.mask_BT[:, columns].T
            step_TB = torch.arange(len(mask_TB))[:, None].expand_as(mask_TB) + index * 1_000_000
            truth = multi_hot(group.routes_BTLK[:, columns].transpose(0, 1)[mask_TB], side.num_experts)
            parts.append(Rows(p_BTLE[:, columns].transpose(0, 1)[mask_TB], truth, step_TB[mask_TB]))
        rows = Rows(
            torch.cat([part.p_NLE for part in parts]).to(torch.float16),
            torch.cat([part.truth_NLE for part in parts]),
            torch.cat([part.step_N for part in parts]),
        )
        if len(rows.step_N):
            yield phase, rows


def judge(rows: Rows, conditions: Conditions) -> dict[str, Any]:
    """All metrics of one predictor in one phase. Layers that it says nothing of are left out, and counted.

    The threshold is the one number where it predicts as many experts as tokens use: precision = recall. The
    same threshold then serves every batch size, OR over its tokens.
    """
    heard_L = ~rows.p_NLE.isnan().flatten(2).any(2).any(0)
    layers = torch.nonzero(heard_L).flatten()
    tokens = len(rows.step_N)
    silent = {"tokens": tokens, "layers": layers.tolist()}
    if not len(layers):
        return silent
    histogram, budget = None, None
    for chunk in torch.arange(tokens).split(4096):
        p_NLE, truth_NLE = rows.p_NLE[chunk][:, layers].float(), rows.truth_NLE[chunk][:, layers]
        part = ProbabilityHistogram.of(p_NLE, truth_NLE)
        histogram = part if histogram is None else histogram + part
        guessed = guesses_at_equal_budget(p_NLE, truth_NLE)
        budget = guessed if budget is None else budget + guessed
    assert histogram is not None
    assert budget is not None
    threshold = histogram.break_even()
    said, came_true, count = histogram.reliability()
    _, precision, recall = histogram.precision_recall()
    picked = torch.linspace(0, len(recall) - 1, CURVE_POINTS).long()
    return silent | {
        "threshold": threshold,
        "recall_equal_budget": _number(budget.recall),
        "recall_equal_budget_by_layer": _list(budget.recall_L),
        "calibration_error": _number(histogram.expected_calibration_error()),
        "reliability": {"said": _list(said), "came_true": _list(came_true), "count": _list(count)},
        "curve": {"precision": _list(precision[picked]), "recall": _list(recall[picked])},
        "batches": _by_batch(rows, layers, threshold, conditions),
    }


def _list(values: Tensor) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    """JSON knows no nan."""
    return None if value != value else round(value, 6)


def _by_batch(rows: Rows, layers: Tensor, threshold: float, conditions: Conditions) -> dict[str, Any]:
    """Batch size -> metrics; sizes that never ran side by side are absent."""
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(conditions.seed)
    # Rows of one step in random order: the groups are sorted by length.
    order = torch.randperm(len(rows.step_N), generator=generator)
    order = order[rows.step_N[order].argsort(stable=True)]
    p_NLE, truth_NLE = rows.p_NLE[order][:, layers], rows.truth_NLE[order][:, layers]
    for size in conditions.batches:
        members_Bn = _batches(rows.step_N[order], size)
        if len(members_Bn):
            found[str(size)] = _judge_batches(p_NLE, truth_NLE, members_Bn, threshold)
    return found


def _batches(step_N: Tensor, size: int) -> Tensor:
    """members_Bn: rows of full batches of `size` at the same step; step_N is sorted."""
    _, count_G = step_N.unique_consecutive(return_counts=True)
    start_G = count_G.cumsum(0) - count_G
    group_N = torch.repeat_interleave(torch.arange(len(count_G)), count_G)
    place_N = torch.arange(len(step_N)) - start_G[group_N]
    return torch.nonzero(place_N < (count_G // size * size)[group_N]).flatten().view(-1, size)


def _judge_batches(p_NLE: Tensor, truth_NLE: Tensor, members_Bn: Tensor, threshold: float) -> dict[str, Any]:
    budget: Guesses | None = None
    at_threshold: Guesses | None = None
    accuracy = []
    for chunk in members_Bn.split(max(1, 8192 // members_Bn.shape[1])):
        p_BnLE = p_NLE[chunk].float()
        truth_BLE, predicted_BLE = truth_NLE[chunk].any(1), (p_BnLE > threshold).any(1)
        # Minus log(1 - p) of the batch ranks as its p does, and keeps apart what rounds to one.
        score_BLE = -log_absent(p_BnLE).sum(1)
        part, threshed = guesses_at_equal_budget(score_BLE, truth_BLE), guesses_of(predicted_BLE, truth_BLE)
        budget = part if budget is None else budget + part
        at_threshold = threshed if at_threshold is None else at_threshold + threshed
        accuracy.append(accuracy_by_row(truth_BLE, predicted_BLE))
    assert budget is not None
    assert at_threshold is not None
    accuracy_L = torch.cat(accuracy).nanmean(0)
    batches = len(members_Bn)
    return {
        "batches": batches,
        "accuracy": _number(accuracy_L.nanmean().item()),
        "accuracy_by_layer": _list(accuracy_L),
        "precision": _number(at_threshold.precision),
        "precision_by_layer": _list(at_threshold.precision_L),
        "recall_equal_budget": _number(budget.recall),
        "recall_equal_budget_by_layer": _list(budget.recall_L),
        "experts_active": at_threshold.active_L.sum().item() / batches,
        "experts_wasted": at_threshold.bytes_wasted(1) / batches,
        "experts_missed": at_threshold.bytes_missed(1) / batches,
    }
