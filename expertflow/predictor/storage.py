"""A trained predictor on disk: a folder with predictor.safetensors and predictor.json.

The JSON says what it is (arch, sizes, the model it was trained for, metrics, seed, version); the weights
carry the same fingerprint, so two halves of different predictors are noticed. look-ahead.safetensors, where there is
one, is the look-ahead tuned on the same traces.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from expertflow.predictor.model import PredictedModel, RoutingPathPredictor
from expertflow.predictor.sizes import PredictorSizes
from expertflow.predictor.tuned_ahead import TunedLookAhead

VERSION = 1
WEIGHTS, DESCRIPTION, LOOK_AHEAD = "predictor.safetensors", "predictor.json", "look-ahead.safetensors"


def save_predictor(
    folder: str | Path, predictor: RoutingPathPredictor, metrics: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write both files, each under a temporary name first; the JSON last, so that it vouches for the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(folder / WEIGHTS, predictor, predictor.model.fingerprint)
    description = {
        "version": VERSION,
        "bytes": predictor.num_bytes(),
        "sizes": asdict(predictor.sizes),
        "model": asdict(predictor.model),
        "training": training,
        "metrics": metrics,
    }
    temporary = folder / f"{DESCRIPTION}.{os.getpid()}.new"
    temporary.write_text(json.dumps(description, indent=1) + "\n")
    temporary.replace(folder / DESCRIPTION)


def save_look_ahead(folder: str | Path, tuned: TunedLookAhead, fingerprint: str) -> None:
    _save_tensors(Path(folder) / LOOK_AHEAD, tuned, fingerprint)


def has_look_ahead(folder: str | Path) -> bool:
    return (Path(folder) / LOOK_AHEAD).is_file()


def load_look_ahead(
    folder: str | Path,
    weight_LED: Sequence[Tensor],
    bias_LE: Sequence[Tensor | None],
    fingerprint: str,
) -> TunedLookAhead:
    """What `save_look_ahead` wrote, on the routers of the model that runs.

    Raises ValueError for another model's, and for truncated or foreign weights.
    """
    path = Path(folder) / LOOK_AHEAD
    again = "delete it and give the `expertflow train-predictor` command again, with --model"
    tensors, trained_for = _load_tensors(path, again)
    if trained_for != fingerprint:
        raise ValueError(
            f"{path} was tuned for a model of fingerprint {trained_for}, and the model here has {fingerprint}; {again}"
        )
    inner = tensors["steps.0.up.bias"].numel() if "steps.0.up.bias" in tensors else 1
    tuned = TunedLookAhead(weight_LED, bias_LE, inner)
    try:
        tuned.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model's routers ({error}); {again}") from None
    return tuned.requires_grad_(False)


def _save_tensors(path: Path, module: nn.Module, fingerprint: str) -> None:
    tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    save_file(tensors, temporary, metadata={"fingerprint": fingerprint})
    temporary.replace(path)


def _load_tensors(path: Path, again: str) -> tuple[dict[str, Tensor], str | None]:
    """(tensors by name, fingerprint)."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); restore it, or {again}") from None
    return tensors, metadata.get("fingerprint")


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
    tensors, found = _load_tensors(path, again)
    if found != trained_for.fingerprint:
        raise ValueError(
            f"{path} is of fingerprint {found}, and {DESCRIPTION} beside it of "
            f"{trained_for.fingerprint}: halves of two predictors; {again}"
        )
    try:
        predictor.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {DESCRIPTION} beside it ({error}); {again}") from None
    return predictor
