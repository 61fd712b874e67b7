"""Policies side by side: the same steps, slots and link for all; LRU, Belady and the oracle always beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expertflow.cache.policies import POLICIES, SIMULATED, Policy
from expertflow.sim.clock import Outcome, Simulation
from expertflow.sim.hardware import Costs, Hardware, costs
from expertflow.sim.workload import Foretold, Workload, make_workload

FORMAT = "expertflow-simulation-1"
KNOWN: dict[str, type[Policy]] = {**POLICIES, **SIMULATED}
BESIDE = ("lru", "belady", "belady-prefetch")  # always reported
OF_PREDICTIONS = "plec"  # what the oracle is asked with
NOBODY = "-"  # the predictor of a policy that takes none


@dataclass(frozen=True)
class Conditions:
    """What is varied, and how large an expert is. ratios: of transfer to arithmetic under LRU, instead of the
    hardware's link; empty to go by the link."""

    policies: tuple[str, ...]
    cache_sizes: tuple[float, ...]
    batches: tuple[int, ...]
    machines: tuple[Hardware, ...]
    expert_bytes: int
    dense_bytes: int
    ratios: tuple[float, ...] = ()
    max_steps: int | None = None
    in_turn: bool = False  # two batches take turns, and the next pass is foreseen

    def __post_init__(self) -> None:
        for name in self.policies:
            if name not in KNOWN:
                raise ValueError(f"unknown policy {name!r}; known: {', '.join(KNOWN)}")
        for name, values in (
            ("cache-size", self.cache_sizes),
            ("batch", self.batches),
            ("ratio", self.ratios),
        ):
            if any(not value > 0 for value in values):
                raise ValueError(f"--{name} {','.join(map(str, values))}: give numbers above 0")


def compare(
    foretold: Mapping[str, Foretold],
    conditions: Conditions,
    progress: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """One row of plain JSON for each combination. foretold: by predictor, "oracle" among them.

    Raises ValueError for a cache of fewer than two slots.
    """
    rows = []
    for batch in conditions.batches:
        progress(f"batch {batch}: predictions")
        workloads = {
            name: make_workload(said, batch, conditions.max_steps, in_turn=conditions.in_turn)
            for name, said in foretold.items()
        }
        oracle = workloads["oracle"]
        for cache_size in conditions.cache_sizes:
            num_slots = round(cache_size * oracle.shape.num_layers)
            if num_slots < 2:
                raise ValueError(
                    f"--cache-size {cache_size:g} of {oracle.shape.num_layers} layers is {num_slots} slots; at "
                    f"least 2 are needed, one to load into while one computes"
                )
            num_slots = min(num_slots, oracle.shape.num_experts)
            for machine, cost, ratio in _links(conditions, oracle, num_slots):
                progress(f"batch {batch}, cache size {cache_size:g}, {machine.name}")
                lru = simulate("lru", oracle, num_slots, cost)
                for name, predictor in _columns(conditions.policies, list(foretold)):
                    workload = oracle if predictor == NOBODY else workloads[predictor]
                    outcome = lru if name == "lru" else simulate(name, workload, num_slots, cost)
                    row = {
                        "policy": name,
                        "predictor": predictor,
                        "batch": batch,
                        "in_turn": conditions.in_turn,
                        "rows": round(workload.mean_rows, 2),
                        "cache_size": cache_size,
                        "slots": KNOWN[name].slots_for(workload.shape, num_slots),
                        "hardware": machine.name,
                        "lru_ratio": ratio,
                    }
                    rows.append(row | _measures(outcome, lru, conditions.expert_bytes))
    return rows


def simulate(name: str, workload: Workload, num_slots: int, cost: Costs) -> Outcome:
    """A draft's own pass over the dense weights counts as the model's own does."""
    policy = KNOWN[name]
    if workload.drafted:
        cost = replace(cost, pass_s=cost.pass_s + workload.shape.num_layers * cost.dense_s)
    return Simulation(policy(workload.shape, policy.slots_for(workload.shape, num_slots)), cost).run(
        workload.passes
    )


def _links(
    conditions: Conditions, workload: Workload, num_slots: int
) -> Iterator[tuple[Hardware, Costs, float | None]]:
    for machine in conditions.machines:
        cost = costs(machine, conditions.expert_bytes, conditions.dense_bytes)
        if not conditions.ratios:
            yield machine, cost, None
        for ratio in conditions.ratios:
            # What LRU loads hardly depends on how long it takes, so one run tells.
            lru = simulate("lru", workload, num_slots, cost)
            load_s = ratio * lru.compute_seconds / lru.loads
            yield machine, replace(cost, chunk_s=load_s / cost.chunks), ratio


def _columns(policies: Sequence[str], predictors: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Policy and predictor of each row; a policy that looks at no prediction comes once."""
    asked = dict.fromkeys([*policies, *(name for name in BESIDE if name not in policies)])
    for name in asked:
        if name in BESIDE or not KNOWN[name].looks_ahead or KNOWN[name].whole_layers:
            yield name, NOBODY
        else:
            yield from ((name, predictor) for predictor in predictors if predictor != "oracle")
    yield OF_PREDICTIONS, "oracle"


def _measures(outcome: Outcome, lru: Outcome, expert_bytes: int) -> dict[str, Any]:
    return {
        "steps": outcome.passes,
        "hit_ratio": round(outcome.hit_ratio, 4),
        "bytes_per_step": round(outcome.loads * expert_bytes / outcome.passes),
        "bytes_to_lru": round(outcome.loads / lru.loads, 4),
        "step_seconds": outcome.seconds / outcome.passes,
        "arithmetic_seconds": outcome.compute_seconds / outcome.passes,
        "stall_seconds": outcome.stall_seconds / outcome.passes,
        "time_to_lru": round(outcome.seconds / lru.seconds, 4),
        "link_busy": round(outcome.link_seconds / outcome.seconds, 4),
        "transfer_to_compute": round(outcome.link_seconds / outcome.compute_seconds, 4),
    }
