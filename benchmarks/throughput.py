"""Tokens per second of many prompts: one by one, and together by continuous batching, in the same memory.

    python -m benchmarks.throughput --batch 64               # the embedded model, 256 prompts
    python -m benchmarks.throughput --qwen-shape --batch 64  # 9.4 GB of random weights in 3 GiB (half an hour)
    python -m benchmarks.throughput --model DIR --memory 3GiB --prompts 32 --max-tokens 16
    python -m benchmarks.throughput --link 50MB/s            # experts in RAM behind a link of that bandwidth
    python -m benchmarks.throughput --qwen-shape --schedule auto --predictor online --units 2 --only split joint
    python -m benchmarks.throughput --quick

`one by one` answers as many of the prompts as fit into the same seconds, one after the other. `split` runs the two
batches of a unit one after the other, `joint` side by side, so that an expert is loaded once for both. Every system
runs alone in a fresh process, and the text is real. The batches come first: the same seconds are then given to one
by one. `--qwen-shape` reads it by the embedded model's tokenizer; its routes are those of random weights, which use few
experts and so are kind to one by one. With a predictor it is also said what share of the steps prediction and grouping
take: all of it, what of it is not look-ahead (`paths`), and what other units hide.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from benchmarks.common import console, report, run_worker
from benchmarks.on_the_clock import TEXTS, TINY
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.shapes import QwenShape
from expertflow.disturbance import Watch

if TYPE_CHECKING:
    from expertflow.engine.engine_stats import EngineStats

MODULE = "benchmarks.throughput"
SYSTEMS = ("one by one", "split", "joint")
ASKED_OVER_ONE = 5.0
PROMPT_TOKENS = 48  # at most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument(
        "--qwen-shape", action="store_true", help="the 8-layer Qwen1.5-MoE shape instead, in 3GiB"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("out"), help="where that checkpoint is written (kept)"
    )
    parser.add_argument(
        "--memory", default=None, help="for each; default: what the batches need with 8 experts per layer"
    )
    parser.add_argument(
        "--link", default=None, help="experts in RAM, behind a link of this bandwidth, e.g. 50MB/s"
    )
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a batch; a unit has two")
    parser.add_argument("--units", type=int, default=1, help="units that take turns")
    parser.add_argument("--schedule", choices=("fixed", "auto"), default="fixed", help="of split and joint")
    parser.add_argument("--predictor", default="none", help="none, online or a folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--quick", action="store_true", help="24 prompts in batches of 4")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", choices=SYSTEMS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options)))
        return
    if options.quick:
        options.prompts, options.batch = min(options.prompts, 24), min(options.batch, 4)
    if options.qwen_shape:
        options.model, options.memory = _qwen_shape(options.folder), options.memory or "3GiB"
    memory = options.memory or _memory_for_batches(options)
    runs: dict[str, dict[str, Any]] = {}
    for system in sorted(
        options.only, key=SYSTEMS.index, reverse=True
    ):  # the batches first: they say how long
        seconds = max((run["seconds"] for run in runs.values() if "error" not in run), default=60.0)
        console.print(f"running {system} in {memory} ...")
        arguments = ["--worker", system, "--model", str(options.model), "--memory", str(memory)]
        arguments += ["--prompts", str(options.prompts), "--max-tokens", str(options.max_tokens)]
        arguments += [
            "--batch",
            str(options.batch),
            "--predictor",
            options.predictor,
            "--seconds",
            str(seconds),
        ]
        arguments += ["--units", str(options.units), "--schedule", options.schedule]
        arguments += ["--threads", str(options.threads), *(["--link", options.link] if options.link else [])]
        runs[system] = run_worker(MODULE, arguments, None, options.threads)
        console.print(f"  {json.dumps(runs[system])}", soft_wrap=True)
    console.print(_table(options, runs))
    report(
        "throughput",
        {"runs": runs, "memory": memory, "model": options.model.name},
        {},
        judge(runs),
        0,
        options.json,
    )


def judge(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = {name: run["tokens_per_s"] for name, run in runs.items() if "error" not in run}
    targets: dict[str, Any] = {}
    if {"joint", "one by one"} <= found.keys():
        ratio = found["joint"] / found["one by one"]
        targets["joint_over_one_by_one"] = {
            "asked": ASKED_OVER_ONE,
            "got": ratio,
            "met": ratio >= ASKED_OVER_ONE,
        }
    if {"joint", "split"} <= found.keys():
        ratio = found["joint"] / found["split"]
        targets["joint_over_split"] = {"asked": 1.0, "got": ratio, "met": ratio >= 1.0}
    return targets


def work(options: argparse.Namespace) -> dict[str, Any]:
    """One system in this process."""
    from expertflow import LLM, SamplingParams
    from expertflow.engine.engine import Engine

    torch.set_num_threads(options.threads)
    alone = options.worker == "one by one"
    settings: dict[str, Any] = {
        "memory": int(options.memory) if options.memory.isdigit() else options.memory,
        "context": PROMPT_TOKENS + options.max_tokens,
        "batch": 1 if alone else options.batch,
        "sequences": 1 if alone else 2 * options.batch * options.units,
        "predictor": options.predictor,
    }
    if options.link:
        settings |= {"store": "ram", "link": options.link}
    with LLM(options.model, **settings) as llm:
        prompts = prompts_for(llm, options.prompts)
        params = [
            SamplingParams(temperature=0.8, seed=number, max_tokens=options.max_tokens, ignore_eos=True)
            for number in range(len(prompts))
        ]
        llm.generate([prompts[0]], params[0])  # warm
        llm.reset_stats()
        watch, tokens, answered, engine_stats = Watch(), 0, 0, None
        began = time.perf_counter()
        if alone:
            for prompt, wanted in zip(prompts, params, strict=True):
                tokens += len(llm.generate([prompt], wanted)[0].outputs[0].token_ids)
                answered += 1
                if time.perf_counter() - began > options.seconds:
                    break
        else:
            with Engine(llm, execution=options.worker, schedule=options.schedule) as engine:
                outputs = engine.generate(prompts, params)
                engine_stats = engine.stats
            tokens, answered = sum(len(output.outputs[0].token_ids) for output in outputs), len(outputs)
        seconds = time.perf_counter() - began
        stats = llm.stats
        return {
            "tokens_per_s": tokens / seconds,
            "tokens": tokens,
            "answered": answered,
            "seconds": seconds,
            "slots": stats.num_slots,
            "experts": stats.shape.num_experts,
            "hit_ratio": stats.hit_ratio,
            "bytes_per_token": stats.bytes_read / tokens,
            "loads_per_token": sum(map(sum, stats.loads_LE)) / tokens,
            "stall_s": stats.stall_seconds,
            **watch.so_far().to_dict(),
            **(_shares(engine_stats) if engine_stats else {}),
        }


def _shares(stats: EngineStats) -> dict[str, float]:
    """Of the time of steps: prediction and grouping on the critical path, and hidden behind other units."""
    hidden = stats.hidden_predict_seconds + stats.hidden_group_seconds
    return {
        "steps": stats.steps,
        "scheduling_share": stats.scheduling_share,
        "paths_share": stats.paths_share,
        "hidden_share": hidden / stats.step_seconds if stats.step_seconds else 0.0,
        "group_share": (stats.group_seconds + stats.hidden_group_seconds) / max(stats.step_seconds, 1e-9),
        "groupings": stats.groupings,
        "regroupings": stats.regroupings + stats.exchanges,
        "late": stats.late,
    }


def prompts_for(llm: Any, count: int) -> list[list[int]]:
    """Real conversations, cut."""
    with lzma.open(TEXTS, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["prompt"] for _, line in zip(range(count), lines, strict=False)]
    return [list(llm.tokenizer(text).input_ids)[:PROMPT_TOKENS] for text in texts]


def _qwen_shape(folder: Path) -> Path:
    """The checkpoint of benchmarks.decode_under_budget, with a tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = write_checkpoint(folder / "qwen-shape-8", QwenShape(layers=8))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, checkpoint / name)
    return checkpoint


