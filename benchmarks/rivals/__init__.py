"""The systems that decode the same work, one adapter each: ours in its modes, and those it is compared with.

An adapter loads a checkpoint in a process of its own (`load`), or runs a program (llama.cpp), and says exactly what
was run: name, version, flags, and the state of the page cache. `missing` says why one cannot run here.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

OURS = ("ours", "on-demand", "online", "resident")
TRANSFORMERS = ("grouped_mm", "eager")
ACCELERATE, LLAMA_CPP = "accelerate", "llama.cpp"
OFFLOADED = "accelerate-offload"  # the folder in a checkpoint's that accelerate writes
# Outside of what accelerate is told: the interpreter, the libraries, and the layer that is being computed. With less
# left over the cgroup kills it (8 layers of the Qwen1.5-MoE shape in 3.1 GB, 2026-11).
OUTSIDE = 1_600_000_000
# What the caller did before the process began (benchmarks.common.drop_from_page_cache), and what a cgroup does.
COLD = "dropped before the run; what is cached in it counts against the limit"


@dataclass(frozen=True)
class Ran:
    """What was run, for whoever wants to run it again. flags: as given to it."""

    name: str
    version: str
    flags: dict[str, Any] = field(default_factory=dict)
    page_cache: str = COLD

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Loaded(NamedTuple):
    """A model of transformers that can be called, and what it is."""

    model: Any
    ran: Ran


@dataclass(frozen=True)
class Limits:
    """memory: bytes for everything, None for all there is."""

    memory: int | None
    batch: int
    context: int = 256


def load(name: str, folder: Path, limits: Limits) -> Loaded:
    """Load the checkpoint as the system of that name would. Imports what it needs: a process has time to first
    token to win."""
    if name in OURS:
        from benchmarks.rivals import ours

        return ours.load(name, folder, limits)
    if name == ACCELERATE:
        from benchmarks.rivals import accelerate_offload

        return accelerate_offload.load(folder, limits)
    if name in TRANSFORMERS:
        model = auto_class(folder).from_pretrained(folder, experts_implementation=name)
        return Loaded(model, Ran("transformers", versions("transformers"), {"experts_implementation": name}))
    raise ValueError(f"unknown system {name!r}; known: {', '.join((*OURS, ACCELERATE, *TRANSFORMERS))}")


def missing(
    name: str,
    checkpoint: Path,
    memory_bytes: int,
    llama_cpp: Path | None = None,
    limit_bytes: int | None = None,
) -> str | None:
    """Why this system cannot run on this checkpoint here, with what it would take; None where it can.

    memory_bytes: of the machine. limit_bytes: of the memory cgroup it is to run in.
    """
    nbytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    if name in ("resident", *TRANSFORMERS) and nbytes > memory_bytes:
        return f"needs {nbytes / 1e9:.1f} GB of memory and the machine has {memory_bytes / 1e9:.1f}"
    if name == ACCELERATE:
        if importlib.util.find_spec("accelerate") is None:
            return "accelerate is not installed; pip install accelerate"
        if limit_bytes is not None and limit_bytes <= OUTSIDE:
            return f"needs more than {OUTSIDE / 1e9:.1f} GB of memory and is to have {limit_bytes / 1e9:.2f}"
        if not (checkpoint / OFFLOADED).exists():
            return _no_disk(checkpoint, nbytes, "it writes the experts once more, packed by layer")
    if name == LLAMA_CPP:
        if llama_cpp is None:
            return "no tree of llama.cpp was given; build one and say --llama-cpp DIR (benchmarks/rivals/llama_cpp.py)"
        if not gguf_of(checkpoint).exists():
            return _no_disk(checkpoint, nbytes, "its converter writes every weight once more")
    return None


def gguf_of(checkpoint: Path) -> Path:
    """Where it lies once llama.cpp's converter has written it. Names of models have dots, so no suffix is replaced."""
    return checkpoint.with_name(f"{checkpoint.name}.gguf")


def _no_disk(checkpoint: Path, nbytes: int, why: str) -> str | None:
    free = shutil.disk_usage(checkpoint).free
    if free >= nbytes:
        return None
    return f"needs {nbytes / 1e9:.1f} GB more of disk ({why}) and {free / 1e9:.1f} GB are free"


def auto_class(folder: Path) -> Any:
    """The class of transformers that loads this checkpoint."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from expertflow.models import deepseek_moe

    deepseek_moe.register()
    of = json.loads((folder / "config.json").read_text())["architectures"][0]
    return AutoModelForSeq2SeqLM if of.endswith("ForConditionalGeneration") else AutoModelForCausalLM


def versions(*packages: str) -> str:
    return (
        ", ".join(f"{name} {version(name)}" for name in (*packages, "torch"))
        + f", Python {platform.python_version()}"
    )
