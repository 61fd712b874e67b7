"""The memory budget: where every byte goes, and how many expert slots that leaves.

The arithmetic is pure, so that `plan` (from headers alone) and the loader (with the process at hand)
share it. A budget covers dense weights, slots, KV cache and scratch; on CPU the interpreter and the
libraries too, on an accelerator what torch has reserved there before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import psutil

from expertflow.config import Settings, format_bytes, parse_bytes
from expertflow.early_memory import EARLY

# Allocator slack, thread stacks, library pages first touched by the first forward pass, and the kernels that
# oneDNN compiles for each matrix shape. Measured beyond the sums below, with 0.5 GB of Qwen2-MoE under
# 800 MiB (2026-11): 57 MiB of anonymous memory and 23 MiB of library pages; up to 130 MiB after 256 tokens.
SLACK_BYTES = 160 * 2**20
MIN_SLOTS = 2
# Python objects per expert: spans, placements, counters (measured: 3.4 KiB at 480 experts).
BOOKKEEPING_BYTES_PER_EXPERT = 4096


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What a model needs, whatever the budget."""

    dense_bytes: int  # parameters and buffers that are no routed expert
    num_experts: int  # over all layers
    num_moe_layers: int
    slot_bytes: int
    staging_bytes: int  # the loader's own buffers, when weights are cast on their way in
    kv_bytes_per_token: int
    scratch_bytes_per_token: int  # while a prompt chunk runs
    scratch_bytes_per_sequence: int  # logits of the last token, in several copies


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the budget goes. `num_slots` experts are held at once."""

    model: ModelBytes
    budget_bytes: int | None  # None when the number of slots was given instead
    process_bytes: int  # interpreter, libraries and whatever the process holds already
    kv_bytes: int
    scratch_bytes: int
    num_slots: int
    predictor_bytes: int = 0  # what prefetch by prediction holds
    on_accelerator: bool = False  # all of it is of a device's memory

    @property
    def fixed_bytes(self) -> int:
        """All but the slots."""
        return (
            self.process_bytes
            + self.model.dense_bytes
            + self.kv_bytes
            + self.scratch_bytes
            + self.model.staging_bytes
            + self.predictor_bytes
        )

    @property
    def slots_bytes(self) -> int:
        return self.num_slots * self.model.slot_bytes

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.slots_bytes

    @property
    def slots_per_layer(self) -> float:
        return self.num_slots / self.model.num_moe_layers

    @property
    def resident_share(self) -> float:
        """The part of all experts that fits, 0 to 1."""
        return min(1.0, self.num_slots / self.model.num_experts)

    def smallest_budget(self) -> int:
        """The least that runs at all, rounded up to whole MiB."""
        need = self.fixed_bytes + MIN_SLOTS * self.model.slot_bytes
        return -(-need // 2**20) * 2**20

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) for people."""
        held = "held on the device before" if self.on_accelerator else "interpreter and libraries"
        return [
            (held, self.process_bytes, "measured now"),
            ("dense weights", self.model.dense_bytes, "attention, embeddings, shared experts, routers"),
            ("KV cache", self.kv_bytes, f"{format_bytes(self.model.kv_bytes_per_token)} per token"),
            ("scratch", self.scratch_bytes + self.model.staging_bytes, "activations, logits, slack"),
            *(
                [("predictor", self.predictor_bytes, "tables, routers, weights")]
                if self.predictor_bytes
                else []
            ),
            (
                "expert slots",
                self.slots_bytes,
                f"{self.num_slots} of {self.model.num_experts} experts, "
                f"{format_bytes(self.model.slot_bytes)} each, {self.slots_per_layer:.1f} per layer",
            ),
        ]


