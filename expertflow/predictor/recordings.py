"""What an evaluation reads: recordings of one model, and predictors trained for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expertflow.predictor.model import RoutingPathPredictor
from expertflow.predictor.storage import load_predictor
from expertflow.trace import TracedSequence, TraceMeta, read_trace


def read_recordings(folders: Sequence[str | Path]) -> tuple[TraceMeta, list[TracedSequence]]:
    """All sequences of these folders. Raises ValueError when they are of different models, or malformed."""
    if not folders:
        raise ValueError("no trace was given; record one with `expertflow trace MODEL --dataset ... -o DIR`")
    meta: TraceMeta | None = None
    sequences: list[TracedSequence] = []
    for folder in folders:
        trace = read_trace(folder, weights=False)
        if meta is not None and trace.meta.fingerprint != meta.fingerprint:
            raise ValueError(
                f"{folder} was recorded with {trace.meta.model} (fingerprint {trace.meta.fingerprint}), and "
                f"{folders[0]} with {meta.model} ({meta.fingerprint}); evaluate one model at a time"
            )
        meta = meta or trace.meta
        sequences += list(trace)
    assert meta is not None
    return meta, sequences


def load_predictors(
    folders: Sequence[str | Path], meta: TraceMeta, traces: Sequence[str | Path]
) -> dict[str, RoutingPathPredictor]:
    """Predictors by the name of their folder. Raises ValueError for one of another model than was traced."""
    found: dict[str, RoutingPathPredictor] = {}
    for folder in folders:
        predictor = load_predictor(folder)
        if predictor.model.fingerprint != meta.fingerprint:
            raise ValueError(
                f"{folder} predicts {predictor.model.model} (fingerprint {predictor.model.fingerprint}), but "
                f"{traces[0]} was recorded with {meta.model} ({meta.fingerprint}); give traces of its own "
                f"model, or train a predictor on these with `expertflow train-predictor {traces[0]} -o DIR`"
            )
        name = Path(folder).resolve().name
        # Two folders of one name are told apart by their parents.
        found[name if name not in found else str(folder)] = predictor
    return found
