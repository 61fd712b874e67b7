"""transformers with accelerate's disk offload: what fits stays in RAM, the rest is read from disk at every use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.rivals import OFFLOADED, OUTSIDE, Limits, Loaded, Ran, auto_class, versions


def load(folder: Path, limits: Limits) -> Loaded:
    """Raises ValueError for less memory than it takes itself."""
    if limits.memory is None or limits.memory <= OUTSIDE:
        raise ValueError(
            f"memory={limits.memory}: accelerate's offload needs a limit above {OUTSIDE / 1e9} GB"
        )
    flags: dict[str, Any] = {
        "device_map": "auto",
        "max_memory": {"cpu": limits.memory - OUTSIDE},
        "offload_folder": folder / OFFLOADED,
    }
    model = auto_class(folder).from_pretrained(folder, **flags)
    said = {**flags, "offload_folder": f"{OFFLOADED} beside the checkpoint"}
    return Loaded(model, Ran("accelerate disk offload", versions("accelerate", "transformers"), said))
