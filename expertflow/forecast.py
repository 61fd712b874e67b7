"""Forecast: does a model fit, and how fast will it be? From headers alone, before its weights are there.

It joins those who know a part of the answer: headers (of a folder or of the hub), the skeleton on the meta
device, the memory budget, this machine's measured speeds, the arithmetic of a step. It runs no model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from expertflow import budget
from expertflow.budget import MemoryPlan, plan_memory
from expertflow.config import Settings, format_bandwidth, format_bytes, parse_bandwidth, parse_bytes
from expertflow.hub_headers import cached_snapshot, fetch_hub_model
from expertflow.measure import measure_copy_bandwidth, measure_disk, measure_machine, nearest_existing
from expertflow.models.attach import register
from expertflow.models.footprint import honoured_prefill, measure_model, within_training
from expertflow.models.predictors import check_predictor, predictor_bytes
from expertflow.models.skeleton import Skeleton, build_skeleton, unknown_architecture
from expertflow.step_time import (
    TYPICAL_EXPONENT,
    Machine,
    Speed,
    Work,
    check_hit_ratio,
    distinct_experts,
    forecast_speed,
    prompt_hit_ratio,
    prompt_tokens,
    typical_hit_ratio,
)
from expertflow.store.checkpoint import Checkpoint, open_checkpoint
from expertflow.store.quantized import refuse_quantized


@dataclass(frozen=True)
class Forecast:
    """All that `plan` says. `memory` plans for the budget or, when that does not fit, for the smallest."""

    source: str
    commit: str | None  # of a hub model whose headers were fetched
    model_type: str
    dtype: str
    total_bytes: int  # of the checkpoint's weight files
    dense_bytes: int
    expert_bytes: int
    num_experts: int
    top_k: int
    memory: MemoryPlan
    budget_bytes: int | None  # None when the number of slots was given
    smallest_budget: int
    fits: bool
    disk_folder: Path
    disk_free_bytes: int | None  # where a hub model would be downloaded to
    fetched_bytes: int  # over the network, for this forecast
    past: int
    machine: Machine
    settings: Settings
    work: Work
    speeds: tuple[Speed, ...]  # the one at the given or estimated hit ratio first

    @property
    def expected(self) -> Speed:
        return self.speeds[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        found = asdict(self)
        found["disk_folder"] = str(self.disk_folder)
        found["slots_per_layer"] = self.memory.slots_per_layer
        found["resident_share"] = self.memory.resident_share
        for speed, entry in zip(self.speeds, found["speeds"], strict=True):
            entry["decode"]["bound"], entry["prefill"]["bound"] = speed.decode.bound, speed.prefill.bound
        return found


def plan_model(
    source: str | Path,
    settings: Settings,
    *,
    revision: str | None = None,
    hit_ratio: float | None = None,
    prefill_hit_ratio: float | None = None,
    past: int = 0,
    machine: Machine | None = None,
    endpoint: str | None = None,
) -> Forecast:
    """Forecast memory and speed of a model folder or hub id. Reads headers, and this machine's clock.

    hit_ratio: the share of experts needed that are in fast memory, when decoding; prefill_hit_ratio: for
    prompts; None: estimated. past: tokens before the decoded one. machine: speeds to assume; None: measured
    here, which takes some seconds and, for a hub model, a file of 256 MiB for a moment in the cache folder.
    Raises ValueError or OSError with the remedy; a budget that is too small is no error but `fits=False`.
    """
    for ratio in (hit_ratio, prefill_hit_ratio):
        check_hit_ratio(ratio if ratio is not None else 0.0)
    check_predictor(settings)
    config, checkpoint, commit, fetched_bytes = _find(source, revision, endpoint)
    skeleton = build_skeleton(config, checkpoint)
    settings = within_training(skeleton.model, settings.on_cpu("plan"))
    settings = honoured_prefill(skeleton.model, settings)
    if not 0 <= past < settings.context:
        raise ValueError(f"past={past} must be at least 0 and below the context of {settings.context} tokens")
    downloaded = commit is None
    tokenizer = _tokenizer(checkpoint.folder) if downloaded else None
    memory, fits = _fit(skeleton, settings)
    del tokenizer  # it was to be counted: `run` holds one, of tens of MB where the vocabulary is large
    disk_folder = checkpoint.folder if downloaded else Path(constants.HF_HUB_CACHE)
    if machine is None:
        machine = _measure(skeleton, settings, disk_folder, checkpoint.files if downloaded else ())
    if settings.link is not None:
        load_bytes_per_s = min(machine.load_bytes_per_s, parse_bandwidth(settings.link))
        machine = replace(machine, load_bytes_per_s=load_bytes_per_s)
    work = skeleton.work
    resident = memory.resident_share
    expected = forecast_speed(
        "given" if hit_ratio is not None else "estimate",
        work,
        machine,
        settings,
        typical_hit_ratio(resident) if hit_ratio is None else hit_ratio,
        _prompt_hit_ratio(work, memory, settings) if prefill_hit_ratio is None else prefill_hit_ratio,
        past,
    )
    others = {"nothing cached": 0.0, "uniform routing": resident, "90 %": 0.9, "everything cached": 1.0}
    total_bytes = sum(identity.nbytes for identity in checkpoint.identities.values())
    return Forecast(
        source=str(source),
        commit=commit,
        model_type=skeleton.model.config.model_type,
        dtype=str(skeleton.dtype).removeprefix("torch."),
        total_bytes=total_bytes,
        dense_bytes=memory.model.dense_bytes,
        expert_bytes=skeleton.expert_bytes,
        num_experts=memory.model.num_experts,
        top_k=work.top_k,
        memory=memory,
        budget_bytes=_budget_bytes(settings),
        smallest_budget=memory.smallest_budget(),
        fits=fits,
        disk_folder=disk_folder,
        disk_free_bytes=None if downloaded else shutil.disk_usage(nearest_existing(disk_folder)).free,
        fetched_bytes=fetched_bytes,
        past=past,
        machine=machine,
        settings=settings,
        work=work,
        speeds=(
            expected,
            *(
                forecast_speed(label, work, machine, settings, ratio, past=past)
                for label, ratio in others.items()
            ),
        ),
    )


def _find(
    source: str | Path, revision: str | None, endpoint: str | None
) -> tuple[PretrainedConfig, Checkpoint, str | None, int]:
    """Config and headers of a folder, an earlier download, or the hub; the commit and bytes fetched there."""
    folder = Path(source)
    looks_like_path = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if folder.exists() or looks_like_path:
        if revision is not None and folder.exists():
            raise ValueError(f"revision={revision!r} means nothing for the folder {folder}; leave it out")
        checkpoint = open_checkpoint(folder.expanduser())
        return _read_config(checkpoint.folder, str(source)), checkpoint, None, 0
    snapshot = cached_snapshot(str(source), revision)
    if snapshot is not None:
        try:
            checkpoint = open_checkpoint(snapshot)
        except OSError:
            pass  # an unfinished download; the hub knows the rest
        else:
            return _read_config(snapshot, str(source)), checkpoint, None, 0
    remote = fetch_hub_model(str(source), revision, endpoint=endpoint)
    with tempfile.TemporaryDirectory(prefix="expertflow-") as temporary:
        (Path(temporary) / "config.json").write_text(json.dumps(remote.config))
        config = _read_config(Path(temporary), str(source))
    return config, remote.checkpoint, remote.commit, remote.fetched_bytes


def _read_config(folder: Path, source: str) -> PretrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{source} has no config.json; download it into the folder that holds the weights"
        )
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{source}: config.json is not valid JSON ({error}); download it again") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{source}: config.json names no model_type; it is of no transformers model")
    refuse_quantized(fields, source)
    register()
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, ImportError) as error:
        raise unknown_architecture(source, fields["model_type"], error) from None


# What `run` holds when it counts is 1 to 3 MiB more than what is held here: the smallest budget should work there.
_FROM_RUN_TO_RUN = 4 * 2**20


def _fit(skeleton: Skeleton, settings: Settings) -> tuple[MemoryPlan, bool]:
    """The plan for the budget, or for the smallest that works, and which of both it is."""
    model = measure_model(
        skeleton.model, skeleton.moe_layers, skeleton.slot_bytes, skeleton.staging_bytes, settings.context
    )
    held = (
        budget.process_bytes() + _FROM_RUN_TO_RUN + (skeleton.expert_bytes if settings.store == "ram" else 0)
    )
    free = budget.free_bytes()
    asked = predictor_bytes(skeleton.model, skeleton.moe_layers, settings)
    least = plan_memory(model, replace(settings, memory=None, cache_size=1e-9), held, free, asked)
    if settings.cache_size is None and (_budget_bytes(settings) or free) < least.total_bytes:
        return replace(least, budget_bytes=_budget_bytes(settings) or free), False
    return plan_memory(model, settings, held, free, asked), True


def _tokenizer(folder: Path) -> object:
    """The folder's, or None: that one is missing is for `run` to say."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError):
        return None


