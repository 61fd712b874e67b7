"""How many expert activations grouping saves (the paper's Eq. 2) on recorded traces, and how long it takes.

    python -m benchmarks.grouping                                   # committed chat of three models, online table
    python -m benchmarks.grouping TRACES... --predictor DIR...      # held-out sequences, trained predictors too
    python -m benchmarks.grouping TRACES... --mixed                 # all tasks of a model in one queue

Decode steps are formed as `expertflow simulate` forms them: sequences of similar answer length side by side, in
random order of arrival. "Best" is the exact optimum for 2T = 16, else the best of long searches from many starts.
Predictions are causal: of the next token's path, before it runs. Nothing is loaded or multiplied.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import console, other_load, report
from expertflow.core import routes_to_mask
from expertflow.predictor.model import RoutingPathPredictor
from expertflow.predictor.recordings import load_predictors, read_recordings
from expertflow.scheduler.group import group, refine_by_swaps
from expertflow.scheduler.similarity import activated
from expertflow.scheduler.two_means import Grouping, two_means
from expertflow.sim.workload import Foretold, foretell, shape_of
from expertflow.trace import TracedSequence, TraceMeta

ROOT = Path(__file__).parents[1]
COMMITTED = [ROOT / "zoo" / "traces" / name / "chat" for name in ("qwen1.5-moe", "switch-32", "tiny-moe")]
ASKED = {"qwen1.5": 0.12, "switch-32": 0.17}  # activations saved; by a part of the model's name
KEPT = 0.9  # share of it kept with predicted paths
MOST_SECONDS = 0.01
QUEUE, UNIT = 256, 64


class Step(NamedTuple):
    """One decode step of N sequences in order of arrival."""

    paths_NLE: Tensor  # bool
    predicted_NLE: dict[str, Tensor]  # float, by predictor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="*", type=Path, default=COMMITTED)
    parser.add_argument(
        "--predictor", nargs="*", default=[], help="trained ones; then only held-out sequences"
    )
    parser.add_argument("--mixed", action="store_true", help="all recordings given form one queue")
    parser.add_argument("--sequences", type=int, default=320, help="of each recording, at most")
    parser.add_argument("--steps", type=int, default=40, help="of each size, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load, steps = other_load(), 5 if options.quick else options.steps
    metrics: dict[str, Any] = {"load_before": load, "threads": 1}
    bounds: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    for folders in [options.traces] if options.mixed else [[folder] for folder in options.traces]:
        name = "+".join(f"{folder.parent.name}/{folder.name}" for folder in folders)
        meta, foretold = _foretell(folders, options.predictor, options.sequences, options.seed)
        for size, units in ((16, 2), (64, 2), (QUEUE, QUEUE // UNIT)):
            title = (
                f"{name}, 2T = {size}" if units == 2 else f"{name}, a queue of {size} into units of {UNIT}"
            )
            chosen = list(_steps(meta, foretold, size, options.seed))[
                : steps if units == 2 else max(2, steps // 8)
            ]
            if not chosen:
                console.print(f"{title}: too few sequences decode at once")
                continue
            measured = _measure(chosen, units)
            metrics[title] = measured
            bounds[title] = measured["best"]
            _judge(targets, meta.model + name, title, measured)
            console.print(_table(title, measured))
    metrics["large_shape"] = _large_shape(5 if options.quick else 30)
    slowest = max(metrics["large_shape"][kind]["median_s"] for kind in ("uniform", "skewed"))
    targets["seconds_large_shape"] = {"asked": MOST_SECONDS, "got": slowest, "met": slowest < MOST_SECONDS}
    console.print(f"2T = 128, L = 32, E = 128, top-8: {metrics['large_shape']}")
    report("grouping", metrics, bounds, targets, options.seed, options.json)


def _foretell(
    folders: Sequence[Path], trained_folders: Sequence[str], most: int, seed: int
) -> tuple[TraceMeta, dict[str, Foretold]]:
    """What each predictor says; all of the same sequences in the same order."""
    meta, sequences = read_recordings(folders)
    trained: dict[str, RoutingPathPredictor] = {}
    warm: list[TracedSequence] = []
    random.Random(seed).shuffle(sequences)
    if trained_folders:
        trained = load_predictors(trained_folders, meta, folders)
        warm = [s for s in sequences if s.split == "train"][:64]
        sequences = [s for s in sequences if s.split == "test"]
    # Long answers first: short ones give no queue of 256 that is still decoding.
    sequences = sorted(sequences, key=lambda s: s.num_prefill - len(s.target_ids_T))[:most]
    foretold = {"online": foretell(meta, sequences, "online", warm=warm, seed=seed)}
    for name, predictor in trained.items():
        foretold[name] = foretell(meta, sequences, name, predictor, warm, seed)
    return meta, foretold


def _steps(meta: TraceMeta, foretold: dict[str, Foretold], size: int, seed: int) -> Iterator[Step]:
    """Decode steps of `size` sequences, in random order."""
    sequences = next(iter(foretold.values())).sequences
    num_experts = max(shape_of(meta).experts_per_layer)
    lengths = [len(s.target_ids_T) - s.num_prefill for s in sequences]
    draw = random.Random(seed)
    order = sorted(range(len(sequences)), key=lambda n: -lengths[n])
    places: list[tuple[list[int], int]] = []
    for first in range(0, len(order) - size + 1, size):
        members = order[first : first + size]
        places += [(members, t) for t in range(min(lengths[n] for n in members))]
        draw.shuffle(members)  # else the order of arrival would tell the answers' lengths
    draw.shuffle(places)
    for members, t in places:
        routes_NLK = np.stack([sequences[n].target_routes_TLK[sequences[n].num_prefill + t] for n in members])
        paths_NLE = routes_to_mask(torch.from_numpy(routes_NLK.astype(np.int64)), num_experts)
        predicted = {}
        for name, said in foretold.items():
            assert said.p_TLE is not None
            predicted[name] = torch.stack([said.p_TLE[n][t] for n in members]).float()
        yield Step(paths_NLE, predicted)


def _measure(steps: Sequence[Step], num_groups: int) -> dict[str, Any]:
    """Activations in arrival order, the shares of them that each way of grouping saves, and its time."""
    max_swaps = (
        None if num_groups == 2 else 4 * len(steps[0].paths_NLE)
    )  # a queue is grouped once, not every step
    top_k = int(steps[0].paths_NLE[0, 0].sum())
    counts: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}

    def count(way: str, step: Step, decide: Callable[[], Sequence[Sequence[int]]]) -> None:
        began = time.thread_time()
        groups = decide()
        seconds.setdefault(way, []).append(time.thread_time() - began)
        counts.setdefault(way, []).append(activated(step.paths_NLE, groups))

    def ways(paths_NLE: Tensor) -> dict[str, Callable[[], Sequence[Sequence[int]]]]:
        return {
            "two-means": lambda: group(paths_NLE, num_groups, max_swaps=0).groups,
            "and swaps": lambda: group(paths_NLE, num_groups, max_swaps=max_swaps).groups,
        }

    for step in steps:
        size = len(step.paths_NLE)
        count("arrival", step, lambda: np.arange(size).reshape(num_groups, -1).tolist())  # noqa: B023 (called at once)
        for way, decide in ways(step.paths_NLE).items():
            count(f"{way}, true paths", step, decide)
        for name, p_NLE in step.predicted_NLE.items():
            for way, decide in ways(p_NLE).items():
                count(f"{way}, {name}", step, decide)
            count(f"and swaps, {name}, p > .5", step, ways(p_NLE > 0.5)["and swaps"])
            top_NLE = routes_to_mask(p_NLE.topk(top_k, dim=-1).indices, p_NLE.shape[-1])
            count(f"and swaps, {name}, top-{top_k}", step, ways(top_NLE)["and swaps"])
        count("best, true paths", step, lambda: _best(step.paths_NLE, num_groups))  # noqa: B023
    arrival = sum(counts.pop("arrival"))
    saved = {way: round(1 - sum(count) / arrival, 4) for way, count in counts.items()}
    best = saved.pop("best, true paths")
    known = saved["and swaps, true paths"]
    return {
        "steps": len(steps),
        "activated_in_arrival_order": arrival / len(steps),
        "saved": saved,
        "best": best,
        "kept": {way: round(share / known, 3) for way, share in saved.items() if "true" not in way},
        "median_s": {way: sorted(taken)[len(taken) // 2] for way, taken in seconds.items() if way in saved},
    }


def _best(paths_NLE: Tensor, num_groups: int) -> Sequence[Sequence[int]]:
    if num_groups == 2 and len(paths_NLE) <= 16:
        return exact_halves(paths_NLE)
    draw = torch.Generator().manual_seed(0)
    found: list[Sequence[Sequence[int]]] = [group(paths_NLE, num_groups).groups]
    for _ in range(4):
        start = torch.randperm(len(paths_NLE), generator=draw).tensor_split(num_groups)
        found.append([part.tolist() for part in start])
    patience = 2 * len(paths_NLE)
    refined = [refine_by_swaps(paths_NLE, start, 8 * len(paths_NLE), patience) for start in found]
    return min(refined, key=lambda groups: activated(paths_NLE, groups))


def exact_halves(paths_NLE: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The best of all splits of an even number of rows, at most 16, into halves."""
    num_rows = len(paths_NLE)
    bits_NW = np.packbits(paths_NLE.flatten(1).numpy(), axis=1)
    bits_NW = np.pad(bits_NW, ((0, 0), (0, -bits_NW.shape[1] % 8))).view(np.uint64)
    halves = np.arange(1 << num_rows, dtype=np.uint64)
    halves = halves[(np.bitwise_count(halves) == num_rows // 2) & (halves & np.uint64(1) == 1)]
    count = np.zeros(len(halves), dtype=np.int64)
    for word_N in bits_NW.T:
        for part in (halves, ~halves):
            needed = np.zeros(len(halves), dtype=np.uint64)
            for row, word in enumerate(word_N):
                needed |= np.where(part >> np.uint64(row) & np.uint64(1), word, np.uint64(0))
            count += np.bitwise_count(needed)
    best = int(halves[count.argmin()])
    first = tuple(row for row in range(num_rows) if best >> row & 1)
    return first, tuple(row for row in range(num_rows) if not best >> row & 1)


def _judge(targets: dict[str, Any], model: str, title: str, measured: dict[str, Any]) -> None:
    for part, asked in ASKED.items():
        if part in model.lower():
            got = measured["saved"]["and swaps, true paths"]
            targets[f"saved: {title}"] = {"asked": asked, "got": got, "met": got >= asked}
            plain = {
                way: kept for way, kept in measured["kept"].items() if way.count(",") == 1 and "swaps" in way
            }
            way = max(plain, key=lambda way: plain[way])
            targets[f"kept: {title}"] = {
                "asked": KEPT,
                "got": plain[way],
                "by": way,
                "met": plain[way] >= KEPT,
            }


def _table(title: str, measured: dict[str, Any]) -> Table:
    activations = f"{measured['activated_in_arrival_order']:.0f} activations"
    table = Table(title=f"{title}: {measured['steps']} steps, {activations} in arrival order")
    for column in ("grouped by", "fewer activations", "kept", "ms"):
        table.add_column(column, justify="left" if column == "grouped by" else "right")
    for way, saved in measured["saved"].items():
        kept = measured["kept"].get(way)
        share = "" if kept is None else f"{kept:.2f}"
        table.add_row(way, f"{saved:.1%}", share, f"{measured['median_s'][way] * 1e3:.1f}")
    table.add_row("best found (2T = 16: exact)", f"{measured['best']:.1%}", "", "")
    return table


def _large_shape(repetitions: int) -> dict[str, Any]:
    """Processor seconds for 2T = 128, L = 32, E = 128, top-8: routes uniform, and skewed by popularity."""
    draw = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    noise_NLE = torch.rand(128, 32, 128, generator=draw)
    for kind, skew in (("uniform", 0.0), ("skewed", 1.0)):
        scores_NLE = noise_NLE + skew * torch.rand(32, 128, generator=draw)
        known_NLE = routes_to_mask(scores_NLE.topk(8).indices, 128)
        found[kind] = _timed(lambda: group(known_NLE), repetitions)  # noqa: B023
        found[f"{kind}, two-means"] = _timed(lambda: two_means(known_NLE), repetitions)  # noqa: B023
        p_NLE = torch.softmax(6 * scores_NLE, dim=-1).mul(8).clamp(max=0.95)
        found[f"{kind}, probabilities"] = _timed(lambda: group(p_NLE), repetitions)  # noqa: B023
    return found


def _timed(decide: Callable[[], Grouping], repetitions: int) -> dict[str, Any]:
    swaps = decide().swaps
    seconds = []
    for _ in range(repetitions):
        began = time.thread_time()  # of this thread alone: what others do on the machine does not count
        decide()
        seconds.append(time.thread_time() - began)
    return {"median_s": sorted(seconds)[len(seconds) // 2], "least_s": min(seconds), "swaps": swaps}


if __name__ == "__main__":
    main()
