"""What a machine and a model cost: seconds per load and per product, from plain numbers.

The figures of the profiles are assumptions from data sheets, except where one is measured and given as JSON.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from math import ceil
from pathlib import Path
from typing import Any

FORMAT = "expertflow-hardware-1"  # of a profile that `expertflow measure` wrote
CHUNK_BYTES = 4 << 20  # a load is cut into pieces of this size; a demand waits for one at most


@dataclass(frozen=True)
class Hardware:
    """A link from slow to fast memory beside one unit that computes.

    layer_seconds: of what runs between two MoE layers, besides reading the weights; None: as call_seconds, and
    nothing for a model of which no weights between them are known.
    """

    name: str
    link_bytes_per_s: float
    memory_bytes_per_s: float  # weights are read from fast memory once per product
    call_seconds: float  # of each expert, besides reading its weights
    layer_seconds: float | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "name" or (entry.name == "layer_seconds" and value is None):
                continue
            if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise ValueError(f"hardware {self.name!r}: {entry.name}={value!r} must be a number above 0")


PROFILES: dict[str, Hardware] = {
    profile.name: profile
    for profile in (
        Hardware("a40", 25e9, 696e9, 1e-4),  # the paper's; PCIe 4.0 x16 with pinned memory
        Hardware("rtx4090", 25e9, 1008e9, 1e-4),
        Hardware("h100", 55e9, 3350e9, 1e-4),  # PCIe 5.0 x16
    )
}


def hardware(name: str) -> Hardware:
    """A profile by name, or from a JSON file with Hardware's fields. Raises ValueError for anything else."""
    if name in PROFILES:
        return PROFILES[name]
    if not name.endswith(".json"):
        raise ValueError(
            f"unknown hardware {name!r}; known: {', '.join(PROFILES)}, or a JSON file with link_bytes_per_s, "
            f"memory_bytes_per_s and call_seconds, such as `expertflow measure -o mine.json` writes"
        )
    path = Path(name)
    try:
        said: Any = json.loads(path.read_text())
        if isinstance(said, dict) and said.get("format") == FORMAT:
            # "measured" tells people what the figures were made from.
            said = {k: v for k, v in said.items() if k not in ("format", "measured", "name")}
        return Hardware(**{"name": path.stem, **said})
    except (TypeError, json.JSONDecodeError) as error:
        example = {k: v for k, v in asdict(PROFILES["a40"]).items() if k not in ("name", "layer_seconds")}
        raise ValueError(f"{path} is no hardware profile ({error}); write {json.dumps(example)}") from None


@dataclass(frozen=True)
class ModelSize:
    """A published model. dense_bytes: weights read between two of its MoE layers in decode (attention, shared
    experts, dense layers between); the head and the embedding are left out."""

    name: str
    experts: int
    top_k: int
    expert_bytes: int
    dense_bytes: int


_SWITCH_EXPERT = 2 * 768 * 3072 * 4  # published in float32
_SWITCH_DENSE = (
    2 * 8 * 768 * 768 + 2 * 768 * 3072
) * 4  # two layers' self- and cross-attention, one dense FFN
_FINE_EXPERT = 3 * 2048 * 1408 * 2
MODELS: dict[str, ModelSize] = {
    model.name: model
    for model in (
        *(
            ModelSize(f"switch-base-{experts}", experts, 1, _SWITCH_EXPERT, _SWITCH_DENSE)
            for experts in (32, 64, 128)
        ),
        ModelSize("mixtral-8x7b", 8, 2, 3 * 4096 * 14336 * 2, (2 * 4096 * 4096 + 2 * 4096 * 1024) * 2),
        ModelSize("qwen1.5-moe-a2.7b", 60, 4, _FINE_EXPERT, (4 * 2048 * 2048 + 3 * 2048 * 5632) * 2),
        ModelSize("deepseek-moe-16b", 64, 6, _FINE_EXPERT, (4 * 2048 * 2048) * 2 + 2 * _FINE_EXPERT),
    )
}


def model_size(name: str) -> ModelSize:
    if name not in MODELS:
        raise ValueError(f"unknown model size {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


def size_like(experts: int, top_k: int) -> ModelSize | None:
    """The published model with so many experts, or None."""
    return next((m for m in MODELS.values() if (m.experts, m.top_k) == (experts, top_k)), None)


@dataclass(frozen=True, slots=True)
class Costs:
    """What the virtual clock goes by.

    expert_s: arithmetic of one expert for the batch; dense_s: what runs before each MoE layer; chunk_s: one chunk
    on the link, of which an expert has `chunks`. The others are what Python and threads add, 0 where experts are
    large enough: pass_s once per pass (prediction, sampling, what is before and behind the layers); ahead_s for
    each layer that look-ahead is asked about; miss_s to ask for one expert; call_s between two loads, in which the
    thread that loads enters the one and takes up the other, so that the link idles; wake_s from the arrival of an
    expert that arithmetic has waited for until it goes on.
    """

    expert_s: float
    dense_s: float
    chunk_s: float
    chunks: int
    pass_s: float = 0.0
    ahead_s: float = 0.0
    miss_s: float = 0.0
    call_s: float = 0.0
    wake_s: float = 0.0

    @property
    def load_s(self) -> float:
        return self.chunk_s * self.chunks


def costs(machine: Hardware, expert_bytes: int, dense_bytes: int) -> Costs:
    """Decode batches are small: an expert's product takes as long as reading its weights."""
    chunks = ceil(expert_bytes / CHUNK_BYTES)
    layer_s = machine.layer_seconds
    if layer_s is None:
        layer_s = machine.call_seconds if dense_bytes else 0.0
    return Costs(
        expert_s=machine.call_seconds + expert_bytes / machine.memory_bytes_per_s,
        dense_s=layer_s + dense_bytes / machine.memory_bytes_per_s,
        chunk_s=expert_bytes / machine.link_bytes_per_s / chunks,
        chunks=chunks,
    )
