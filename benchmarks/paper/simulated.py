"""Systems side by side on recorded routes: the paper's rivals, ours, and those who know the future.

All decode the same tokens with the same slots over the same link (an A40's data sheet). Rivals run one batch to its
end, then the next; ours holds two batches, as the paper's dual-batch pipeline does, and prediction and grouping are
hidden as there: they take no time here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.paper.item import Row, Say
from benchmarks.paper.published import Published
from benchmarks.paper.units import Way, unit_workload
from expertflow.sim.clock import Outcome
from expertflow.sim.compare import KNOWN, simulate
from expertflow.sim.hardware import Costs, Hardware, costs, model_size
from expertflow.sim.workload import Foretold, Workload

A40 = "a40"


@dataclass(frozen=True)
class System:
    """Who runs how. policies: the fastest of them counts (SE-MoE has two forms)."""

    name: str
    policies: tuple[str, ...]
    way: Way
    for_whom: str = "all"  # or "switch": the paper has these rivals for Switch alone


CACHE_MOE, SE_MOE, PREGATED = "Cache-MoE", "SE-MoE", "Pregated-MoE"
ON_DEMAND, SPLIT, GROUPED, JOINT = "ours, on demand", "ours, no TS", "ours, TS", "ours, joint"
CACHE_MOE_BOTH = "Cache-MoE, both batches as one"
BEST_GROUPED, BEST_JOINT = "belady-prefetch, TS", "belady-prefetch, joint"
SYSTEMS: tuple[System, ...] = (
    System(CACHE_MOE, ("cache-moe",), "alone"),
    System(SE_MOE, ("se-moe", "se-moe-ring"), "alone", "switch"),
    System(PREGATED, ("pregated-moe",), "alone", "switch"),
    System(ON_DEMAND, ("lru",), "alone"),
    System(SPLIT, ("plec",), "split"),
    System(GROUPED, ("plec",), "grouped"),
    System(JOINT, ("plec",), "joint"),
    System(CACHE_MOE_BOTH, ("cache-moe",), "joint"),
    System(BEST_GROUPED, ("belady-prefetch",), "grouped"),
    System(BEST_JOINT, ("belady-prefetch",), "joint"),
)


def systems_for(model: Published) -> list[System]:
    is_switch = model.recording.startswith("switch")
    return [system for system in SYSTEMS if system.for_whom == "all" or is_switch]


def compared(
    model: Published,
    foretold: Foretold,
    batch: int,
    cache_sizes: Sequence[float],
    machine: Hardware,
    systems: Sequence[System],
    most_steps: int | None,
    most_sequences: int | None = None,
    say: Say = lambda text: None,
) -> list[Row]:
    """A row for each cache size and system. cache_sizes: experts per layer (the paper's CS)."""
    size = model_size(model.size)
    cost = costs(machine, size.expert_bytes, size.dense_bytes)
    workloads: dict[Way, Workload] = {
        way: unit_workload(foretold, batch, way, most_steps, most_sequences)
        for way in {system.way for system in systems}
    }
    done: dict[tuple[str, Way, int], Outcome] = {}
    rows = []
    for cache_size in cache_sizes:
        for system in systems:
            workload = workloads[system.way]
            name, outcome = _fastest(system, workload, cache_size, cost, done)
            row = {"model": model.name, "batch": batch, "cache_size": cache_size, "system": system.name}
            rows.append(row | {"policy": name} | measures(workload, outcome, size.expert_bytes))
        say(f"batch {batch}, {cache_size:g} experts per layer")
    return rows


def slots(workload: Workload, cache_size: float) -> int:
    return min(workload.shape.num_experts, max(2, round(cache_size * workload.shape.num_layers)))


def _fastest(
    system: System,
    workload: Workload,
    cache_size: float,
    cost: Costs,
    done: dict[tuple[str, Way, int], Outcome],
) -> tuple[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for name in system.policies:
        # A ring of two layers is the same whatever the cache size.
        key = name, system.way, KNOWN[name].slots_for(workload.shape, slots(workload, cache_size))
        if key not in done:
            done[key] = simulate(name, workload, slots(workload, cache_size), cost)
        outcomes[name] = done[key]
    name = min(outcomes, key=lambda name: outcomes[name].seconds)
    return name, outcomes[name]


def measures(workload: Workload, outcome: Outcome, expert_bytes: int) -> Row:
    """transfer_to_compute: seconds on the link over seconds of arithmetic."""
    return {
        "tokens_per_s": workload.rows / outcome.seconds,
        "arithmetic_tokens_per_s": workload.rows / outcome.compute_seconds,
        "hit_ratio": round(outcome.hit_ratio, 4),
        "transfer_to_compute": round(outcome.link_seconds / outcome.compute_seconds, 3),
        "bytes_per_token": round(outcome.loads * expert_bytes / workload.rows),
        "passes": outcome.passes,
        "tokens": workload.rows,
    }


class Grid:
    """Rows by condition and system."""

    def __init__(self, rows: Iterable[Row]):
        self.by: dict[tuple[str, float, float], dict[str, Row]] = {}
        for row in rows:
            condition = row["model"], row["batch"], row["cache_size"]
            self.by.setdefault(condition, {})[row["system"]] = row

    def conditions(self, model: str) -> list[tuple[str, float, float]]:
        return [condition for condition in self.by if condition[0] == model]

    def faster(self, condition: tuple[str, float, float], system: str, than: str) -> float | None:
        """How many times; None where either did not run under it."""
        found: Mapping[str, Row] = self.by.get(condition, {})
        if system not in found or than not in found:
            return None
        return found[system]["tokens_per_s"] / found[than]["tokens_per_s"]

    def best(self, model: str, system: str, than: str) -> tuple[float, tuple[str, float, float]] | None:
        """The largest such ratio ("up to"), and where."""
        ratios = [
            (ratio, condition)
            for condition in self.conditions(model)
            if (ratio := self.faster(condition, system, than)) is not None
        ]
        return max(ratios, default=None)
