"""Decode speed of a checkpoint three times larger than its memory, ours and accelerate's, in one run.

    python -m benchmarks.decode_under_budget            # 9.4 GB checkpoint, 3.1 GB of memory
    python -m benchmarks.decode_under_budget --quick    # two layers, a minute
    python -m benchmarks.decode_under_budget --llama-cpp DIR    # and llama.cpp, built there

Also: everything resident against transformers' own experts implementations, and time to first token.
Each system runs alone in a fresh process, in a memory cgroup where one can be made, page cache cold.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks import rivals
from benchmarks.common import (
    console,
    drop_from_page_cache,
    measure_fresh_memory,
    other_load,
    report,
    run_worker,
)
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.rivals import llama_cpp
from benchmarks.rivals.ours import loading_rounds
from benchmarks.shapes import QwenShape
from expertflow.kv_name import KV_CACHE, kv_cache_of

MODULE = "benchmarks.decode_under_budget"
PROMPT_TOKENS = 16
SYSTEMS = ("ours", "on-demand", "online", "accelerate", "llama.cpp", "resident")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two layers and few tokens")
    parser.add_argument(
        "--folder", type=Path, default=Path("out"), help="where the checkpoint is written (kept)"
    )
    parser.add_argument("--layers", type=int, default=None, help="8 by default, as in the target")
    parser.add_argument("--tokens", type=int, default=None, help="decode steps measured per run (24)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=None, help=f"systems to run: {' '.join(SYSTEMS)}")
    parser.add_argument(
        "--llama-cpp", type=Path, default=None, help="a source tree of llama.cpp with a build in it"
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--text", choices=["greedy", "random"], default="greedy", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(work(options)))
        return
    shape = QwenShape(layers=options.layers or (2 if options.quick else 8))
    tokens = options.tokens or (8 if options.quick else 24)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = write_checkpoint(options.folder / f"qwen-shape-{shape.layers}", shape)
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # Two layers are so small that a third of them would not hold the interpreter.
    budget = nbytes // 3 if not options.quick else nbytes // 3 + 10**9
    systems = options.only or [name for name in SYSTEMS if name != "llama.cpp" or options.llama_cpp]
    if "llama.cpp" in systems and options.llama_cpp is None:
        raise SystemExit("llama.cpp is to run: say with --llama-cpp where its source tree with a build is")
    runs: list[dict[str, Any]] = []

    def run(
        worker: str, batch: int, memory: int | None, text: str = "greedy", steps: int = tokens
    ) -> dict[str, Any]:
        drop_from_page_cache(folder)
        arguments = ["--worker", worker, "--batch", str(batch), "--tokens", str(steps), "--text", text]
        arguments += [
            "--folder",
            str(folder),
            "--memory",
            str(memory or 0),
            "--threads",
            str(options.threads),
        ]
        console.print(f"running {worker}, batch {batch}, {text} ...")
        result = run_worker(MODULE, arguments, memory, options.threads)
        # A run takes minutes: nothing is lost if a later one is stopped.
        console.print(f"  {json.dumps(result)}", soft_wrap=True)
        runs.append({"worker": worker, "batch": batch, "text": text, **result})
        return result

    load = other_load()
    fresh = measure_fresh_memory()
    for batch in options.batches:
        if "ours" in systems:
            run("ours", batch, budget)
            run("ours", batch, budget, "random")
        for worker in ("on-demand", "online"):
            if worker in systems:
                run(worker, batch, budget, "random")
        if "llama.cpp" in systems and batch == 1:
            console.print("running llama.cpp, batch 1, random ...")
            result = llama_cpp.converted_and_decoded(
                options.llama_cpp, folder, budget, tokens, options.threads
            )
            console.print(f"  {json.dumps(result)}", soft_wrap=True)
            runs.append({"worker": "llama.cpp", "batch": 1, "text": "random", **result})
        if "accelerate" in systems:
            run("accelerate", batch, budget, steps=max(4, tokens // 4))
    if "resident" in systems:
        for batch in options.batches:
            for worker in ("ours", "grouped_mm", "eager"):
                # Greedy text goes its own way after the first tie of bfloat16, to other numbers of experts.
                run(worker, batch, None, "random")

    table = Table(title=f"Qwen1.5-MoE shape, {shape.layers} layers, {nbytes / 1e9:.1f} GB, random weights")
    for column in (
        "system",
        "batch",
        "text",
        "memory",
        "peak",
        "tok/s",
        "hit ratio",
        "read",
        "bound tok/s",
        "TTFT",
    ):
        table.add_column(column, justify="right")
    for entry in runs:
        if "error" in entry:
            table.add_row(entry["worker"], str(entry["batch"]), entry["text"], "", "", entry["error"][:60])
            continue
        limit, peak = entry["limit_bytes"], entry["peak_bytes"]
        table.add_row(
            entry["worker"],
            str(entry["batch"]),
            entry["text"],
            f"{limit / 1e9:.2f} GB" if limit else "all",
            f"{peak / 1e9:.2f} GB" if peak else "",
            f"{entry['tokens_per_s']:.2f}",
            f"{entry['hit_ratio']:.2f}" if "hit_ratio" in entry else "",
            f"{entry['read_bytes_per_s'] / 1e9:.2f} GB/s" if entry.get("read_bytes_per_s") else "",
            f"{entry['bound_tokens_per_s']:.2f}" if entry.get("bound_tokens_per_s") else "",
            f"{entry['first_token_s']:.1f} s",
        )
    console.print(table)
    report(
        "decode_under_budget",
        {"runs": runs, "load_before": load},
        *judge(runs, nbytes, fresh),
        0,
        options.json,
    )


def judge(runs: list[dict[str, Any]], nbytes: int, fresh: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bounds and targets, for the runs that were made. fresh: bytes per second of memory that nobody had before."""

    def find(worker: str, batch: int, limited: bool, text: str = "greedy") -> dict[str, Any] | None:
        return next(
            (
                run
                for run in runs
                if run["worker"] == worker
                and run["batch"] == batch
                and run["text"] == text
                and "error" not in run
                and bool(run["limit_bytes"]) == limited
            ),
            None,
        )

    targets: dict[str, Any] = {}
    bounds: dict[str, Any] = {"checkpoint_bytes": nbytes, "fresh_memory_bytes_per_s": fresh}
    ours, accelerate = find("ours", 1, True), find("accelerate", 1, True)
    if ours:
        bounds["raw_read_bytes_per_s"] = ours["raw_read_bytes_per_s"]
        ratio = ours["loading_over_raw"]
        targets["loading_over_raw_bandwidth"] = {"asked": 0.9, "got": ratio, "met": ratio >= 0.9}
        allowed = ours["first_token_bytes"] / ours["raw_read_bytes_per_s"] + 5
        bounds["first_token_fresh_memory_s"] = ours["first_token_fresh_bytes"] / fresh
        got = ours["first_token_s"]
        targets["first_token_s"] = {"asked": allowed, "got": got, "met": got <= allowed}
    if ours and accelerate:
        ratio = ours["tokens_per_s"] / accelerate["tokens_per_s"]
        targets["over_accelerate_batch_1"] = {"asked": 7.0, "got": ratio, "met": ratio >= 7}
    # Who has nothing to read is the bound of whoever reads.
    resident = find("ours", 1, False, "random")
    for name, text in (("accelerate", "greedy"), ("llama.cpp", "random"), ("on-demand", "random")):
        other = find(name, 1, True, text)
        if resident and other:
            bounds[f"over_{name}_batch_1"] = resident["tokens_per_s"] / other["tokens_per_s"]
    random = find("ours", 1, True, "random")
    for rival, asked in (("llama.cpp", 7.0), ("on-demand", 1.5)):
        other = find(rival, 1, True, "random")
        if random and other:
            ratio = random["tokens_per_s"] / other["tokens_per_s"]
            targets[f"over_{rival}_batch_1"] = {"asked": asked, "got": ratio, "met": ratio >= asked}
    for online in (run for run in runs if run["worker"] == "online" and "error" not in run):
        share = online["predict_s_per_step"] / online["step_s_median"]
        targets[f"prediction_share_batch_{online['batch']}"] = {
            "asked": 0.03,
            "got": share,
            "met": share < 0.03,
        }
    for batch in sorted({run["batch"] for run in runs}):
        resident = find("ours", batch, False, "random")
        rivals = [find(name, batch, False, "random") for name in ("grouped_mm", "eager")]
        best = max((rival["tokens_per_s"] for rival in rivals if rival), default=None)
        if resident and best:
            ratio = resident["tokens_per_s"] / best
            targets[f"resident_over_transformers_batch_{batch}"] = {
                "asked": 0.95,
                "got": ratio,
                "met": ratio >= 0.95,
            }
    return bounds, targets


