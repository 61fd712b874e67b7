"""Which model is this? Sixteen hex digits that a trace or a predictor carries along.

Two models with the same digits route alike as far as can be told from what is cheap to read: the settings
that define the architecture, the experts, and the beginning of the input embedding (training changes it).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

_ROWS = 1024
# Where a copy came from, who wrote it and how it is run; not what it computes. Keys with "_" in front too.
_PASSING = {
    "transformers_version",
    "name_or_path",
    "architectures",
    "auto_map",
    "dtype",  # the embedding's bytes tell
    "torch_dtype",
    "quantization_config",
    "use_cache",
    "output_router_logits",
}


def fingerprint(model: PreTrainedModel) -> str:
    """Of a model that expertflow has loaded, 16 hex digits; the same in every process and on every machine.

    A copy in another precision is another model: its routes differ.
    """
    loaded: Any = model.expertflow
    # The file, not model.config: that one grows new defaults with each transformers release.
    config: dict[str, Any] = json.loads(
        (loaded.checkpoint.folder / "config.json").read_text(encoding="utf-8")
    )
    essential = {
        key: value for key, value in config.items() if not key.startswith("_") and key not in _PASSING
    }
    experts = list(loaded.cache.shape.experts_per_layer)
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.detach()[:_ROWS].cpu().contiguous()
    digest = hashlib.sha256(json.dumps([essential, experts], sort_keys=True).encode())
    digest.update(rows.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
