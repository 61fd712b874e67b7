"""How long predictors take: one decode step of many sequences, and their bytes.

    python -m benchmarks.predictor_step          # 64 sequences, L = 32, E = 128, vocabulary 152k: seconds

Weights are random: time depends on shapes. The bound is the arithmetic of the matrix products alone, the same
shapes in the same process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from benchmarks.common import console, other_load, report
from expertflow.predictor.model import PredictedModel, RoutingPathPredictor
from expertflow.predictor.online_table import OnlineTokenTable
from expertflow.predictor.protocol import PathContext
from expertflow.predictor.sizes import ARCHS, sizes_of

STEP_SECONDS = 5e-3
PAPER_BYTES = 7.21e6  # the paper's model, for the T5 vocabulary of 32k
OURS_BYTES = 64e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    load, repetitions = other_load(), 20 if options.quick else 200
    metrics: dict[str, Any] = {"load_before": load, "threads": options.threads}
    targets: dict[str, Any] = {}
    table = Table(title=f"{options.sequences} sequences, L = {options.layers}, E = {options.experts}")
    for column in ("predictor", "step", "bare products", "next use", "bytes, 32k", "bytes, 152k"):
        table.add_column(column, justify="right")
    for arch in ARCHS:
        small, large = (_predictor(arch, vocabulary, options) for vocabulary in (32_128, 152_000))
        step_s, bare_s, next_use_s = _time(large, options.sequences, repetitions)
        sizes = [predictor.num_bytes() for predictor in (small, large)]
        metrics[arch] = {
            "step_s": step_s,
            "bare_products_s": bare_s,
            "next_use_s": next_use_s,
            "bytes_32k": sizes[0],
            "bytes_152k": sizes[1],
        }
        targets[f"step_s_{arch}"] = {"asked": STEP_SECONDS, "got": step_s, "met": step_s < STEP_SECONDS}
        shown = "-" if next_use_s is None else f"{next_use_s * 1e3:.2f} ms"
        megabytes = [f"{size / 1e6:.2f} MB" for size in sizes]
        table.add_row(arch, f"{step_s * 1e3:.2f} ms", f"{bare_s * 1e3:.2f} ms", shown, *megabytes)
    online_s, online_bytes = _time_online(options, repetitions)
    metrics["online_table"] = {"step_s": online_s, "bytes": online_bytes}
    table.add_row(
        "online table, predict and learn",
        f"{online_s * 1e3:.2f} ms",
        "",
        "",
        "",
        f"{online_bytes / 1e6:.1f} MB",
    )
    paper, ours = metrics["paper"]["bytes_32k"], metrics["causal"]["bytes_152k"]
    targets["bytes_paper_32k"] = {"asked": PAPER_BYTES, "got": paper, "met": paper <= PAPER_BYTES}
    targets["bytes_causal_152k"] = {"asked": OURS_BYTES, "got": ours, "met": ours <= OURS_BYTES}
    console.print(table)
    report("predictor_step", metrics, {"bare_products": "in the metrics"}, targets, 0, options.json)


def _predictor(arch: str, vocabulary: int, options: argparse.Namespace) -> RoutingPathPredictor:
    model = PredictedModel("0" * 16, "shapes only", (options.experts,) * options.layers, 0, 8, vocabulary)
    predictor = RoutingPathPredictor(sizes_of(arch), model).eval()
    if arch == "causal":  # the paper's stays in float32, as 7.21 MB has it
        predictor.compact()
    return predictor.requires_grad_(False)


@torch.inference_mode()
def _time(
    predictor: RoutingPathPredictor, sequences: int, repetitions: int
) -> tuple[float, float, float | None]:
    """Seconds of one step after a prompt of 128 tokens, of its products alone, and of ranking next uses."""
    vocabulary = predictor.model.vocab_size
    prompt = torch.randint(vocabulary, (sequences, 128))
    known = prompt if predictor.encoder is not None else None
    mask = None if known is not None else torch.ones(sequences, 0, dtype=torch.bool)
    state = predictor.start(known, mask)
    predictor.advance(state, prompt)
    new_B1 = torch.randint(vocabulary, (sequences, 1))
    _, states_B1D = predictor.advance(state, new_B1)
    step_s = _median(lambda: predictor.advance(state, new_B1), repetitions)
    linears = [
        m
        for part in (predictor.decoder, predictor.target_heads)
        for m in part.modules()
        if isinstance(m, nn.Linear)
    ]
    rows = [torch.randn(sequences, linear.in_features) for linear in linears]

    def products() -> None:
        for linear, x in zip(linears, rows, strict=True):
            linear(x)

    next_use_s = None
    if predictor.next_use_head is not None:
        next_use_s = _median(lambda: predictor.next_use(states_B1D[:, -1]), repetitions)
    return step_s, _median(products, repetitions), next_use_s


@torch.inference_mode()
def _time_online(options: argparse.Namespace, repetitions: int) -> tuple[float, int]:
    """Seconds to predict a step and to learn from its routes, once the table has seen a prompt each."""
    table = OnlineTokenTable(options.layers, options.experts, 8)
    ids_BT = torch.randint(5000, (options.sequences, 65))
    routes = torch.rand(options.sequences, 65, options.layers, options.experts).topk(8).indices.int()
    prompt = PathContext(target_BT=ids_BT[:, :64], num_new=64)
    table.observe_pass(prompt, routes[:, :64])
    step = PathContext(target_BT=ids_BT, num_new=1, routes_BTLK=routes)

    def one() -> None:
        table.predict(step)
        table.observe_pass(step, routes[:, 64:])

    return _median(one, max(5, repetitions // 10)), table.nbytes


def _median(call: Callable[[], Any], repetitions: int) -> float:
    call()
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]


if __name__ == "__main__":
    main()