def plan_memory(
    model: ModelBytes,
    settings: Settings,
    process_bytes: int,
    free_bytes: int,
    predictor_bytes: int = 0,
    on_accelerator: bool = False,
) -> MemoryPlan:
    """How many slots `settings` leave for experts.

    process_bytes: what the process holds before any weight is read. free_bytes: used as the budget when
    settings give neither memory nor cache_size. on_accelerator: both are of a device's memory. Raises
    ValueError with the arithmetic and the smallest budget that works when fewer than two slots remain.
    """
    kv_bytes = settings.context * settings.held * model.kv_bytes_per_token
    # A chunk of prompts may run beside the newest tokens of the unit's other sequences (joint execution).
    beside = settings.unit - settings.batch
    at_once = min(settings.prefill_chunk, settings.context) * settings.batch + beside
    scratch_bytes = (
        SLACK_BYTES
        + at_once * model.scratch_bytes_per_token
        + settings.unit * model.scratch_bytes_per_sequence
        + model.num_experts * BOOKKEEPING_BYTES_PER_EXPERT
    )
    if settings.cache_size is not None:
        slots = min(model.num_experts, max(MIN_SLOTS, round(settings.cache_size * model.num_moe_layers)))
        return MemoryPlan(
            model, None, process_bytes, kv_bytes, scratch_bytes, slots, predictor_bytes, on_accelerator
        )

    budget = parse_bytes(settings.memory) if settings.memory is not None else free_bytes
    empty = MemoryPlan(
        model, budget, process_bytes, kv_bytes, scratch_bytes, 0, predictor_bytes, on_accelerator
    )
    slots = (budget - empty.fixed_bytes) // model.slot_bytes
    if slots < MIN_SLOTS:
        lines = [f"  {format_bytes(nbytes):>9}  {what}" for what, nbytes, _ in empty.rows()[:-1]]
        free = "the free memory of the device" if on_accelerator else "the free memory"
        named = f"memory={settings.memory}" if settings.memory is not None else free
        raise ValueError(
            f"{named} ({format_bytes(budget)}) is too small: it leaves "
            f"{format_bytes(max(0, budget - empty.fixed_bytes))} for experts of {format_bytes(model.slot_bytes)} "
            f"each, and at least {MIN_SLOTS} must fit.\n" + "\n".join(lines) + "\n"
            f"  {format_bytes(MIN_SLOTS * model.slot_bytes):>9}  {MIN_SLOTS} expert slots\n"
            f"The smallest budget that works is {empty.smallest_budget() // 2**20}MiB; a smaller --context (now "
            f"{settings.context}), --batch (now {settings.batch}) or --prefill-chunk (now {settings.prefill_chunk}) "
            f"lowers it."
        )
    slots = min(slots, max(MIN_SLOTS, model.num_experts))
    return replace(empty, num_slots=slots)


def process_bytes() -> int:
    """Resident set of this process: anonymous memory and mapped libraries. Not what waits for dense weights.

    Those are counted as such.
    """
    early = EARLY.held_bytes()
    return psutil.Process().memory_info().rss - early


def free_bytes() -> int:
    """What this process may use: its own resident set plus 90 % of what the machine and its cgroups leave."""
    available = psutil.virtual_memory().available
    for limit_file, usage_file in _memory_groups():
        try:
            limit, usage = (int(file.read_text()) for file in (limit_file, usage_file))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
        # The page cache is charged to the group and given back when somebody needs the memory.
        cached = _file_cache_bytes(limit_file.with_name("memory.stat"))
        available = min(available, max(0, limit - usage + min(cached, usage)))
    return process_bytes() + int(available * 0.9)


def _memory_groups() -> Iterator[tuple[Path, Path]]:
    """Where the limit and the usage of this process's memory cgroup stand, and of each above it: all of them bind.

    A service or a job of a batch system has a group of its own. In a container its path may be the host's, and not
    be there; then the container's group is what is mounted as the root.
    """
    own: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            own.update(dict.fromkeys(controllers.split(","), group))
    for mount, controller, limit, usage in (
        ("/sys/fs/cgroup", "", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        path = PurePosixPath(own.get(controller, "/"))
        for group_path in (path, *path.parents):
            folder = Path(f"{mount}{group_path}")
            yield folder / limit, folder / usage


def _file_cache_bytes(memory_stat: Path) -> int:
    """Pages of files that a memory cgroup holds, children included; 0 where that is not said."""
    try:
        rows = dict(line.split() for line in memory_stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    version_1 = "total_inactive_file" in rows
    names = ("total_inactive_file", "total_active_file") if version_1 else ("inactive_file", "active_file")
    return sum(int(rows.get(name, 0)) for name in names)


def check_host_memory(nbytes: int, asked: str) -> None:
    """ValueError when so much RAM for experts, pinned for an accelerator, is not free. asked: the setting."""
    free = free_bytes() - process_bytes()
    if nbytes > free:
        raise ValueError(
            f"{asked} takes {format_bytes(nbytes)} of RAM, and {format_bytes(max(0, free))} are free; use "
            f"host_memory={max(1, free // 2**20)}MiB or less"
        )
