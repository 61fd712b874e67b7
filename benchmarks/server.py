"""What the server costs over its engine, and whether it lasts.

    python -m benchmarks.server                              # the embedded model, 16 streams
    python -m benchmarks.server --model DIR --memory 8GiB    # another, e.g. the 8-layer Qwen shape
    python -m benchmarks.server --soak-minutes 5             # 64 streams, some cancelled, some read slowly
    python -m benchmarks.server --quick

Overhead: rounds of the same requests, in turn straight through an Engine and over HTTP as streams, in one process with
one model; the client is a process of its own that only counts bytes. The median round of each is compared. Soak: the
client's streams are answered whole, left half-way, or read slowly; the server's memory is read from the kernel.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.common import console, report
from benchmarks.on_the_clock import TINY
from expertflow import LLM, SamplingParams
from expertflow.disturbance import Watch
from expertflow.engine.engine import Engine
from expertflow.server.driver import EngineDriver
from expertflow.server.serve import listening_socket, make_server
from expertflow.server.settings import ServerSettings

ASKED_OVERHEAD = {"tiny-moe": 0.15}
ASKED_ELSEWHERE = 0.03
ASKED_GROWTH = 0.02
ASKED_WAIT = 3.0
SOAK_STREAMS = 64
PROMPT_TOKENS = 16
_SETTLED = 0.2  # of a soak, after which memory is to stay as it is


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--memory", default=None, help="default: 8 experts per layer")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--soak-minutes", type=float, default=0.0, help="instead of the overhead")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 24 tokens; a soak of 20 s")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.max_tokens = min(options.rounds, 3), min(options.max_tokens, 24)
        options.soak_minutes = min(options.soak_minutes, 1 / 3)
    torch.set_num_threads(options.threads)
    found, targets = soak(options) if options.soak_minutes else overhead(options)
    console.print(_table(found))
    report("server", {"model": options.model.name, **found}, {}, targets, 0, options.json)


@contextmanager
def load(options: argparse.Namespace, streams: int) -> Iterator[LLM]:
    size = {"memory": options.memory} if options.memory else {"cache_size": 8}
    batch = max(1, streams // 2)
    context = PROMPT_TOKENS + options.max_tokens
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(
            with_words(options.model, Path(folder)),
            context=context,
            batch=batch,
            sequences=2 * batch,
            **size,
        ) as llm,
    ):
        yield llm


def with_words(model: Path, folder: Path) -> Path:
    """The model. Where it has no tokenizer, as with random weights, a folder of links to it and made-up words."""
    if (model / "tokenizer.json").exists():
        return model
    for file in model.resolve().iterdir():
        (folder / file.name).symlink_to(file)
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    words.decoder = Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def overhead(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of a round each way, and what HTTP adds to the median."""
    with load(options, options.streams) as llm:
        prompts = random_prompts(llm, options.streams)
        params = [
            SamplingParams(
                temperature=0.8, top_k=40, seed=seed, max_tokens=options.max_tokens, ignore_eos=True
            )
            for seed in range(options.streams)
        ]
        bodies = [
            {"prompt": prompt, "temperature": 0.8, "top_k": 40, "seed": seed, "max_tokens": options.max_tokens,
             "ignore_eos": True, "stream": True}
            for seed, prompt in enumerate(prompts)
        ]  # fmt: skip
        tokens = options.streams * options.max_tokens
        straight: list[float] = []
        served: list[float] = []
        straight_cpu: list[float] = []
        served_cpu: list[float] = []
        watch = Watch()
        with serving(llm) as (url, _):
            engine = Engine(llm)  # whose KV cache is made and freed in each round, as the server's
            for number in range(options.rounds + 1):
                began, worked = time.perf_counter(), time.process_time()
                engine.generate(prompts, params)
                ended, between = time.perf_counter(), time.process_time()
                seconds = ask({"url": url, "bodies": bodies})["seconds"]
                if number:  # the first warms both
                    straight.append(ended - began)
                    served.append(seconds)
                    straight_cpu.append(between - worked)
                    served_cpu.append(time.process_time() - between)
                console.print(f"  engine {ended - began:.2f} s, server {seconds:.2f} s")
        seen = watch.so_far().to_dict()
    engine_s, server_s = statistics.median(straight), statistics.median(served)
    share = server_s / engine_s - 1
    asked = ASKED_OVERHEAD.get(options.model.name, ASKED_ELSEWHERE)
    metrics = {
        "streams": options.streams,
        "engine_tokens_per_s": tokens / engine_s,
        "server_tokens_per_s": tokens / server_s,
        "overhead": share,
        # Says something also on a machine that has other work, where the clock does not.
        "cpu_overhead": statistics.median(served_cpu) / statistics.median(straight_cpu) - 1,
        "overhead_ms_per_token": 1e3 * (server_s - engine_s) / tokens,
        "engine_rounds_s": straight,
        "server_rounds_s": served,
        **seen,
    }
    return metrics, {
        "overhead": {"asked": asked, "got": share, "met": None if seen["disturbed"] else share < asked}
    }


