"""A checkpoint of a published shape with random weights: sharded safetensors, written once, file by file.

Speed depends on shapes and routes and not on values, and random ones say nothing about text quality. Every byte is
on the disk: a model of 28 GB takes 28 GB. Never more than one file's tensors are in RAM.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import console
from benchmarks.shapes import Shape, checkpoint_bytes

# Tensors are cut out of so many normal numbers, each at an offset of its own: drawing all of 14 billion would take
# twenty times as long as writing them.
_POOL = 1 << 25


class NoRoom(SystemExit):
    """The disk has no room for a checkpoint; the message says how much is needed."""


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0, spare_bytes: int = 0) -> Path:
    """Write the checkpoint under a temporary name, then rename it; one that is whole is reused.

    spare_bytes: to be left free beside it. Raises NoRoom.
    """
    wanted = {**shape.config(), "seed": seed}
    marker = folder / "complete.json"
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        return folder
    partial = folder.with_name(folder.name + ".part")
    for old in (folder, partial):
        if old.exists():
            shutil.rmtree(old)
    need, free = checkpoint_bytes(shape) + spare_bytes, shutil.disk_usage(folder.parent).free
    if free < need:
        raise NoRoom(
            f"{folder}: the checkpoint needs {checkpoint_bytes(shape) / 1e9:.1f} GB of disk"
            + (f", {spare_bytes / 1e9:.1f} GB are to stay free," if spare_bytes else "")
            + f" and {free / 1e9:.1f} GB are free; give another --folder, or fewer --layers"
        )
    partial.mkdir(parents=True)
    draw = _Draw(seed, getattr(torch, shape.dtype))
    total = sum(1 for _ in shape.files())
    index: dict[str, str] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("writing random weights", total=total)
        for number, sizes in enumerate(shape.files(), 1):
            name = f"model-{number:05d}-of-{total:05d}.safetensors"
            save_file({key: draw(key, size) for key, size in sizes.items()}, partial / name, {"format": "pt"})
            _to_disk(partial / name)
            index.update(dict.fromkeys(sizes, name))
            progress.advance(task)
    (partial / "config.json").write_text(json.dumps(shape.config(), indent=1))
    (partial / "generation_config.json").write_text("{}")
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (partial / marker.name).write_text(json.dumps(wanted))
    partial.rename(folder)
    return folder


class _Draw:
    """Tensors of normal numbers, standard deviation 0.02 (transformers' own initialization); norms are ones."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator = torch.Generator().manual_seed(seed)
        self.pool = torch.randn(_POOL, generator=self.generator).mul_(0.02).to(dtype)

    def __call__(self, name: str, size: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(size, dtype=self.pool.dtype)
        if name.endswith("norm.weight"):
            return tensor.fill_(1)
        flat, filled = tensor.view(-1), 0
        while filled < len(flat):
            offset = int(torch.randint(_POOL, (1,), generator=self.generator))
            part = self.pool[offset : offset + len(flat) - filled]
            flat[filled : filled + len(part)] = part
            filled += len(part)
        return tensor


def _to_disk(path: Path) -> None:
    """Written, and out of the page cache: tens of gigabytes there would push out everybody else's."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
