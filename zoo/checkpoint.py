"""What a training run leaves on disk: a published-format model directory, and the state to go on from.

    DIR/config.json, model.safetensors, tokenizer...   loads with from_pretrained
    DIR/training/state.safetensors                     float32 masters and optimizer state
    DIR/training/history.jsonl, recipe.json            one line per logged interval; the settings
Everything is written under a temporary name and renamed; nothing is a pickle.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from zoo.optimizer import MasterOptimizer


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Rows and tokens fix the data order and the learning rate, steps Adam's bias."""

    arch: str
    seed: int
    batch: int
    context: int
    rows: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0


def training_dir(run: Path) -> Path:
    return run / "training"


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """safetensors, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
    temporary.replace(path)


def write_text(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def save_state(
    run: Path, optimizer: MasterOptimizer, progress: Progress, history: list[dict[str, Any]]
) -> None:
    """Everything a later process needs to continue as if this one had not stopped."""
    write_text("".join(json.dumps(entry) + "\n" for entry in history), training_dir(run) / "history.jsonl")
    # Last: its presence says that the rest is there.
    save_tensors(
        optimizer.state(), training_dir(run) / "state.safetensors", {"progress": json.dumps(asdict(progress))}
    )


def load_state(run: Path, optimizer: MasterOptimizer) -> tuple[Progress, list[dict[str, Any]]] | None:
    """Restore `save_state` into optimizer and its model; None where there is no state yet."""
    path = training_dir(run) / "state.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
    optimizer.load(load_file(path), progress.steps)
    lines = (training_dir(run) / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return progress, [entry for entry in map(json.loads, lines) if entry["tokens"] <= progress.tokens]


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model as its authors publish it: a tensor per expert and projection, bf16, one file.

    A reader of `out` sees each file old or new, never half. Other files in `out` stay.
    """
    out.mkdir(parents=True, exist_ok=True)
    staged = out / ".export.part"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        model.save_pretrained(staged, max_shard_size="10GB")
        tokenizer.save_pretrained(staged)
        # Weights first: an old config beside new weights of the same shape still loads.
        for file in sorted(staged.iterdir(), key=lambda f: f.suffix != ".safetensors"):
            file.chmod(0o644)
            file.replace(out / file.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def load_masters(run: Path, model: PreTrainedModel) -> Progress:
    """Put the masters of a run's state into `model`, rounded to its dtype; the state is not changed."""
    path = training_dir(run) / "state.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} is missing; {run} is not a directory that zoo.train writes")
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"master.{name}"))
        return Progress(**json.loads(file.metadata()["progress"]))
