"""A trained predictor on disk: a folder with predictor.safetensors and predictor.json.

The JSON says what it is (arch, sizes, the model it was trained for, metrics, seed, version); the weights
carry the same fingerprint, so two halves of different predictors are noticed.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from expertflow.predictor.model import PredictedModel, RoutingPathPredictor
from expertflow.predictor.sizes import PredictorSizes
from expertflow.whole_file import write_whole

VERSION = 1
WEIGHTS, DESCRIPTION = "predictor.safetensors", "predictor.json"


def save_predictor(
    folder: str | Path, predictor: RoutingPathPredictor, metrics: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write both files, each under a temporary name first; the JSON last, so that it vouches for the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in predictor.state_dict().items()}
    temporary = folder / f"{WEIGHTS}.{os.getpid()}.new"
    # Not save_file, which keeps others from reading the file whatever the umask.
    temporary.write_bytes(save(tensors, metadata={"fingerprint": predictor.model.fingerprint}))
    temporary.replace(folder / WEIGHTS)
    description = {
        "version": VERSION,
        "bytes": predictor.num_bytes(),
        "sizes": asdict(predictor.sizes),
        "model": asdict(predictor.model),
        "training": training,
        "metrics": metrics,
    }
    write_whole(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def read_description(folder: str | Path) -> dict[str, Any]:
    """The JSON of a predictor. Raises ValueError when it is missing, damaged or of another version."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {DESCRIPTION}, so it is no trained predictor; make one with "
            f"`expertflow train-predictor TRACES -o {folder}`"
        )
    try:
        description = json.loads(path.read_text())
        version = description["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); train the predictor again") from None
    if version != VERSION:
        raise ValueError(
            f"{path} is of version {version}, and this expertflow reads version {VERSION}; use the expertflow "
            f"that wrote it, or train the predictor again"
        )
    return description


def load_predictor(folder: str | Path, fingerprint: str | None = None) -> RoutingPathPredictor:
    """A predictor ready to predict, on the CPU.

    fingerprint: of the model that is to run; None to skip the comparison (tools that read traces compare theirs).
    Raises ValueError for another model's predictor and for missing, truncated or foreign weights.
    """
    description = read_description(folder)
    path = Path(folder) / WEIGHTS
    again = f"train it again with `expertflow train-predictor TRACES -o {folder}`"
    try:
        sizes = PredictorSizes(**description["sizes"])
        model = dict(description["model"])
        model["experts_per_layer"] = tuple(model["experts_per_layer"])
        predictor = RoutingPathPredictor(sizes, PredictedModel(**model)).compact()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{Path(folder) / DESCRIPTION} is damaged ({error}); {again}") from None
    trained_for = predictor.model
    if fingerprint is not None and fingerprint != trained_for.fingerprint:
        raise ValueError(
            f"{folder} predicts {trained_for.model} (fingerprint {trained_for.fingerprint}), and the model here "
            f"has fingerprint {fingerprint}; train a predictor on traces of this model"
        )
    if not path.is_file():
        raise ValueError(f"{path} is missing; restore it, or {again}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); restore it, or {again}") from None
    if metadata.get("fingerprint") != trained_for.fingerprint:
        raise ValueError(
            f"{path} is of fingerprint {metadata.get('fingerprint')}, and {DESCRIPTION} beside it of "
            f"{trained_for.fingerprint}: halves of two predictors; {again}"
        )
    try:
        predictor.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {DESCRIPTION} beside it ({error}); {again}") from None
    return predictor
