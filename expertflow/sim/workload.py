"""From recorded sequences to decode steps of batches, each with what a predictor said before it.

Sequences of similar answer length decode side by side, as many as the batch has; prompts run before and are not
simulated (a prompt needs nearly every expert). Of an encoder-decoder model it is the decoder that decodes.
Everything is causal: a predictor that learns while serving has learnt from earlier steps alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from expertflow.cache.policies import Forecast
from expertflow.core import MoEShape
from expertflow.predictor import replay
from expertflow.predictor.baselines import multi_hot, said_by_routes
from expertflow.predictor.combine import Combination
from expertflow.predictor.model import RoutingPathPredictor
from expertflow.predictor.next_use import HORIZONS
from expertflow.predictor.online_table import OnlineTokenTable
from expertflow.predictor.pass_forecast import PassForecast
from expertflow.predictor.protocol import PathContext, PathPredictor
from expertflow.predictor.replay import Group, Said
from expertflow.sim.clock import Pass
from expertflow.trace import Trace, TracedSequence, TraceMeta

PREDICTIONS = ("none", "online", "oracle", "noise")  # and a folder with a trained predictor


@dataclass(frozen=True)
class Workload:
    """Decode steps of one model, and what they were made from."""

    shape: MoEShape
    passes: list[Pass]
    batch: int
    rows: int  # tokens decoded in all
    prediction: str
    drafted: bool = False  # what was expected of each pass took a pass without experts before

    @property
    def mean_rows(self) -> float:
        return self.rows / len(self.passes)


def shape_of(meta: TraceMeta) -> MoEShape:
    """The layers that decode."""
    return MoEShape(meta.experts_per_layer[meta.source_layers :])


@dataclass(frozen=True)
class Foretold:
    """What a predictor said of every decoded token of these sequences; the same for every batch size.

    Predicted in groups of 64 that decode side by side: the online table has learnt from the steps before, of
    all 64. p_TLE and absent_TCLE (not used within each of HORIZONS) of each sequence, or None. ahead_TLE: what was
    said of each layer while the one before it ran, nothing of the first.
    """

    meta: TraceMeta
    prediction: str
    sequences: list[TracedSequence]
    p_TLE: list[Tensor] | None
    absent_TCLE: list[Tensor] | None
    ahead_TLE: list[Tensor] | None = None
    drafted: bool = False

    @property
    def top_k(self) -> int:
        return self.meta.top_k


def foretell(
    meta: TraceMeta,
    sequences: Sequence[TracedSequence],
    prediction: str = "none",
    trained: RoutingPathPredictor | None = None,
    warm: Sequence[TracedSequence] = (),
    seed: int = 0,
    drafted: Trace | None = None,
) -> Foretold:
    """Ask a predictor once about all sequences that decode.

    prediction: one of PREDICTIONS, or the name of `trained` or `drafted`. warm: sequences that the online table has
    served before. drafted: what a draft said of the sequences, as zoo/draft_trace.py records it. Raises ValueError
    where nothing decodes, or a sequence was not drafted.
    """
    shape = shape_of(meta)
    if not shape.num_layers:
        raise ValueError(f"{meta.model} has no MoE layers in its decoder; nothing to simulate in decode")
    if trained is None and drafted is None and prediction not in PREDICTIONS:
        raise ValueError(f"unknown predictor {prediction!r}; known: {', '.join(PREDICTIONS)}, or a folder")
    decoding = [s for s in sequences if len(s.target_ids_T) > s.num_prefill]
    if not decoding:
        raise ValueError("none of these sequences has a decode step; record answers of two tokens and more")
    random.Random(seed).shuffle(decoding)  # runs of one prompt follow each other in a recording
    if prediction in ("none", "oracle"):
        return Foretold(meta, prediction, decoding, None, None)
    num_layers, num_experts = shape.num_layers, max(shape.experts_per_layer)
    table = OnlineTokenTable(num_layers, num_experts, meta.top_k)
    replay.serve(table, [replay.pad(part) for part in _parts(warm)], num_experts)
    predictor: PathPredictor = table
    said = Said(torch.zeros(0))
    if trained is not None or drafted is not None:
        predictor = Combination([said, table], num_layers, num_experts)
    of_draft = {} if drafted is None else {(s.prompt, s.run): s for s in drafted}
    has_head = trained is not None and trained.next_use_head is not None
    ordered: list[TracedSequence] = []
    p_TLE: list[Tensor] = []
    absent_TCLE: list[Tensor] = []
    for part in _parts(decoding):
        group = replay.pad(part)
        if trained is not None:
            said.p_BTLE = replay.all_at_once(trained, group)
        elif drafted is not None:
            said.p_BTLE = _of_draft(group, of_draft, shape)
        told = [said] if predictor is not table else []
        p_TLE += decoded(group, replay.stepped(predictor, group, num_experts, told))
        if has_head and trained is not None:
            within_BTLN = replay.all_at_once(_Within(trained), group)
            absent_BTCLE = (1 - within_BTLN).unflatten(-1, (len(HORIZONS), -1)).transpose(2, 3).half()
            absent_TCLE += decoded(group, absent_BTCLE)
        ordered += group.sequences
    absent = absent_TCLE if has_head else None
    return Foretold(meta, prediction, ordered, p_TLE, absent, drafted=drafted is not None)


def _of_draft(group: Group, drafted: Mapping[tuple[int, int], TracedSequence], shape: MoEShape) -> Tensor:
    """p_BTLE of a group's columns; nothing is said of prompts and padding."""
    experts_L = shape.experts_per_layer
    p_BTLE = torch.zeros(len(group), group.length, len(experts_L), max(experts_L))
    for row, sequence in enumerate(group.sequences):
        said = drafted.get((sequence.prompt, sequence.run))
        if said is None or not np.array_equal(said.target_ids_T, sequence.target_ids_T):
            raise ValueError(
                f"run {sequence.run} of prompt {sequence.prompt} was not drafted; record it with zoo.draft_trace"
            )
        at_T = group.mask_BT[row].nonzero().flatten()[sequence.num_prefill :]
        routes_TLK = torch.from_numpy(said.target_routes_TLK[sequence.num_prefill :].astype("int64"))
        for layer, experts in enumerate(experts_L):
            p_BTLE[row, at_T, layer] = said_by_routes(routes_TLK[: len(at_T), layer], experts, max(experts_L))
    return p_BTLE


