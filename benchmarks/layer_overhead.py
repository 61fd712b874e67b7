"""What one MoE layer costs over its bare matrix products, everything resident.

    python -m benchmarks.layer_overhead [--quick]

Judged is the difference to the bare products, timed in turn, call by call: the same rows with the same views and
nothing else. Beside it, for explanation only, what our function takes when each product is a ready result
(grouping, cache, activation, sum, with warm caches): it is far less, since no product sweeps the caches.
The function is called directly; transformers' dispatch to it is in neither figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import console, other_load, report
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.shapes import QwenShape
from expertflow.models import experts as expert_products
from expertflow.models.products import linear


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, 8 small experts")
    parser.add_argument(
        "--folder", type=Path, default=Path("out"), help="where the checkpoint is written (kept)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    from transformers import AutoModelForCausalLM

    from expertflow.models.attach import ExpertFlowConfig

    shape = QwenShape(layers=1, experts=8 if options.quick else 60, vocabulary=1000)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = write_checkpoint(options.folder / f"qwen-layer-{shape.experts}", shape)
    load = other_load()
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=ExpertFlowConfig(cache_size=shape.experts, context=64)
    )
    experts: Any = model.model.layers[0].mlp.experts
    loaded: Any = model.expertflow
    repetitions = 30 if options.quick else 200
    table = Table(title=f"one MoE layer, {shape.experts} experts of 17.3 MB, top-{shape.top_k}, all resident")
    for column in ("tokens", "experts", "ours", "bare products", "difference", "without products"):
        table.add_column(column, justify="right")
    metrics, targets = {}, {}
    for tokens in (1, 8, 32):
        generator = torch.Generator().manual_seed(tokens)
        hidden = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
        routes = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k).indices
        weights = torch.softmax(torch.randn(tokens, shape.top_k, generator=generator), -1).bfloat16()

        def ours(hidden: Tensor = hidden, routes: Tensor = routes, weights: Tensor = weights) -> None:
            with torch.no_grad():
                expert_products.expertflow_experts(experts, hidden, routes, weights)

        ours()  # loads what is missing
        work = []
        for expert in routes.unique().tolist():
            rows = hidden[(routes == expert).any(-1)]
            for _, views in loaded.cache.open_layer(0, [expert]):
                gate_up, down = views["gate_up_proj"], views["down_proj"][0]
            work.append((rows, gate_up, torch.randn(rows.shape[0], shape.expert_inner).bfloat16(), down))

        def bare(work: list = work) -> None:
            for rows, gate_up, inner, down in work:
                for part in gate_up:
                    linear(rows, part)
                linear(inner, down)

        ours_s, bare_s = in_turn(ours, bare, repetitions)
        with ready_products():
            overhead, _ = in_turn(ours, lambda: None, repetitions)
        metrics[f"tokens_{tokens}"] = {
            "experts": len(work),
            "ours_s": ours_s,
            "bare_s": bare_s,
            "difference_s": ours_s - bare_s,
            "without_products_s": overhead,
        }
        difference = ours_s - bare_s
        targets[f"overhead_s_tokens_{tokens}"] = {
            "asked": 0.3e-3,
            "got": difference,
            "met": difference < 0.3e-3,
        }
        milliseconds = (f"{value * 1e3:.2f} ms" for value in (ours_s, bare_s, ours_s - bare_s, overhead))
        table.add_row(str(tokens), str(len(work)), *milliseconds)
    console.print(table)
    report(
        "layer_overhead",
        {**metrics, "load_before": load},
        {"bare_is_the_bound": True},
        targets,
        0,
        options.json,
    )
    loaded.close()


@contextmanager
def ready_products() -> Iterator[None]:
    """While open, a product of a shape seen before costs a dictionary lookup."""
    real, real_into, ready = expert_products.linear, expert_products.linear_into, {}

    def lookup(rows_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
        key = (rows_ND.shape[0], weight_OD.shape[0])
        if key not in ready:
            ready[key] = real(rows_ND, weight_OD, bias_O)
        return ready[key]

    def leave(out_O: Tensor, row_1D: Tensor, weight_OD: Tensor) -> None:
        pass

    expert_products.linear, expert_products.linear_into = lookup, leave
    try:
        yield
    finally:
        expert_products.linear, expert_products.linear_into = real, real_into


def in_turn(first: Callable[[], None], second: Callable[[], None], repetitions: int) -> tuple[float, float]:
    """Median seconds of each, called alternately so that both see the same machine."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions):
        for function, taken in zip((first, second), seconds, strict=True):
            began = time.perf_counter()
            function()
            taken.append(time.perf_counter() - began)
    return tuple(sorted(taken)[len(taken) // 2] for taken in seconds)  # type: ignore[return-value]


if __name__ == "__main__":
    main()
