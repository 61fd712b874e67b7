"""What a simulation reads: a recording, predictors for it, and which published model it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from expertflow.predictor.recordings import load_predictors
from expertflow.sim.hardware import ModelSize, model_size, size_like
from expertflow.sim.workload import PREDICTIONS, Foretold, foretell, shape_of
from expertflow.trace import FILE_NAME, Trace, TraceMeta, read_trace

_UNKNOWN_EXPERT_BYTES = 16 << 20


def foretell_all(
    trace: Trace,
    folder: Path,
    split: str,
    predictors: Sequence[str],
    warm: int,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Foretold]:
    """What each predictor says of the split's sequences, by name; the oracle always. warm: sequences of the other
    split that were served before. A folder has a trained predictor, or what a draft said (zoo/draft_trace.py).

    Raises ValueError for a predictor that is neither known nor a folder of this model's.
    """
    sequences = trace.split(split).sequences
    served = [s for s in trace if s.split != split][:warm]
    found: dict[str, Foretold] = {}
    for name in dict.fromkeys([*predictors, "oracle"]):
        progress(f"asking {name}")
        if name in PREDICTIONS:
            found[name] = foretell(trace.meta, sequences, name, warm=served)
        elif (Path(name) / FILE_NAME).exists():
            drafted = read_trace(name, weights=False)
            if drafted.meta.fingerprint != trace.meta.fingerprint:
                raise ValueError(
                    f"{name} was recorded from {drafted.meta.model}, not from {trace.meta.model}"
                )
            found[name] = foretell(trace.meta, sequences, name, warm=served, drafted=drafted)
        elif Path(name).is_dir():
            for title, trained in load_predictors([name], trace.meta, [folder]).items():
                found[title] = foretell(trace.meta, sequences, title, trained, served)
        else:
            raise ValueError(f"unknown predictor {name!r}; known: {', '.join(PREDICTIONS)}, or a folder")
    return found


def size_of(meta: TraceMeta, name: str | None, expert_bytes: int | None) -> tuple[ModelSize, str]:
    """The model that a recording stands for, and a line that says so.

    name: of a published model; None for the one of this shape. Raises ValueError for one of another shape.
    """
    experts, top_k = max(shape_of(meta).experts_per_layer), meta.top_k
    layers = shape_of(meta).num_layers
    shape = f"{layers} MoE layers that decode, {experts} experts, top-{top_k}"
    if expert_bytes is not None:
        size = ModelSize("given", experts, top_k, expert_bytes, 0)
        return size, f"routes of {meta.model} ({shape}); an expert counts as {expert_bytes / 1e6:.1f} MB"
    found = model_size(name) if name is not None else size_like(experts, top_k)
    if found is None:
        size = ModelSize("unknown", experts, top_k, _UNKNOWN_EXPERT_BYTES, 0)
        return size, (
            f"routes of {meta.model} ({shape}); no published model has this shape: an expert counts as "
            f"{size.expert_bytes / 1e6:.1f} MB (--expert-bytes), and no weights are read between MoE layers"
        )
    if (found.experts, found.top_k) != (experts, top_k):
        raise ValueError(
            f"--model-size {found.name} has {found.experts} experts, top-{found.top_k}, and {meta.model} has "
            f"{experts}, top-{top_k}: its routes cannot stand for it; leave --model-size out, or give --expert-bytes"
        )
    return found, (
        f"routes of {meta.model} ({shape}) stand for {found.name}: an expert of {found.expert_bytes / 1e6:.1f} MB, "
        f"{found.dense_bytes / 1e6:.1f} MB of other weights per MoE layer"
    )