def _parts(sequences: Sequence[TracedSequence]) -> Iterator[Sequence[TracedSequence]]:
    for first in range(0, len(sequences), replay.GROUP):
        yield sequences[first : first + replay.GROUP]


def decoded(group: Group, values_BT: Tensor) -> list[Tensor]:
    """The decode steps of each row."""
    return [values_BT[row, group.prefill :][group.mask_BT[row, group.prefill :]] for row in range(len(group))]


class Step(NamedTuple):
    """One forward pass: each row is a sequence of a Foretold and the number of its decode step. last: the texts end
    with it, so what was seen lately says nothing of what comes. next_is_known: the newest tokens of the pass after it
    are there when it begins, since that is another batch's."""

    rows: Sequence[tuple[int, int]]
    last: bool = False
    next_is_known: bool = False


def decode_steps(sequence: TracedSequence) -> int:
    return len(sequence.target_ids_T) - sequence.num_prefill


def make_workload(
    foretold: Foretold, batch: int, max_steps: int | None = None, seed: int = 0, *, in_turn: bool = False
) -> Workload:
    """Decode steps in batches of sequences whose answers are about as long, one after the other.

    in_turn: two at a time, which take turns as the engine's units do; while one runs, the next pass of the other is
    foreseen. Raises ValueError for a batch that is no size, or larger than the recording (half of it, in turn).
    """
    groups = alike_in_length(foretold.sequences, batch, seed)
    runs = [list(_batch_steps(foretold.sequences, members)) for members in groups]
    if in_turn:
        if len(runs) < 2:
            raise ValueError(
                f"batch={batch} in turn: give 1 to {len(foretold.sequences) // 2}, half the number of recorded "
                f"sequences that decode"
            )
        runs = [_in_turn(one, other) for one, other in zip(runs[::2], runs[1::2], strict=False)]
    steps = itertools.chain.from_iterable(runs)
    return workload_of(foretold, batch, itertools.islice(steps, max_steps), seed)


def _in_turn(one: Sequence[Step], other: Sequence[Step]) -> list[Step]:
    """What follows a step is foreseen where it is the other batch's: its own next token is not there yet."""
    both = min(len(one), len(other))
    turns = [step for pair in zip(one, other, strict=False) for step in pair]
    alone = [*one[both:], *other[both:]]
    found = [step._replace(last=False, next_is_known=True) for step in turns]
    if alone:  # the last turn of the two was `other`'s
        found[-1] = found[-1]._replace(next_is_known=len(one) > both)
    found += [step._replace(last=False) for step in alone]
    return [*found[:-1], found[-1]._replace(last=True, next_is_known=False)]


def alike_in_length(sequences: Sequence[TracedSequence], size: int, seed: int = 0) -> list[list[int]]:
    """Sequences in groups of `size` whose answers are about as long, the longest in front; groups in random order.

    Raises ValueError for a size that is none, or larger than the recording.
    """
    if not 1 <= size <= len(sequences):
        raise ValueError(
            f"batch={size}: give 1 to {len(sequences)}, the number of recorded sequences that decode"
        )
    order = sorted(range(len(sequences)), key=lambda n: -decode_steps(sequences[n]))
    full = len(order) // size * size  # the remainder would be a smaller batch
    groups = [order[first : first + size] for first in range(0, full, size)]
    random.Random(seed).shuffle(groups)
    return groups


