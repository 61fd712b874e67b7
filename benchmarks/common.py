"""What every benchmark needs: a checkpoint of a real shape, a memory cgroup, and an honest report.

Nothing here decides a result. Weights are random and say so: speed depends on shapes and routes, not values.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file

console = Console(stderr=True)
GIB = 2**30


@dataclass(frozen=True, slots=True)
class QwenShape:
    """Qwen1.5-MoE-A2.7B's layer with fewer layers and a smaller vocabulary (config.json of the release)."""

    layers: int = 8
    hidden: int = 2048
    heads: int = 16
    experts: int = 60
    top_k: int = 4
    expert_inner: int = 1408
    shared_inner: int = 5632
    vocabulary: int = 32000

    @property
    def expert_bytes(self) -> int:
        return 3 * self.expert_inner * self.hidden * 2

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "hidden_size": self.hidden,
            "intermediate_size": self.shared_inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.expert_inner,
            "shared_expert_intermediate_size": self.shared_inner,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "decoder_sparse_step": 1,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": None,
        }


def write_qwen_checkpoint(folder: Path, shape: QwenShape, seed: int = 0) -> Path:
    """A sharded safetensors checkpoint in the published layout, random bf16 weights; reused when whole."""
    marker = folder / "complete.json"
    wanted = {**shape.config(), "seed": seed}
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        return folder
    if folder.exists():
        shutil.rmtree(folder)
    need = shape.layers * shape.experts * shape.expert_bytes * 1.2 + 4 * shape.vocabulary * shape.hidden
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise SystemExit(
            f"{folder}: the checkpoint needs {need / 1e9:.1f} GB of disk and {free / 1e9:.1f} are free"
        )
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:  # std 0.02 throughout, transformers' own initialization
        return torch.randn(*size, generator=generator, dtype=torch.float32).mul_(0.02).bfloat16()

    index: dict[str, str] = {}
    total = shape.layers + 1

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}-of-{total:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    hidden, inner = shape.hidden, shape.expert_inner
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("writing random weights", total=total)
        shard(
            1,
            {
                "model.embed_tokens.weight": random(shape.vocabulary, hidden),
                "lm_head.weight": random(shape.vocabulary, hidden),
                "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            },
        )
        progress.advance(task)
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}"
            tensors = {
                f"{prefix}.input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
                f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
                f"{prefix}.mlp.gate.weight": random(shape.experts, hidden),
                f"{prefix}.mlp.shared_expert_gate.weight": random(1, hidden),
                f"{prefix}.mlp.shared_expert.gate_proj.weight": random(shape.shared_inner, hidden),
                f"{prefix}.mlp.shared_expert.up_proj.weight": random(shape.shared_inner, hidden),
                f"{prefix}.mlp.shared_expert.down_proj.weight": random(hidden, shape.shared_inner),
            }
            for projection in "qkvo":
                tensors[f"{prefix}.self_attn.{projection}_proj.weight"] = random(hidden, hidden)
                if projection != "o":
                    tensors[f"{prefix}.self_attn.{projection}_proj.bias"] = random(hidden)
            for expert in range(shape.experts):
                name = f"{prefix}.mlp.experts.{expert}"
                tensors[f"{name}.gate_proj.weight"] = random(inner, hidden)
                tensors[f"{name}.up_proj.weight"] = random(inner, hidden)
                tensors[f"{name}.down_proj.weight"] = random(hidden, inner)
            shard(layer + 2, tensors)
            progress.advance(task)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    (folder / "generation_config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    marker.write_text(json.dumps(wanted))
    return folder


def drop_from_page_cache(folder: Path) -> None:
    """Forget cached pages of a checkpoint, so that a run starts cold."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class MemoryCgroup:
    """A memory cgroup of our own (v1 or v2), or None of the above: then `available` is False."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.folder: Path | None = None
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        for root, limit_file in ((v1, "memory.limit_in_bytes"), (v2, "memory.max")):
            folder = root / f"expertflow-bench-{os.getpid()}"
            try:
                folder.mkdir()
                (folder / limit_file).write_text(str(limit_bytes))
            except OSError:
                if folder.exists():
                    folder.rmdir()
                continue
            self.folder = folder
            break

    @property
    def available(self) -> bool:
        return self.folder is not None

    def enter(self) -> None:
        """Move the calling process in (given to Popen's preexec_fn)."""
        assert self.folder is not None
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if self.folder and (self.folder / name).exists():
                return int((self.folder / name).read_text())
        return None

    def remove(self) -> None:
        if self.folder is not None:
            self.folder.rmdir()


@contextmanager
def memory_limit(limit_bytes: int | None) -> Iterator[MemoryCgroup | None]:
    if limit_bytes is None:
        yield None
        return
    group = MemoryCgroup(limit_bytes)
    try:
        yield group
    finally:
        group.remove()


def run_worker(module: str, arguments: list[str], limit_bytes: int | None, threads: int) -> dict[str, Any]:
    """Run `python -m module --worker ...` alone in a cgroup; its last line of output is JSON.

    Adds peak_bytes, limit_bytes, and `error` when it died.
    """
    with memory_limit(limit_bytes) as group:
        enter = group.enter if group is not None and group.available else None
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            preexec_fn=enter,
            check=False,
        )
        peak = group.peak_bytes() if group is not None else None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        tail = done.stderr.strip().splitlines()[-3:]
        return {"error": f"exit status {done.returncode}: {' | '.join(tail)}", "peak_bytes": peak}
    result = json.loads(lines[-1])
    result["peak_bytes"] = peak
    result["limit_bytes"] = limit_bytes
    result["limit_enforced"] = enter is not None
    return result


def other_load() -> float:
    """One-minute load average before we start: above about 0.5, timings are not to be trusted."""
    return os.getloadavg()[0]


def stolen_share() -> float:
    """Share of the processors' time since this module was imported that a hypervisor gave to other machines."""
    now = _processor_ticks()
    total = sum(now) - sum(_TICKS_AT_START)
    return (now[7] - _TICKS_AT_START[7]) / total if total > 0 else 0.0


def _processor_ticks() -> list[int]:
    """user, nice, system, idle, iowait, irq, softirq, steal; zeros where the kernel does not say."""
    try:
        return [int(ticks) for ticks in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    except (OSError, ValueError):
        return [0] * 8


_TICKS_AT_START = _processor_ticks()


def commit() -> str:
    """Of the working copy, with a plus where it holds changes; "unknown" outside one."""
    described = _git("describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+")
    return described or "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stolen_share": round(stolen_share(), 3),
    }


def report(
    name: str,
    metrics: dict[str, Any],
    bounds: dict[str, Any],
    targets: dict[str, Any],
    seed: int,
    json_path: Path | None,
) -> None:
    """Print the JSON object that ends every benchmark, and write it to a file when asked."""
    result = {
        "name": name,
        "commit": commit(),
        "machine": machine(),
        "seed": seed,
        "metrics": metrics,
        "bounds": bounds,
        "targets": targets,
    }
    text = json.dumps(result)
    if json_path is not None:
        partial = json_path.with_suffix(".part")
        partial.write_text(text + "\n")
        partial.rename(json_path)
    print(text)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
