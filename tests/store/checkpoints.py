"""Small checkpoints for the store's tests, and the slow, obvious way to read a span."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from expertflow.core import ExpertId
from expertflow.store.checkpoint import Checkpoint, TensorSpan
from expertflow.store.layout import Part


def header_of(content: object, pad: int = 0) -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    raw += b" " * pad
    return len(raw).to_bytes(8, "little") + raw


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read_span(span: TensorSpan) -> torch.Tensor:
    """The tensor, by plain Python reads."""
    with span.path.open("rb") as file:
        file.seek(span.offset)
        raw = bytearray(file.read(span.nbytes))
    if not raw:
        return torch.empty(span.shape, dtype=span.dtype)
    return torch.frombuffer(raw, dtype=span.dtype).view(span.shape)


def write_sharded(
    folder: Path, shards: list[dict[str, torch.Tensor]], suffix: str = "safetensors"
) -> dict[str, str]:
    """Shards and their index as transformers names them. Returns the weight map."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"{stem}-{i + 1:05}-of-{len(shards):05}.{suffix}"
        if suffix == "safetensors":
            save_file(shard, folder / name)
        else:
            torch.save(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    write_index(folder / f"{stem}.{suffix}.index.json", weight_map)
    return weight_map


def write_index(path: Path, weight_map: dict[str, str]) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def expert_tensors(num_experts: int, inner: int = 24, hidden: int = 50) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"down": (hidden, inner), "gate": (inner, hidden), "up": (inner, hidden)}
    return {
        f"experts.{e}.{name}": torch.randn(shape).bfloat16()
        for e in range(num_experts)
        for name, shape in shapes.items()
    }


def part_of(span: TensorSpan, role: str, index: int = 0) -> Part:
    return Part(role, span.path, span.offset, span.nbytes, span.dtype, span.shape, index)


def expert_parts(checkpoint: Checkpoint, num_experts: int) -> dict[ExpertId, list[Part]]:
    def part(e: int, name: str, role: str, index: int = 0) -> Part:
        return part_of(checkpoint.spans[f"experts.{e}.{name}"], role, index)

    return {
        ExpertId(0, e): [
            part(e, "gate", "gate_up_proj"),
            part(e, "up", "gate_up_proj", 1),
            part(e, "down", "down_proj"),
        ]
        for e in range(num_experts)
    }