def _prompt_hit_ratio(work: Work, memory: MemoryPlan, settings: Settings) -> float:
    layers = work.prefill.experts_per_layer
    tokens = prompt_tokens(settings)
    needed = sum(distinct_experts(experts, work.top_k, tokens) for experts in layers) / max(1, len(layers))
    return prompt_hit_ratio(memory.num_slots, len(layers), needed) if layers else 1.0


def _budget_bytes(settings: Settings) -> int | None:
    return parse_bytes(settings.memory) if settings.memory is not None else None


def _measure(skeleton: Skeleton, settings: Settings, folder: Path, files: Sequence[Path]) -> Machine:
    work, batch, chunk = skeleton.work, settings.batch, prompt_tokens(settings)
    if settings.store == "ram":
        load_bytes_per_s = measure_copy_bandwidth()
    else:
        load_bytes_per_s = measure_disk(folder, files, work.expert_read_bytes)
    rows = {
        round(tokens * work.top_k / distinct_experts(experts, work.top_k, tokens))
        for one, tokens in ((work.decode, batch), (work.prefill, chunk))
        for experts in one.experts_per_layer
    }
    return measure_machine(
        dtype=skeleton.dtype,
        expert_matrix=skeleton.expert_matrix,
        dense_matrix=skeleton.dense_matrix,
        top_k=work.top_k,
        expert_rows=sorted(rows),
        dense_rows=[batch, chunk],
        hidden=skeleton.hidden,
        load_bytes_per_s=load_bytes_per_s,
    )


