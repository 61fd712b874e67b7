"""The token scheduler on the virtual clock: recorded sequences decode in units of two batches, with refills.

As in the engine: units take turns, a sequence that ends makes room for a waiting one, the batches of a unit run one
after the other (`split`) or side by side (`joint`). Who joins a unit (admission) and who sits in which of its batches
(grouping) goes by order of arrival, by predictions, or by what really came, which nobody can know. Prompts run before
and are not simulated. Everything that is predicted is causal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from expertflow.core import routes_to_mask
from expertflow.predictor.online_table import OnlineTokenTable
from expertflow.predictor.pass_forecast import PassForecast
from expertflow.predictor.protocol import PathContext
from expertflow.scheduler.admission import admit
from expertflow.scheduler.group import group
from expertflow.sim.clock import Outcome, Pass, Simulation
from expertflow.sim.compare import KNOWN
from expertflow.sim.hardware import Costs
from expertflow.sim.workload import Foretold, forecast_of, shape_of, soon_of

By = Literal["arrival", "predicted", "true"]
Execution = Literal["split", "joint"]
PROMPT_TOKENS = 64  # the last ones of a prompt tell its profile
_CANDIDATES = 256  # of those that wait, the first ones are looked at


@dataclass(frozen=True)
class Scheduling:
    """batch: sequences of a batch (T); a unit has two. patience: as in scheduler/admission.py; None: four times what
    decodes at once. prompts: sequences at most, each prompt once; None for all."""

    execution: Execution = "split"
    grouping: By = "arrival"
    admission: By = "arrival"
    batch: int = 16
    num_units: int = 2
    patience: int | None = None
    prompts: int | None = None

    def __post_init__(self) -> None:
        for name in ("grouping", "admission"):
            if (value := getattr(self, name)) not in get_args(By):
                raise ValueError(f"{name}={value!r} is unknown; use {' or '.join(map(repr, get_args(By)))}")
        if self.batch < 1 or self.num_units < 1:
            raise ValueError(f"batch={self.batch}, num_units={self.num_units}: give 1 or more")

    @property
    def held(self) -> int:
        return 2 * self.batch * self.num_units

    @property
    def most_overtaken(self) -> int:
        return 4 * self.held if self.patience is None else self.patience


class Token(NamedTuple):
    """A decode step of a sequence of Foretold, both counted from 0."""

    sequence: int
    step: int


class _Turn(NamedTuple):
    """One pass."""

    step: int
    unit: int
    tokens: list[Token]
    used_LE: Tensor


class UnitStep(NamedTuple):
    unit: int
    batches: list[list[Token]]  # one or two
    moved: int  # sequences that changed their batch for it


@dataclass
class Scheduled:
    """What came of a run. Seconds are of the virtual clock; moving a sequence takes none."""

    steps: int = 0  # of a unit
    tokens: int = 0
    moved: int = 0
    activations: int = (
        0  # experts, once for each batch that runs on its own (Eq. 2), or for the unit that is joint
    )
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.outcome.seconds

    @property
    def activations_per_token(self) -> float:
        return self.activations / self.tokens

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens_per_second": self.tokens_per_second,
            "activations_per_token": self.activations_per_token,
            "loads_per_token": self.outcome.loads / self.tokens,
            "hit_ratio": self.outcome.hit_ratio,
            "moved_per_step": self.moved / self.steps,
            "stalled": self.outcome.stall_seconds / self.outcome.seconds,
            "transfer_to_compute": self.outcome.link_seconds / self.outcome.compute_seconds,
        }


def simulate_scheduling(
    foretold: Foretold,
    how: Scheduling,
    cost: Costs,
    cache_size: float,
    policy: str = "plec",
    max_steps: int | None = None,
) -> Scheduled:
    """Decode the sequences with an expert cache behind a link.

    foretold: what a predictor said; forecasts for the policy come of it in every case. cost: of one batch; what runs
    between MoE layers runs for each of two joint batches. cache_size: experts per layer on average. Raises ValueError
    where "predicted" is asked of no predictor.
    """
    shape = shape_of(foretold.meta)
    num_experts = max(shape.experts_per_layer)
    result, passes = Scheduled(), []
    expected = PassForecast(
        shape.num_layers,
        num_experts,
        foretold.meta.top_k,
        foretold.p_TLE is not None,
        foretold.absent_TCLE is not None,
    )
    draw = torch.Generator().manual_seed(0)
    turns: list[_Turn] = []
    for step in itertools.islice(decode_steps(foretold, how), max_steps):
        together = (
            step.batches if how.execution == "split" else [[t for batch in step.batches for t in batch]]
        )
        turns += [
            _Turn(result.steps, step.unit, tokens, paths_of(foretold, tokens).any(0)) for tokens in together
        ]
        result.steps += 1
        result.moved += step.moved
    for turn, after in itertools.zip_longest(turns, turns[1:]):
        # The newest tokens of the next pass are there already, unless this very unit has to find them.
        known = after is not None and (after.step == turn.step or after.unit != turn.unit)
        next_LE = soon_of(foretold, expected, after.tokens, after.used_LE) if known else None
        forecast = forecast_of(foretold, expected, turn.tokens, turn.used_LE, draw)
        experts_L = [row.nonzero().flatten().tolist() for row in turn.used_LE]
        passes.append(Pass(experts_L, forecast, next_LE=next_LE))
        result.activations += int(turn.used_LE.sum())
        result.tokens += len(turn.tokens)
    if how.execution == "joint":
        cost = replace(cost, dense_s=2 * cost.dense_s)
    kind = KNOWN[policy]
    slots = kind.slots_for(shape, min(round(cache_size * shape.num_layers), shape.num_experts))
    result.outcome = Simulation(kind(shape, slots), cost).run(passes)
    return result


# (execution, grouping, admission): what table 2 of the paper compares, what it could be at most, joint execution.
WAYS: dict[str, tuple[Execution, By, By]] = {
    "split": ("split", "arrival", "arrival"),
    "split, TS": ("split", "predicted", "arrival"),
    "split, TS, true paths": ("split", "true", "arrival"),
    "joint": ("joint", "arrival", "arrival"),
    "joint, TS": ("joint", "predicted", "predicted"),
    "joint, TS, true paths": ("joint", "true", "true"),
}
# The two parts of joint's: exchanging sequences between units, and who joins.
PARTS: dict[str, tuple[Execution, By, By]] = {
    "joint, exchange": ("joint", "predicted", "arrival"),
    "joint, exchange, true paths": ("joint", "true", "arrival"),
    "joint, admission": ("joint", "arrival", "predicted"),
    "joint, admission, true profiles": ("joint", "arrival", "true"),
}


def compare_scheduling(
    foretold: Foretold,
    cost: Costs,
    cache_size: float,
    batch: int = 16,
    num_units: int = 3,
    policy: str = "plec",
    max_steps: int | None = None,
    ways: Sequence[str] = tuple(WAYS),
) -> list[dict[str, Any]]:
    """One row of plain JSON for each of `ways`, of WAYS and PARTS: Scheduled.to_dict(), and `to_split` in tokens/s.

    foretold: of a predictor, such as "online"; cost: from hardware.costs; cache_size: experts per layer. max_steps:
    of units; None until all sequences have ended. Raises ValueError as simulate_scheduling does.
    """
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(["split", *ways]):
        execution, grouping, admission = (WAYS | PARTS)[name]
        how = Scheduling(execution, grouping, admission, batch, num_units)
        done = simulate_scheduling(foretold, how, cost, cache_size, policy, max_steps)
        rows.append(
            {"way": name, "batch": batch, "units": num_units, "cache_size": cache_size} | done.to_dict()
        )
        rows[-1]["to_split"] = rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"]
    return [row for row in rows if row["way"] in ways]


def decode_steps(foretold: Foretold, how: Scheduling) -> Iterator[UnitStep]:
    """Who decodes with whom, step after step until all have ended. Sequences arrive in the order of `foretold`."""
    if foretold.p_TLE is None and "predicted" in (how.grouping, how.admission):
        raise ValueError(f"prediction={foretold.prediction!r} predicts no paths to schedule by; use another")
    waiting = _each_prompt_once(foretold)[: how.prompts]
    overtaken = [0] * len(waiting)
    profiles = _Profiles(foretold, how.admission)
    units: list[list[list[Token]]] = [[[], []] for _ in range(how.num_units)]
    while waiting or any(any(unit) for unit in units):
        for number, unit in enumerate(units):
            sitting = [token.sequence for batch in unit for token in batch]
            room = min(2 * how.batch - len(sitting), len(waiting))
            chosen = list(range(room))
            if room and how.admission != "arrival":
                seen = waiting[:_CANDIDATES]
                found = admit(
                    profiles.of(seen), profiles.of(sitting), room, overtaken[: len(seen)], how.most_overtaken
                )
                chosen, overtaken[: len(seen)] = found.rows, found.overtaken
            else:
                del overtaken[:room]
            joining = [Token(waiting[row], 0) for row in chosen]
            for row in sorted(chosen, reverse=True):
                del waiting[row]
            for batch in unit:
                free = how.batch - len(batch)
                batch += joining[:free]
                joining = joining[free:]
            if not any(unit):
                continue
            # While the unit before this one ran, those of the unit before that were at rest.
            rests = how.execution == "joint" and how.num_units > 2
            partner = units[number - 2] if rests else [[], []]
            moved = 0
            if how.grouping != "arrival":
                moved = _group(foretold, how.grouping, how.execution, unit, partner)
            batches = [batch for batch in unit if batch]
            yield UnitStep(number, [list(batch) for batch in batches], moved)
            units[number] = [[], []]
            for left, batch in zip(units[number], batches, strict=False):
                for sequence, step in batch:
                    if step + 1 < _length(foretold, sequence):
                        left.append(Token(sequence, step + 1))
                    else:
                        profiles.learn(sequence)


def paths_of(foretold: Foretold, tokens: Sequence[Token]) -> Tensor:
    """True paths_NLE, bool."""
    num_experts = max(shape_of(foretold.meta).experts_per_layer)
    rows = []
    for number, step in tokens:
        sequence = foretold.sequences[number]
        routes_LK = sequence.target_routes_TLK[sequence.num_prefill + step]
        rows.append(torch.from_numpy(routes_LK.astype("int64")))
    return routes_to_mask(torch.stack(rows), num_experts)


def _group(
    foretold: Foretold, by: By, execution: Execution, unit: list[list[Token]], partner: list[list[Token]]
) -> int:
    """Exchange sequences, in place: of the unit's batches where they run apart (split), else of the two units.

    Returns how many changed their batch or unit.
    """
    together = unit if execution == "split" else [unit[0] + unit[1], partner[0] + partner[1]]
    if not all(together):
        return 0
    tokens = [token for part in together for token in part]
    if by == "true":
        paths_NLE = paths_of(foretold, tokens)
    else:
        assert foretold.p_TLE is not None
        paths_NLE = torch.stack([foretold.p_TLE[n][t] for n, t in tokens]).float()
    found = group(paths_NLE, 2, sizes=[len(part) for part in together])
    parts = [[tokens[row] for row in rows] for rows in found.groups]
    if execution == "joint":
        sizes = len(unit[0]), len(partner[0])
        parts = [part for rows, size in zip(parts, sizes, strict=True) for part in (rows[:size], rows[size:])]
    for batch, part in zip([*unit, *partner], parts, strict=False):
        batch[:] = part
    return found.moved


class _Profiles:
    """How often each sequence needs each expert: known, or guessed by its prompt's tokens from those that ended."""

    def __init__(self, foretold: Foretold, by: By):
        shape = shape_of(foretold.meta)
        self._foretold, self._by = foretold, by
        self._empty = torch.zeros(0, shape.num_layers, max(shape.experts_per_layer))
        self._table = OnlineTokenTable(shape.num_layers, max(shape.experts_per_layer), foretold.meta.top_k)
        self._known: dict[int, tuple[int, Tensor]] = {}  # what was known when it was guessed, and the guess
        self._learnt = 0

    def of(self, sequences: Sequence[int]) -> Tensor:
        """p_NLE."""
        return torch.stack([self._one(number) for number in sequences]) if sequences else self._empty

    def learn(self, number: int) -> None:
        """A sequence has ended."""
        if self._by != "predicted":
            return
        sequence = self._foretold.sequences[number]
        ids_1T = torch.from_numpy(sequence.target_ids_T.astype("int64"))[None]
        routes_1TLK = torch.from_numpy(sequence.target_routes_TLK.astype("int64"))[None]
        self._table.observe_pass(PathContext(target_BT=ids_1T, num_new=ids_1T.shape[1]), routes_1TLK)
        self._learnt += 1

    def _one(self, number: int) -> Tensor:
        learnt, p_LE = self._known.get(number, (-1, self._empty))
        # A guess is made anew when twice as much is known.
        if learnt < 0 or (self._by == "predicted" and self._learnt > 2 * learnt):
            sequence = self._foretold.sequences[number]
            if self._by == "true":
                steps = [Token(number, step) for step in range(_length(self._foretold, number))]
                p_LE = paths_of(self._foretold, steps).float().mean(0)
            else:
                read = sequence.source_ids_S if len(sequence.source_ids_S) else sequence.target_ids_T
                prompt = read[: sequence.num_prefill] if not len(sequence.source_ids_S) else read
                ids_1T = torch.from_numpy(prompt[-PROMPT_TOKENS:].astype("int64"))[None]
                context = PathContext(target_BT=ids_1T, num_new=ids_1T.shape[1])
                p_LE = self._table.predict(context)[0].mean(0)
            self._known[number] = (self._learnt, p_LE)
        return p_LE


def _length(foretold: Foretold, sequence: int) -> int:
    one = foretold.sequences[sequence]
    return len(one.target_ids_T) - one.num_prefill


def _each_prompt_once(foretold: Foretold) -> list[int]:
    """Several answers to one prompt are alike beyond what prompts are."""
    first: dict[tuple[str, int], int] = {}
    for number, sequence in enumerate(foretold.sequences):
        first.setdefault((sequence.task, sequence.prompt), number)
    return list(first.values())
