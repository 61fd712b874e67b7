"""Models at their published size, larger than this machine's memory, decoding in the paper's (Fig. 8).

    python -m benchmarks.full_size                                 # all three, those for which the disk has room
    python -m benchmarks.full_size --models qwen1.5-moe --keep     # 28.6 GB of checkpoint, 6.52 GB of memory
    python -m benchmarks.full_size --layers 4 --models deepseek-moe
    python -m benchmarks.full_size --llama-cpp DIR                 # and llama.cpp, built there

Shapes, layers and bytes are the published ones and weights are random; tokens and routes are those of a recording
(zoo/traces) of a small model with the same routers, so that experts are used as a trained model uses them. One
checkpoint is on the disk at a time, and goes after its runs unless --keep. Without room it is skipped, and said so.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table

from benchmarks import rivals
from benchmarks.common import console, drop_from_page_cache, other_load, report, run_worker
from benchmarks.random_checkpoint import NoRoom, write_checkpoint
from benchmarks.replayed_decode import ask_no_routers, decode, held_out
from benchmarks.rivals import llama_cpp, ours
from benchmarks.shapes import PUBLISHED, Published, checkpoint_bytes, with_layers

MODULE = "benchmarks.full_size"
TRACES = Path(__file__).parents[1] / "zoo" / "traces"
SYSTEMS = ("ours", "online", "on-demand", rivals.ACCELERATE, rivals.LLAMA_CPP, "resident")
SPARE_DISK = 4_000_000_000  # stays free beside a checkpoint


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--folder", type=Path, default=Path("out"), help="where checkpoints are written")
    parser.add_argument(
        "--keep", action="store_true", help="leave the checkpoint there; a later run reuses it"
    )
    parser.add_argument(
        "--layers", type=int, default=None, help="fewer than published, where the disk is small"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=None, help="of the Switch shape")
    parser.add_argument("--memory", type=int, default=None, help="bytes; default: the paper's of Fig. 8")
    parser.add_argument(
        "--task", choices=["chat", "math", "translation"], default="chat", help="whose routes"
    )
    parser.add_argument("--tokens", type=int, default=24, help="decode steps measured per run")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="systems to run")
    parser.add_argument(
        "--llama-cpp", type=Path, default=None, help="a source tree of llama.cpp with a build in it"
    )
    parser.add_argument("--quick", action="store_true", help="four layers, eight steps")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", choices=SYSTEMS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(work(options)))
        return
    if options.quick:
        options.layers, options.tokens = options.layers or 4, min(options.tokens, 8)
    load, runs, skipped = other_load(), [], {}
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        try:
            runs += run_model(name, options)
        except NoRoom as why:
            skipped[name] = str(why)
            console.print(f"{name}: skipped: {why}", soft_wrap=True)
    console.print(_table(runs))
    for run in runs:
        if reason := run.get("not_run") or run.get("error"):
            console.print(
                f"{run['model']}, {run['system']}: not run: {reason}", soft_wrap=True, highlight=False
            )
    metrics = {"runs": runs, "skipped": skipped, "load_before": load}
    bounds = {name: PUBLISHED[name].limit_bytes for name in options.models}
    report("full_size", metrics, {"paper_bytes": bounds}, judge(runs), 0, options.json)


def run_model(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every system on one model. Raises NoRoom, and then nothing was written."""
    model = PUBLISHED[name]
    shape = shape_of(model, options)
    folder = (
        options.folder / f"{name}-{shape.layers}"
        if shape.dtype == "bfloat16"
        else (options.folder / f"{name}-{shape.layers}-{shape.dtype}")
    )
    memory = options.memory or memory_for(model, options)
    console.print(
        f"{name}: {shape.layers} layers, {checkpoint_bytes(shape) / 1e9:.1f} GB, in {memory / 1e9:.2f} GB"
    )
    write_checkpoint(folder, shape, spare_bytes=SPARE_DISK)
    label = {
        "model": name, "layers": shape.layers, "published_layers": model.shape.layers,
        "checkpoint_bytes": checkpoint_bytes(shape), "weights": f"random, {shape.dtype}",
        "routes": f"replayed from zoo/traces/{model.trace}/{options.task}",
    }  # fmt: skip
    found = []
    try:
        for batch in options.batches:
            for system in options.only:
                drop_from_page_cache(folder)
                result = run_system(system, name, folder, memory, batch, options)
                if not options.keep:  # every weight once more, which the next system may need the room of
                    shutil.rmtree(folder / rivals.OFFLOADED, ignore_errors=True)
                found.append({**label, "system": system, "batch": batch, **result})
                console.print(
                    f"  {system}, batch {batch}: {json.dumps(result)}", soft_wrap=True, highlight=False
                )
    finally:
        if not options.keep:
            shutil.rmtree(folder)
            rivals.gguf_of(folder).unlink(missing_ok=True)
    return found


