"""ExpertFlow in its modes: as it comes, without overlap of loads and arithmetic, predicting online, all resident."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.rivals import Limits, Loaded, Ran, auto_class, versions

# on-demand: the strongest baseline that knows no future, taken apart: every load is waited for.
FLAGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "on-demand": {"overlap": False},
    "online": {"predictor": "online"},
    "resident": {},
}


def load(name: str, folder: Path, limits: Limits) -> Loaded:
    """The model in `limits.memory`; where that is None, and as "resident", with room for every expert."""
    from expertflow.commands.session import importing_for

    with importing_for(folder):  # as `expertflow run` does
        from expertflow.models.attach import ExpertFlowConfig

        auto = auto_class(folder)

    everything = name == "resident" or limits.memory is None
    flags = {
        **({"cache_size": _most_experts(folder)} if everything else {"memory": limits.memory}),
        **{"context": limits.context, "batch": limits.batch},
        **FLAGS[name],
    }
    model = auto.from_pretrained(folder, quantization_config=ExpertFlowConfig(**flags))
    return Loaded(model, Ran(f"expertflow ({name})", versions("transformers"), flags))


def _most_experts(folder: Path) -> int:
    """Experts of a layer, under whichever name config.json has them."""
    config = json.loads((folder / "config.json").read_text())
    return next(
        int(config[key]) for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in config
    )


def loading_rounds(cache: Any, files: list[Path], rounds: int = 8) -> dict[str, Any]:
    """Loading experts and raw direct reads of as many bytes, in turn: a shared disk changes within seconds.

    A round asks for up to 12 experts that are not there, as a layer does, and takes them without computing.
    """
    from expertflow.store.disk import measure_read_bandwidth

    ratios, raws = [], []
    for turn in range(rounds):
        layer = turn % cache.shape.num_layers
        missing = [
            expert
            for expert in range(cache.shape.experts_per_layer[layer])
            if not cache.table.is_ready((layer, expert))
        ][:12]
        nbytes = len(missing) * cache.memory.slot_bytes
        began = time.perf_counter()
        for _ in cache.open_layer(layer, missing):
            pass
        ours = nbytes / (time.perf_counter() - began)
        raws.append(measure_read_bandwidth(files, seconds=nbytes / ours))
        ratios.append(ours / raws[-1])
    return {
        "loading_over_raw": sorted(ratios)[len(ratios) // 2],
        "loading_over_raw_rounds": [round(ratio, 3) for ratio in ratios],
        "raw_read_bytes_per_s": sorted(raws)[len(raws) // 2],
    }