def render(forecast: Forecast) -> list[Table]:
    """Tables for a rich console: memory, machine, speed."""
    return [_memory_table(forecast), _machine_table(forecast), _speed_table(forecast)]


def _memory_table(forecast: Forecast) -> Table:
    memory = forecast.memory
    table = Table(title=f"{forecast.source}: {verdict(forecast)}", title_justify="left")
    table.add_column("memory")
    table.add_column("size", justify="right")
    table.add_column("", overflow="fold")
    share = (
        f"{forecast.num_experts} experts, {forecast.expert_bytes / max(1, forecast.total_bytes):.0%} of it"
    )
    table.add_row(
        "checkpoint", format_bytes(forecast.total_bytes), f"{forecast.model_type}, {forecast.dtype}"
    )
    table.add_row(
        "  experts", format_bytes(forecast.expert_bytes), f"{share}, top-{forecast.top_k} per token"
    )
    if forecast.disk_free_bytes is not None:
        remark = f"{forecast.disk_folder}; headers read so far: {format_bytes(forecast.fetched_bytes)}"
        table.add_row("free where it would go", format_bytes(forecast.disk_free_bytes), remark)
    table.add_section()
    for what, nbytes, remark in memory.rows():
        table.add_row(what, format_bytes(nbytes), remark)
    table.add_row(
        "in all", format_bytes(memory.total_bytes), f"{memory.resident_share:.0%} of the experts resident"
    )
    table.add_row(
        "smallest that works", format_bytes(forecast.smallest_budget), f"{forecast.smallest_budget >> 20}MiB"
    )
    return table