def run_system(
    system: str, name: str, folder: Path, memory: int, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    why = rivals.missing(system, folder, psutil.virtual_memory().total, options.llama_cpp, memory)
    if (
        system == rivals.LLAMA_CPP
        and why is None
        and PUBLISHED[name].shape.config()["model_type"] != "qwen2_moe"
    ):
        why = (
            "llama.cpp cannot be told what to route; its random routers are compared on the Qwen shape alone"
        )
    if why is not None:
        return {"not_run": why}
    if system == rivals.LLAMA_CPP:
        if batch > 1:
            return {"not_run": "llama-bench decodes one sequence"}
        return llama_cpp.converted_and_decoded(
            options.llama_cpp, folder, memory, options.tokens, options.threads
        )
    arguments = ["--worker", system, "--models", name, "--folder", str(folder), "--batch", str(batch)]
    arguments += ["--tokens", str(options.tokens), "--threads", str(options.threads), "--task", options.task]
    arguments += ["--memory", str(memory)]
    return run_worker(MODULE, arguments, None if system == "resident" else memory, options.threads)


def shape_of(model: Published, options: argparse.Namespace) -> Any:
    shape: Any = model.shape
    if options.dtype and model.trace.startswith("switch"):
        shape = replace(shape, dtype=options.dtype)
    return with_layers(shape, options.layers) if options.layers else shape


def memory_for(model: Published, options: argparse.Namespace) -> int:
    """The paper's, for the whole model; of fewer layers a share of it, and what a process takes by itself."""
    share = shape_of(model, options).layers / model.shape.layers
    wide = 2 if options.dtype == "float32" and model.trace.startswith("switch") else 1
    return int(model.limit_bytes * share * wide + (1 - share) * 1_200_000_000)


def work(options: argparse.Namespace) -> dict[str, Any]:
    """One system in this process: load, then decode the recording's sequences one group after the other."""
    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    (name,) = options.models
    model, ran = rivals.load(options.worker, options.folder, rivals.Limits(options.memory, options.batch))
    load_s = time.perf_counter() - began
    experts: Any = getattr(model, "expertflow", None)
    if experts is not None and experts.predicting is not None:
        ask_no_routers(experts)
    if experts is not None and options.worker == "resident":
        experts.cache.prefetch(experts.cache.store.experts)
        experts.cache.wait_idle()
    steps = decode(
        model, held_out(model, TRACES / PUBLISHED[name].trace / options.task), options.batch, options.tokens
    )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "ran": ran.to_dict(),
        "load_s": load_s,
        "major_faults": usage.ru_majflt,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        **steps,
    }
    if experts is None:
        return result
    stats, plan = experts.cache.stats, experts.plan
    result |= {
        "slots": stats.num_slots,
        "experts": stats.shape.num_experts,
        "io_mode": stats.io_mode,
        "plan": {
            "process_bytes": plan.process_bytes,
            "dense_bytes": plan.model.dense_bytes,
            "kv_bytes": plan.kv_bytes,
            "scratch_bytes": plan.scratch_bytes,
            "predictor_bytes": plan.predictor_bytes,
            "slots_bytes": plan.slots_bytes,
        },
    }
    if experts.predicting is not None:
        result["prediction"] = experts.predicting.stats.to_dict()
    if options.worker != "resident":
        result |= ours.loading_rounds(experts.cache, sorted(options.folder.glob("*.safetensors")))
        if nbytes := result["bytes_per_step"]:
            result["bound_tokens_per_s"] = options.batch * result["raw_read_bytes_per_s"] / nbytes
    experts.close()
    return result


def judge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether each published model ran, whole, in the paper's memory; and our speed over the rivals' that ran."""
    targets: dict[str, Any] = {}
    for run in runs:
        if run["system"] != "ours" or "error" in run or "not_run" in run:
            continue
        key = f"{run['model']}, batch {run['batch']}"
        limit = PUBLISHED[run["model"]].limit_bytes
        if run["layers"] == run["published_layers"] and run["peak_bytes"] is not None:
            targets[f"peak bytes, {key}"] = {
                "asked": limit, "got": run["peak_bytes"], "met": run["peak_bytes"] <= limit,
            }  # fmt: skip
        for other in runs:
            same = (other["model"], other["batch"]) == (run["model"], run["batch"])
            if same and other["system"] in (rivals.ACCELERATE, rivals.LLAMA_CPP) and "tokens_per_s" in other:
                ratio = run["tokens_per_s"] / other["tokens_per_s"]
                targets[f"over {other['system']}, {key}"] = {"asked": 7.0, "got": ratio, "met": ratio >= 7}
    return targets


def _table(runs: list[dict[str, Any]]) -> Table:
    table = Table(title="Published shapes, random weights, replayed routes")
    headers = (
        "model",
        "layers",
        "system",
        "batch",
        "limit",
        "peak",
        "tok/s",
        "hits",
        "read/step",
        "bound",
        "faults",
    )
    for header in headers:
        table.add_column(header, justify="right")
    for run in runs:
        if "not_run" in run or "error" in run:
            continue
        first = (
            run["model"],
            f"{run['layers']} of {run['published_layers']}",
            run["system"],
            str(run["batch"]),
        )
        table.add_row(
            *first,
            f"{run['limit_bytes'] / 1e9:.2f} GB" if run["limit_bytes"] else "none",
            f"{run['peak_bytes'] / 1e9:.2f} GB" if run["peak_bytes"] else "",
            f"{run['tokens_per_s']:.2f}",
            f"{run['hit_ratio']:.2f}" if "hit_ratio" in run else "",
            f"{run['bytes_per_step'] / 1e9:.2f} GB" if "bytes_per_step" in run else "",
            f"{run['bound_tokens_per_s']:.2f}" if "bound_tokens_per_s" in run else "",
            str(run.get("major_faults", "")),
        )
    return table


if __name__ == "__main__":
    main()
