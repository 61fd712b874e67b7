"""Runs on the clock: small trained models with their experts in RAM behind a throttled link.

The embedded model always; the zoo's (`make zoo`) where they are there. Every row has the share of the
processors' time that others had meanwhile (`stolen`, `others`), and is called disturbed where that is too much.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.on_the_clock import (
    TINY,
    Case,
    bandwidth_for,
    calibrate,
    least_loads,
    run,
    run_joint,
    texts,
)
from benchmarks.paper import recordings
from benchmarks.paper.item import Result, Row, Say, Settings
from expertflow import LLM, SamplingParams
from expertflow.cache.gate import AlwaysOpen
from expertflow.config import format_bandwidth
from expertflow.disturbance import MOST_OTHERS, MOST_STOLEN, Watch
from expertflow.engine.engine import Engine
from expertflow.models.fingerprint import fingerprint
from expertflow.timeline import Timeline

# The link over which LRU's loads take so many times its arithmetic, at a quarter of the experts.
RATIO, SHARE = 2.0, 1 / 4
_STEPS, _QUICK_STEPS, _ZOO_STEPS = 96, 24, 32  # those of the zoo have more layers, and take longer
_PROMPT_TOKENS = 32
_ZOO = {"qwen1.5-moe": 60, "mixtral-8": 8, "switch-32": 32, "switch-64": 64, "switch-128": 128}
POOLED = "plec"  # the policy that has one pool of slots for all layers; others give each layer its own
ALL, BOUND = "all in memory", "bound"  # for both batches as one
Together = Literal["one", "both", "joint"]  # a batch by itself; two as one of twice the size; two that meet


@dataclass(frozen=True)
class System:
    """Who runs what."""

    policy: str
    predicts: bool = False
    together: Together = "one"


@dataclass(frozen=True)
class Small:
    """A model that can run here."""

    name: str
    folder: Path
    task: str  # of the recording that its predictor is trained on
    experts: int


def models(settings: Settings) -> list[Small]:
    """The embedded model, and those of the zoo that were trained here."""
    zoo = [Small(name, settings.zoo / name, "chat", experts) for name, experts in _ZOO.items()]
    there = [small for small in zoo if (small.folder / "quality.json").exists() and not settings.quick]
    return [Small("tiny-moe", TINY, "chat", 32), *there]


def predictor(settings: Settings, small: Small, say: Say) -> str:
    """The folder of the one trained on recordings of this model. The online table in a quick run, and where the model
    in the zoo is another training than the recorded one, whose experts have other numbers."""
    if settings.quick:
        return recordings.UNTRAINED
    read = recordings.recording(settings, small.name, small.task)
    with LLM(small.folder, store="ram", cache_size=float(small.experts)) as llm:
        same = fingerprint(llm.model) == read.trace.meta.fingerprint
    if not same:
        say(f"{small.name}: recorded of another training than {small.folder}, so the online table predicts")
        return recordings.UNTRAINED
    recordings.trained(settings, small.name, small.task, say)
    return str(recordings.predictor_folder(settings, small.name, small.task))


def _kind(predictor: str) -> str:
    return predictor if predictor == recordings.UNTRAINED else "trained"


def untrained(result: Result) -> list[str]:
    """A sentence on models that nothing was trained for, where others have a trained predictor."""
    models = dict.fromkeys(
        row["model"] for row in result.rows if row.get("predictor") == recordings.UNTRAINED
    )
    if not models or result.conditions.get("quick"):
        return []
    return [
        f"{', '.join(models)}: with the online table, since the recordings are of another training of that model."
    ]


def decode(
    settings: Settings,
    small: Small,
    batch: int,
    cache_sizes: Sequence[int],
    systems: dict[str, System],
    say: Say,
) -> list[Row]:
    """Decode steps of known text under each system, and once with every expert in memory.

    cache_sizes: slots for each layer that a step runs. An encoder rests while its decoder decodes: the slots of its
    layers, where a policy gives it any, come on top and lie idle. Bound: nobody decodes faster than with all in memory,
    nor than the loads of a cache that knows all that comes take on the link.
    """
    steps = _QUICK_STEPS if settings.quick else _STEPS if small.folder == TINY else _ZOO_STEPS
    said = predictor(settings, small, say)
    link, share_that_runs = choose_link(small, batch, steps, say)

    def row(name: str, cache_size: int, sequences: int, measures: dict[str, Any]) -> Row:
        return {
            "model": small.name,
            "batch": batch,
            "cache_size": cache_size,
            "system": name,
            "link": format_bandwidth(link),
            "predictor": _kind(said),
            "tokens_per_s": sequences / measures["step_seconds"],
            **measures,
        }

    say(f"{small.name}, batch {batch}: {ALL}")
    free = run(small.folder, Case("lru", 2 * batch, small.experts), steps, part=1)
    rows = [row(ALL, small.experts, 2 * batch, free.measures())]
    for cache_size in cache_sizes:
        loads = least_loads(free, round(cache_size * free.layers))
        link_s, all_s = loads * free.expert_bytes / link, rows[0]["step_seconds"]
        fastest = {"step_seconds": max(all_s, link_s), "bytes_per_step": round(loads * free.expert_bytes)}
        rows.append(row(BOUND, cache_size, 2 * batch, fastest))
        for name, system in systems.items():
            say(f"{small.name}, batch {batch}, {cache_size} per layer: {name}")
            per_layer = cache_size * (share_that_runs if system.policy == POOLED else 1.0)
            size = 2 * batch if system.together == "both" else batch
            batches = 2 * batch // size
            case = Case(system.policy, size, per_layer, said if system.predicts else "none", link, batches)
            if system.together == "joint":
                rows.append(row(name, cache_size, 2 * batch, run_joint(small.folder, case, steps, part=1)))
            else:
                measures = run(small.folder, case, steps, part=1).measures()
                rows.append(row(name, cache_size, size, measures))
    return rows


def choose_link(small: Small, batch: int, steps: int, say: Say) -> tuple[int, float]:
    """Bytes per second, and the share of the layers that a decode step runs."""
    say(f"{small.name}, batch {batch}: choosing a link")
    at = SHARE * small.experts
    costs, (free, *_) = calibrate(small.folder, batch, [], steps, at)
    link = bandwidth_for(RATIO, free, costs["on demand"], round(at * free.shape.num_layers))
    return link, free.layers / free.shape.num_layers


def serve(
    settings: Settings,
    small: Small,
    *,
    batch: int,
    units: int,
    link: str,
    predictor: str,
    schedule: Any = "fixed",
    execution: Any = "split",
    tokens: int = 24,
    tries: bool = False,
    timeline: Timeline | None = None,
) -> Row:
    """Answer prompts by units of two batches over a link; tokens per second with the prompts included.

    tries: schedule=auto finds out whether it pays; else it is followed in every step.
    """
    tokens = 8 if settings.quick else tokens
    options: dict[str, Any] = {"store": "ram", "link": link, "cache_size": SHARE * small.experts}
    options |= {"policy": "lru" if predictor == "none" else "plec", "predictor": predictor}
    options |= {"batch": batch, "sequences": 2 * batch * units, "context": _PROMPT_TOKENS + tokens}
    with LLM(small.folder, **options) as llm:
        prompts = texts(llm, 2 * batch * units, _PROMPT_TOKENS, part=1).tolist()
        params = [
            SamplingParams(temperature=0.8, seed=number, max_tokens=tokens, ignore_eos=True)
            for number in range(len(prompts))
        ]
        llm.timeline = timeline
        watch, began = Watch(), time.perf_counter()
        with Engine(llm, execution=execution, schedule=schedule) as engine, torch.no_grad():
            if engine._auto is not None and not tries:
                engine._auto.gate = AlwaysOpen()
            outputs = engine.generate(prompts, params)
            stats = engine.stats.to_dict()
        seconds = time.perf_counter() - began
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        loads = sum(map(sum, llm.stats.loads_LE))
        return {
            "model": small.name,
            "batch": batch,
            "units": units,
            "link": link,
            "schedule": schedule,
            "execution": execution,
            "predictor": _kind(predictor),
            "tokens_per_s": made / seconds,
            "tokens_per_step_s": stats["tokens_per_second"],
            "loads_per_token": loads / made,
            "hit_ratio": round(llm.stats.hit_ratio, 4),
            "engine": stats,
            **watch.so_far().to_dict(),
        }


def quiet(rows: Sequence[Row]) -> str:
    """A sentence on who else had the processors."""
    disturbed = [row for row in rows if row["disturbed"] or row["stolen"] is None]
    limits = (
        f"more than {MOST_STOLEN:.0%} of the processors' time was stolen or {MOST_OTHERS:.0%} went to others"
    )
    if not disturbed:
        return f"No run was disturbed: beside none {limits}."
    worst = max((row["stolen"] or 0.0) + (row["others"] or 0.0) for row in rows)
    return (
        f"**{len(disturbed)} of {len(rows)} runs were disturbed**: beside them {limits}, at worst "
        f"{worst:.0%}. Their times say more of the neighbours than of the program."
    )