def work(options: argparse.Namespace) -> dict[str, Any]:
    """One system in this process: load, prompt of 16 tokens, warm up, decode."""
    started = time.perf_counter()
    folder: Path = options.folder
    torch.set_num_threads(options.threads)
    warm_up = 4 if options.memory else 40
    context = max(256, PROMPT_TOKENS + warm_up + options.tokens)
    limits = rivals.Limits(options.memory or None, options.batch, context)
    model, ran = rivals.load(options.worker, folder, limits)
    loaded = time.perf_counter()

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (options.batch, PROMPT_TOKENS), generator=generator)
    cache = None
    seconds: list[float] = []
    first_token = 0.0
    first_token_bytes = first_token_fresh_bytes = 0
    experts: Any = getattr(model, "expertflow", None)
    with torch.no_grad():
        for step in range(1 + warm_up + options.tokens):
            if experts and step == 1 + warm_up:
                experts.cache.reset_stats()
                if experts.predicting is not None:
                    experts.predicting.reset_stats()
            began = time.perf_counter()
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{KV_CACHE: cache})
            cache = kv_cache_of(out)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            if options.text == "random":
                ids = torch.randint(0, model.config.vocab_size, ids.shape, generator=generator)
            if step == 0:
                first_token = time.perf_counter() - started
                if experts:
                    read, dense = experts.cache.stats.bytes_read, experts.plan.model.dense_bytes
                    first_token_bytes = read + dense
                    first_token_fresh_bytes = min(read, experts.plan.slots_bytes) + dense
                    if not options.memory:  # "everything resident" is measured when everything is
                        experts.cache.prefetch(experts.cache.store.experts)
                        experts.cache.wait_idle()
            elif step > warm_up:
                seconds.append(time.perf_counter() - began)
    step_s = sorted(seconds)[len(seconds) // 2]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "tokens_per_s": options.batch / step_s,
        "step_s_median": step_s,
        "step_s_all": [round(value, 4) for value in seconds],
        "ran": ran.to_dict(),
        "load_s": loaded - started,
        "first_token_s": first_token,
        "major_faults": usage.ru_majflt,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }
    if experts:
        stats = copy.deepcopy(experts.cache.stats)
        reading = (
            loading_rounds(experts.cache, sorted(folder.glob("*.safetensors"))) if options.memory else {}
        )
        bytes_per_step = stats.bytes_read / options.tokens
        result.update(
            hit_ratio=stats.hit_ratio,
            slots=stats.num_slots,
            bytes_per_step=bytes_per_step,
            read_bytes_per_s=stats.bytes_read / stats.read_seconds if stats.read_seconds else 0,
            **reading,
            stall_s_per_step=stats.stall_seconds / options.tokens,
            open_s_per_step=sum(layer.open_seconds for layer in stats.layers) / options.tokens,
            bound_tokens_per_s=(
                options.batch * reading["raw_read_bytes_per_s"] / bytes_per_step
                if reading and bytes_per_step
                else 0
            ),
            first_token_bytes=first_token_bytes,
            first_token_fresh_bytes=first_token_fresh_bytes,
            io_mode=stats.io_mode,
        )
        if experts.predicting is not None:
            prediction = experts.predicting.stats
            result["predict_s_per_step"] = prediction.predict_seconds / options.tokens
            result["look_ahead_s_per_step"] = prediction.look_ahead_seconds / options.tokens
            result["prediction"] = prediction.to_dict()
        experts.close()
    return result


if __name__ == "__main__":
    main()
