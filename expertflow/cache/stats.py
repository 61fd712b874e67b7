"""What the cache did, as plain counters: returned, never printed here."""

from __future__ import annotations

from collections.abc import Set
from copy import copy
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from expertflow.core import ExpertId, MoEShape


@dataclass(slots=True)
class LayerStats:
    hits: int = 0  # ready when the layer opened
    in_flight: int = 0  # a prefetch of it was on its way
    misses: int = 0  # had to be asked for when the layer opened
    bytes_read: int = 0
    stall_seconds: float = 0.0  # arithmetic waited for bytes
    open_seconds: float = 0.0  # from the router's word to the last expert released


@dataclass(slots=True)
class CacheStats:
    """Counters since the start or the last reset.

    uses_LE[l][e]: how often layer l needed expert e (once for a batch, however many tokens); misses_LE: how often it
    was not ready then; loads_LE: how often its bytes were read. read_seconds: time inside reads, so bytes_read /
    read_seconds is the bandwidth that was reached.
    """

    shape: MoEShape
    num_slots: int
    slot_bytes: int
    io_mode: str
    layers: list[LayerStats] = field(default_factory=list)
    uses_LE: list[list[int]] = field(default_factory=list)
    misses_LE: list[list[int]] = field(default_factory=list)
    loads_LE: list[list[int]] = field(default_factory=list)
    prefetches: int = 0  # loads begun on a hint or a forecast
    prefetches_useful: int = 0  # a layer asked for them before they were gone again
    prefetches_unused: int = 0  # evicted, cancelled or failed before a layer asked for them
    cancelled: int = 0
    read_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.layers = [LayerStats() for _ in self.shape.experts_per_layer]
        self.uses_LE = [[0] * experts for experts in self.shape.experts_per_layer]
        self.misses_LE = [[0] * experts for experts in self.shape.experts_per_layer]
        self.loads_LE = [[0] * experts for experts in self.shape.experts_per_layer]
        self.prefetches = self.prefetches_useful = self.prefetches_unused = self.cancelled = 0
        self.read_seconds = 0.0

    @property
    def hits(self) -> int:
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        """Needed but not ready: asked for too late, in flight or not at all."""
        return sum(layer.misses + layer.in_flight for layer in self.layers)

    @property
    def hit_ratio(self) -> float:
        needed = self.hits + self.misses
        return self.hits / needed if needed else 0.0

    @property
    def bytes_read(self) -> int:
        return sum(layer.bytes_read for layer in self.layers)

    @property
    def stall_seconds(self) -> float:
        return sum(layer.stall_seconds for layer in self.layers)

    def copied(self) -> CacheStats:
        """As they are now, while the cache goes on counting."""
        now = copy(self)
        now.layers = [copy(layer) for layer in self.layers]
        now.uses_LE = [list(uses_E) for uses_E in self.uses_LE]
        now.misses_LE = [list(misses_E) for misses_E in self.misses_LE]
        now.loads_LE = [list(loads_E) for loads_E in self.loads_LE]
        return now

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as of now: the counters and the ratios made from them."""
        return {
            "num_slots": self.num_slots,
            "slot_bytes": self.slot_bytes,
            "num_experts": self.shape.num_experts,
            "io_mode": self.io_mode,
            "hits": self.hits,
            "misses": self.misses,
            "hit_ratio": self.hit_ratio,
            "bytes_read": self.bytes_read,
            "read_seconds": self.read_seconds,
            "stall_seconds": self.stall_seconds,
            "prefetches": self.prefetches,
            "prefetches_useful": self.prefetches_useful,
            "prefetches_unused": self.prefetches_unused,
            "cancelled": self.cancelled,
            "layers": [asdict(layer) for layer in self.layers],
            "uses_LE": [list(of_E) for of_E in self.uses_LE],
            "misses_LE": [list(of_E) for of_E in self.misses_LE],
            "loads_LE": [list(of_E) for of_E in self.loads_LE],
        }


class Traffic(NamedTuple):
    """What crossed the link so far, and how long arithmetic waited for it."""

    bytes_read: int
    stall_seconds: float


@dataclass(frozen=True, slots=True)
class Observed:
    """A cache at one moment. Copies: nothing here changes. loading and ready: experts that hold a slot."""

    stats: CacheStats
    loading: Set[ExpertId]
    ready: Set[ExpertId]
