"""What a draft says of recorded sequences, as a recording beside theirs: `python -m zoo.draft_trace MODEL TRACE OUT`.

A draft (`--predictor draft`) is a pass of the model without its routed experts, and wants the model. Its word is kept
here as routes of the same sequences, so that `expertflow simulate TRACE --predictor OUT` can do without.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from expertflow import LLM
from expertflow.cache.gate import AlwaysOpen
from expertflow.kv_name import KV_CACHE, kv_cache_of
from expertflow.models.fingerprint import fingerprint
from expertflow.trace import TracedSequence, TraceMeta, TraceWriter, read_trace


class _Drafted:
    """Runs sequences through a model and hears what is said of each of their decode steps."""

    def __init__(self, llm: LLM, meta: TraceMeta):
        predicting = llm.experts.predicting
        if predicting is None or predicting.draft is None:
            raise ValueError(f"{llm.model.config.model_type} cannot be drafted")
        predicting.gate = AlwaysOpen()
        self._llm, self._meta, self._predicting = llm, meta, predicting
        self._said: list[Tensor] = []
        ask = predicting.draft.p_N1LE

        def heard(*args: Any, **kwargs: Any) -> Tensor | None:
            p_N1LE = ask(*args, **kwargs)
            if p_N1LE is not None:
                self._said.append(p_N1LE[0, 0].topk(meta.top_k, dim=-1).indices)
            return p_N1LE

        predicting.draft.p_N1LE = heard  # type: ignore[method-assign]

    @torch.no_grad()
    def routes_TLK(self, sequence: TracedSequence) -> np.ndarray:
        """Of the decode steps; "nowhere" for the tokens before them. Raises ValueError where a draft failed."""
        model: Any = self._llm.model
        ids_1T = torch.from_numpy(sequence.target_ids_T.astype("int64"))[None]
        first = sequence.num_prefill
        given: dict[str, Any] = {}
        name = "input_ids"
        if model.config.is_encoder_decoder:
            source_1S = torch.from_numpy(sequence.source_ids_S.astype("int64"))[None]
            given["encoder_outputs"] = model.get_encoder()(source_1S)
            name = "decoder_input_ids"
        self._said.clear()
        past = kv_cache_of(model(**given, **{name: ids_1T[:, :first]}, use_cache=True))
        for t in range(first, ids_1T.shape[1]):
            model(**given, **{name: ids_1T[:, t : t + 1], KV_CACHE: past}, use_cache=True)
        stats = self._predicting.stats
        if len(self._said) != ids_1T.shape[1] - first:
            raise ValueError(
                f"{len(self._said)} of {ids_1T.shape[1] - first} steps were drafted: "
                f"{stats.draft_failed or stats.failed or 'nothing was said of the others'}"
            )
        routes_TLK = np.full_like(sequence.target_routes_TLK, max(self._meta.experts_per_layer))
        if self._said:
            routes_TLK[first:] = torch.stack(self._said).numpy()
        return routes_TLK


def record(model: Path, source: Path, target: Path, split: str = "test") -> tuple[int, float]:
    """Draft every decode step of a split. Returns the number of steps and how often a named expert was right.

    Raises ValueError for a model that cannot be drafted, a recording of another, or a target that is there.
    """
    if target.exists():
        raise ValueError(f"{target} exists; give another folder, or delete it")
    trace = read_trace(source, weights=False).split(split)
    longest = max(len(s.target_ids_T) + len(s.source_ids_S) for s in trace)
    steps = right = 0
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    some = max(2, max(trace.meta.experts_per_layer) // 2)  # with all of them there nobody would be asked
    with LLM(model, store="ram", cache_size=some, predictor="draft", batch=1, context=longest + 1) as llm:
        if fingerprint(llm.model) != trace.meta.fingerprint:
            raise ValueError(f"{source} was recorded from another model than {model}")
        drafted = _Drafted(llm, trace.meta)
        with TraceWriter(partial, trace.meta) as writer:
            for sequence in track(trace.sequences, "drafting", transient=True):
                routes_TLK = drafted.routes_TLK(sequence)
                first = sequence.num_prefill
                named, came = routes_TLK[first:], sequence.target_routes_TLK[first:]
                right += int((named[..., None] == came[..., None, :]).any(-1).sum())
                steps += len(named)
                writer.append(
                    replace(
                        sequence,
                        target_routes_TLK=routes_TLK,
                        source_weights_SLK=None,
                        target_weights_TLK=None,
                    )
                )
    partial.rename(target)
    of_each = trace.meta.target_layers * trace.meta.top_k
    return steps, right / max(1, steps * of_each)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo.draft_trace", description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("source", type=Path, metavar="TRACE")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--split", default="test", help="whose sequences [test]")
    options = parser.parse_args(argv)
    try:
        steps, right = record(options.model, options.source, options.target, options.split)
    except (OSError, ValueError) as error:
        print(f"zoo.draft_trace: {error}", file=sys.stderr)
        return 1
    print(f"{options.target}: {steps} steps, {right:.3f} of the experts named were chosen")
    return 0


if __name__ == "__main__":
    sys.exit(main())