def _memory_for_batches(options: argparse.Namespace) -> str:
    """Bytes that two batches need with 8 experts per layer. A fresh process has less around it than this one."""
    from expertflow import LLM

    settings: dict[str, Any] = {"batch": options.batch, "sequences": 2 * options.batch * options.units}
    settings |= {"context": PROMPT_TOKENS + options.max_tokens, "predictor": options.predictor}
    with LLM(options.model, cache_size=8, **settings) as llm:
        return str(llm.experts.plan.total_bytes)


def _table(options: argparse.Namespace, runs: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=f"{options.model.name}, {options.prompts} prompts, {options.max_tokens} tokens each")
    for column in (
        "system",
        "tokens/s",
        "to one by one",
        "slots",
        "hits",
        "loads per token",
        "stalled",
        "stolen",
        "others",
        "paths / all of scheduling",
    ):
        table.add_column(column, justify="right")
    one = runs.get("one by one", {}).get("tokens_per_s")
    for name, run in runs.items():
        if "error" in run:
            table.add_row(name, run["error"][:60])
            continue
        ratio = f"{run['tokens_per_s'] / one:.2f}" if one else ""
        table.add_row(
            name, f"{run['tokens_per_s']:.1f}", ratio, f"{run['slots']} of {run['experts']}", f"{run['hit_ratio']:.2f}",
            f"{run['loads_per_token']:.1f}", f"{run['stall_s']:.1f} s",
            _percent(run["stolen"]), _percent(run["others"]),
            f"{run['paths_share']:.1%} / {run['scheduling_share']:.1%}" if "paths_share" in run else "",
        )  # fmt: skip
    return table


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.0%}"


if __name__ == "__main__":
    main()