def _batch_steps(sequences: Sequence[TracedSequence], members: Sequence[int]) -> Iterator[Step]:
    longest = decode_steps(sequences[members[0]])
    for t in range(longest):
        rows = [(n, t) for n in members if t < decode_steps(sequences[n])]
        yield Step(rows, last=t == longest - 1)


def workload_of(foretold: Foretold, batch: int, steps: Iterable[Step], seed: int = 0) -> Workload:
    """Passes of these steps, in this order, each with what was expected of it before; `batch` is only noted."""
    meta, sequences = foretold.meta, foretold.sequences
    shape = shape_of(meta)
    experts = max(shape.experts_per_layer)
    expected = PassForecast(
        shape.num_layers, experts, meta.top_k, foretold.p_TLE is not None, foretold.absent_TCLE is not None
    )
    draw = torch.Generator().manual_seed(seed)
    passes: list[Pass] = []
    rows = 0

    def used(step: Step) -> Tensor:
        routes_BLK = torch.stack([_routes_LK(sequences[n], t) for n, t in step.rows])
        return multi_hot(routes_BLK, experts).any(0)

    todo = iter(steps)
    after = next(todo, None)
    while after is not None:
        step, after = after, next(todo, None)
        used_LE, next_LE = used(step), None
        if step.next_is_known and after is not None:
            next_LE = soon_of(foretold, expected, after.rows, used(after))
        forecast = forecast_of(foretold, expected, step.rows, used_LE, draw)
        experts_L = [row.nonzero().flatten().tolist() for row in used_LE]
        passes.append(Pass(experts_L, forecast, _ahead_L(foretold, step.rows), next_LE))
        rows += len(step.rows)
        if step.last:
            expected.end_of_text()
    return Workload(shape, passes, batch, rows, foretold.prediction, foretold.drafted)


def _ahead_L(foretold: Foretold, rows: Sequence[tuple[int, int]]) -> Sequence[Sequence[float] | None]:
    """What look-ahead says of each layer of these rows together; of the first it knows nothing."""
    if foretold.ahead_TLE is None:
        return ()
    return [None, *_any_row(foretold.ahead_TLE, rows)[1:].tolist()]


def _routes_LK(sequence: TracedSequence, t: int) -> Tensor:
    return torch.from_numpy(sequence.target_routes_TLK[sequence.num_prefill + t].astype("int64"))


def forecast_of(
    foretold: Foretold,
    expected: PassForecast,
    rows: Sequence[tuple[int, int]],
    used_LE: Tensor,
    draw: torch.Generator,
) -> Forecast | None:
    """What is expected of one step of these rows; then learns from what it used."""
    if foretold.prediction == "none":
        return None
    p_LE = later_CLE = None
    if foretold.p_TLE is not None:
        p_LE = _any_row(foretold.p_TLE, rows)
    if foretold.absent_TCLE is not None:
        later_CLE = torch.stack([foretold.absent_TCLE[n][t] for n, t in rows]).float().prod(0)
    if foretold.prediction == "noise" and p_LE is not None:
        # The same probabilities, given to other experts of the layer.
        p_LE = p_LE.gather(1, torch.rand(p_LE.shape, generator=draw).argsort(1))
    now_LE, later_LE = expected.forecast(p_LE, later_CLE)
    expected.observe(used_LE)
    if foretold.prediction == "oracle":
        now_LE = used_LE.float()
    return Forecast(now_LE.tolist(), None if later_LE is None else later_LE.tolist())


def soon_of(
    foretold: Foretold, expected: PassForecast, rows: Sequence[tuple[int, int]], used_LE: Tensor
) -> list[list[float]] | None:
    """What is expected of a pass that comes after the one that begins, of other rows. Nothing is learnt from it."""
    if foretold.prediction == "oracle":
        return used_LE.float().tolist()
    if foretold.p_TLE is None or foretold.prediction == "noise":
        return None
    return expected.peek(_any_row(foretold.p_TLE, rows)).tolist()


def _any_row(p_TLE: Sequence[Tensor], rows: Sequence[tuple[int, int]]) -> Tensor:
    return 1 - (1 - torch.stack([p_TLE[n][t] for n, t in rows]).float()).prod(0)


class _Within:
    """A trained predictor's next-use head, asked as if it predicted routes: p of use within each horizon."""

    def __init__(self, trained: RoutingPathPredictor):
        self.trained = trained

    @torch.inference_mode()
    def predict(self, context: PathContext) -> Tensor:
        """within_BSL(CE)."""
        trained = self.trained
        mask_BT = context.target_mask_BT
        if mask_BT is None:
            mask_BT = torch.ones_like(context.target_BT, dtype=torch.bool)
        logits = trained(
            context.target_BT, mask_BT, context.source_BS, context.source_mask_BS, context.num_prefill_B
        )
        states_BSD = logits.target_states_BTD[:, context.target_BT.shape[1] - context.num_new :]
        # A longer horizon includes a shorter.
        within_BSCLE = trained.next_use_logits(states_BSD).sigmoid().cummax(2).values
        return within_BSCLE.transpose(2, 3).flatten(3)