def verdict(forecast: Forecast) -> str:
    """One line: does it fit?"""
    memory = forecast.memory
    if forecast.fits:
        given = f" in {format_bytes(memory.budget_bytes)}" if memory.budget_bytes is not None else ""
        free = " (what is free)" if given and forecast.settings.memory is None else ""
        return f"fits{given}{free}, {memory.slots_per_layer:.1f} experts per layer"
    assert memory.budget_bytes is not None
    return (
        f"does not fit in {format_bytes(memory.budget_bytes)}; the smallest budget that works is "
        f"{forecast.smallest_budget >> 20}MiB, and the speeds below are for that"
    )


def _machine_table(forecast: Forecast) -> Table:
    machine, settings = forecast.machine, forecast.settings
    table = Table(title=f"this machine, {machine.threads} threads", title_justify="left")
    table.add_column("measured")
    table.add_column("", justify="right")
    where = "from RAM" if settings.store == "ram" else f"disk of {forecast.disk_folder}"
    if settings.link is not None:
        where += f", held to {format_bandwidth(parse_bandwidth(settings.link))}"
    table.add_row(f"loading, {where}", f"{machine.load_bytes_per_s / 1e9:.2f} GB/s")
    table.add_row(
        "weights multiplied by one row, experts", f"{machine.expert.memory_bytes_per_s / 1e9:.1f} GB/s"
    )
    table.add_row(
        "weights multiplied by one row, dense", f"{machine.dense.memory_bytes_per_s / 1e9:.1f} GB/s"
    )
    rows, cost = machine.dense.rows[-1], machine.dense.seconds_per_byte[-1]
    itemsize = getattr(torch, forecast.dtype).itemsize
    table.add_row(f"arithmetic, {rows} rows", f"{2 * rows / itemsize / cost / 1e9:.0f} GFLOP/s")
    table.add_row("overhead per layer", f"{machine.layer_overhead_s * 1e3:.2f} ms")
    table.add_row("overhead per expert", f"{machine.expert_overhead_s * 1e6:.0f} us")
    table.add_row("overhead per token", f"{machine.row_s * 1e6:.1f} us")
    return table


def _speed_table(forecast: Forecast) -> Table:
    settings = forecast.settings
    chunk = prompt_tokens(settings)
    table = Table(
        title=f"expected: {settings.batch} sequence(s) after {forecast.past} tokens, prompts of {chunk}",
        title_justify="left",
        caption=hit_ratio_note(forecast),
        caption_justify="left",
    )
    for column in ("hit ratio", "", "read per token", "decode tok/s", "bound", "prefill tok/s", "bound"):
        table.add_column(column, justify="left" if column in ("", "bound") else "right")
    for speed in forecast.speeds:
        table.add_row(
            f"{speed.hit_ratio:.2f}", speed.label, format_bytes(speed.bytes_per_token),
            f"{speed.decode_tokens_per_s:.3g}", speed.decode.bound,
            f"{speed.prefill_tokens_per_s:.3g}", speed.prefill.bound,
        )  # fmt: skip
    return table


def hit_ratio_note(forecast: Forecast) -> str:
    """Which assumption the first row makes."""
    share = forecast.memory.resident_share
    bound = f"routing that favours no expert finds the resident share, {share:.2f}: the lower bound"
    if forecast.expected.label == "given":
        return f"The hit ratio was given; {bound}."
    return (
        f"estimate: {share:.2f} ** {TYPICAL_EXPONENT} = {forecast.expected.hit_ratio:.2f}, typical of LRU in "
        f"each layer on text ({bound}); prompts {forecast.expected.prefill_hit_ratio:.2f}. Measure yours with "
        f"--stats, give it with --hit-ratio."
    )


def run_plan(
    source: str,
    settings: Settings,
    *,
    revision: str | None = None,
    hit_ratio: float | None = None,
    past: int = 0,
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """The command: print the forecast. Returns the exit status, 1 when the model does not fit."""
    forecast = plan_model(source, settings, revision=revision, hit_ratio=hit_ratio, past=past)
    console = console or Console()
    if as_json:
        console.print_json(json.dumps(forecast.to_dict()))
    else:
        for table in render(forecast):
            console.print(table)
    return 0 if forecast.fits else 1