def soak(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Many clients of all kinds for some minutes."""
    with load(options, options.streams) as llm:
        prompts = random_prompts(llm, SOAK_STREAMS)
        process = psutil.Process()
        samples: list[int] = []
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(0.5):
                samples.append(process.memory_info().rss)

        with serving(llm, queue=2 * SOAK_STREAMS, write_seconds=60.0) as (url, driver):
            ask({"url": url, "bodies": [_soak_body(prompts[0], options.max_tokens)]})  # warm
            sampler = threading.Thread(target=sample, daemon=True)
            sampler.start()
            seconds = 60 * options.soak_minutes
            found = ask(
                {"url": url, "seconds": seconds, "streams": SOAK_STREAMS,
                 "bodies": [_soak_body(prompt, options.max_tokens) for prompt in prompts]}
            )  # fmt: skip
            stop.set()
            sampler.join()
            waits, stats = driver.metrics, driver.engine.stats
            longest, mean = waits.longest_wait_seconds, waits.mean_wait_seconds
            left = {"outstanding": driver.outstanding, "cancelled": stats.cancelled, "failed": stats.failed}
    settled = samples[int(len(samples) * _SETTLED)]
    growth = max(samples[int(len(samples) * _SETTLED) :]) / settled - 1
    ratio = longest / mean if mean else 0.0
    metrics = {**found, **left, "rss_bytes": samples[-1], "rss_growth": growth, "longest_wait_s": longest,
               "mean_wait_s": mean}  # fmt: skip
    return metrics, {
        "errors": {"asked": 0, "got": found["errors"], "met": found["errors"] == 0},
        "rss_growth": {"asked": ASKED_GROWTH, "got": growth, "met": growth < ASKED_GROWTH},
        "longest_wait_over_mean": {"asked": ASKED_WAIT, "got": ratio, "met": ratio < ASKED_WAIT},
    }


def _soak_body(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "temperature": 1.0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }


def random_prompts(llm: LLM, count: int) -> list[list[int]]:
    embeddings: Any = llm.model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    drawn = torch.randint(vocabulary, (count, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    return drawn.tolist()


@contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[tuple[str, EngineDriver]]:
    """The server in a thread of this process, as `expertflow serve` has it in its main thread."""
    wanted = ServerSettings(port=0, **settings)
    with listening_socket(wanted) as bound:
        server, driver = make_server(llm, Engine(llm), wanted)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
        thread.start()
        try:
            assert server.ready.wait(30), "the server did not start"
            yield f"127.0.0.1:{bound.getsockname()[1]}", driver
        finally:
            server.handle_exit(15, None)
            thread.join()


def ask(work: dict[str, Any]) -> dict[str, Any]:
    """Have the client do this, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.server_client", json.dumps(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _table(found: dict[str, Any]) -> Table:
    table = Table("metric", "value", title="server")
    for name, value in found.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(name, shown)
    return table


if __name__ == "__main__":
    main()
