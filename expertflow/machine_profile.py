"""Machine profile: this machine's figures as JSON, for `expertflow simulate --hardware FILE.json`.

What `plan` measures to forecast one model, written down for the simulator: how fast experts come, how fast their
weights are multiplied, and what Python adds to each. Beside the figures stands who else had the processors.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from rich.table import Table

from expertflow.config import Settings, format_bandwidth, format_bytes, parse_bandwidth
from expertflow.disturbance import Disturbance, Watch
from expertflow.forecast import plan_model
from expertflow.measure import measure_copy_bandwidth, measure_disk, measure_machine, nearest_existing
from expertflow.sim.hardware import FORMAT, Hardware
from expertflow.step_time import Machine
from expertflow.whole_file import write_whole

# Qwen1.5-MoE-A2.7B, where no model is given: three matrices [1408, 2048] to an expert.
_HIDDEN, _INNER, _TOP_K = 2048, 1408, 4
_EXPERT_BYTES = 3 * _INNER * _HIDDEN * 2
DEFAULT_SHAPE = "experts like Qwen1.5-MoE-A2.7B's (3 x 1408 x 2048, bf16), since no model was given"


@dataclass(frozen=True)
class Profile:
    """hardware: what the simulator reads. The rest says what it was made from."""

    hardware: Hardware
    machine: Machine
    shape: str  # whose matrices were multiplied
    link: str  # where experts came from
    disturbance: Disturbance

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as `hardware` takes it back."""
        measured = {
            "shape": self.shape,
            "link": self.link,
            "machine": asdict(self.machine),
            "torch": torch.__version__,
            "disturbance": self.disturbance.to_dict(),
        }
        return {"format": FORMAT, **asdict(self.hardware), "measured": measured}


def profile_machine(
    source: str | None,
    store: str = "disk",
    link: str | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Profile:
    """Measure this machine, about five seconds. source: a folder or hub id whose shapes to take (headers are read).

    store: where experts come from, "disk" (of the checkpoint, or of the hub's cache folder, where 256 MiB are written
    for a moment) or "ram". link: held to that bandwidth. Raises as `plan_model` and Settings do.
    """
    settings = Settings(cache_size=2, store=store, link=link)
    watch = Watch()
    if source is not None:
        progress(f"measuring on the shapes of {source}: the {store}, products, a layer's overhead")
        forecast = plan_model(source, settings)
        machine, folder = forecast.machine, forecast.disk_folder
        shape = f"experts of {source} ({format_bytes(forecast.work.expert_read_bytes)}, {forecast.dtype})"
    else:
        folder, shape = Path(constants.HF_HUB_CACHE), DEFAULT_SHAPE
        progress(f"measuring the {store}")
        machine = _default_machine(settings, folder, progress)
    where = "RAM" if store == "ram" else f"the disk of {nearest_existing(folder)}"
    if link is not None:
        where += f", held to {format_bandwidth(parse_bandwidth(link))}"
    hardware = Hardware(
        platform.node() or "this machine",
        link_bytes_per_s=machine.load_bytes_per_s,
        memory_bytes_per_s=machine.expert.memory_bytes_per_s,
        call_seconds=max(machine.expert_overhead_s, 1e-7),
        layer_seconds=max(machine.layer_overhead_s, 1e-7),
    )
    return Profile(hardware, machine, shape, where, watch.so_far())


def _default_machine(settings: Settings, folder: Path, progress: Callable[[str], None]) -> Machine:
    if settings.store == "ram":
        load_bytes_per_s = measure_copy_bandwidth()
    else:
        load_bytes_per_s = measure_disk(folder, (), _EXPERT_BYTES)
    if settings.link is not None:
        load_bytes_per_s = min(load_bytes_per_s, parse_bandwidth(settings.link))
    progress("measuring products and a layer's overhead")
    return measure_machine(
        dtype=torch.bfloat16,
        expert_matrix=(_INNER, _HIDDEN),
        dense_matrix=(_HIDDEN, _HIDDEN),
        top_k=_TOP_K,
        expert_rows=[1],
        dense_rows=[1],
        hidden=_HIDDEN,
        load_bytes_per_s=load_bytes_per_s,
    )


def save_profile(profile: Profile, path: Path) -> None:
    write_whole(path, json.dumps(profile.to_dict(), indent=1) + "\n")


def table(profile: Profile) -> Table:
    """For people; the last row says how far to trust the others."""
    hardware, layer_s = profile.hardware, profile.hardware.layer_seconds
    assert layer_s is not None
    found = Table(
        title=f"this machine, {profile.machine.threads} threads: {profile.shape}", title_justify="left"
    )
    for column in ("measured", "", "in the profile"):
        found.add_column(column, justify="right" if not column else "left")
    found.add_row(
        f"loading, from {profile.link}", format_bandwidth(hardware.link_bytes_per_s), "link_bytes_per_s"
    )
    memory = format_bandwidth(hardware.memory_bytes_per_s)
    found.add_row("weights multiplied by one row", memory, "memory_bytes_per_s")
    found.add_row("each expert, beside its weights", f"{hardware.call_seconds * 1e6:.0f} us", "call_seconds")
    found.add_row("each layer, beside its weights", f"{layer_s * 1e6:.0f} us", "layer_seconds")
    found.add_section()
    found.add_row("meanwhile", "", str(profile.disturbance))
    return found
