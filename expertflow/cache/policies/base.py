"""What a policy is: told what happens in the cache, it says whom to evict and, if it looks ahead, what to fetch.

Pure decisions: no tensor, thread, file or clock. Time is counted in visits: pass p opens MoE layer l at position
p * L + l.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass

from expertflow.core import ExpertId, MoEShape

Visit = tuple[int, Sequence[int]]  # a layer, and the experts that its router chose for the batch


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a predictor expects, said before a pass. Batch-level: of all rows together, 1 - prod(1 - p).

    p_LE: probability that the pass needs the expert.
    later_LE: passes until its next use after this pass, in expectation (1: the next pass); None: not known.
    """

    p_LE: Sequence[Sequence[float]]
    later_LE: Sequence[Sequence[float]] | None = None


class Policy(ABC):
    """What the cache tells a policy, and what it asks.

    The cache calls `loaded` when an expert gets a slot, `used` when a layer that needs it opens, and `evicted`
    when it loses the slot. A policy that looks ahead is also told of passes and layers, and is asked for
    `next_prefetch` whenever the link is about to run out of work.
    """

    looks_ahead = False  # whether next_prefetch ever names one
    binds_late = (
        False  # whether a demand may wait for its slot as long as the link has other demands to carry
    )
    blocking = False  # as published, arithmetic begins when all that a layer needs is there
    whole_layers = False  # as published, every expert of a layer is loaded, whoever is needed

    def __init__(self, shape: MoEShape, num_slots: int):
        self.shape = shape
        self.num_slots = num_slots

    @classmethod
    def slots_for(cls, shape: MoEShape, num_slots: int) -> int:
        """How many slots it takes where `num_slots` are offered: another number only where it cannot do with less."""
        return num_slots

    @abstractmethod
    def loaded(self, expert: ExpertId) -> None: ...

    @abstractmethod
    def used(self, expert: ExpertId) -> None: ...

    @abstractmethod
    def evicted(self, expert: ExpertId) -> None: ...

    @abstractmethod
    def choose_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        """An expert of `offered` to make room for `wanted`, or None when nothing known is offered.

        Does not change the policy: the cache calls `evicted` when it follows the advice.
        """

    def prefers_waiting(self, offered: Container[ExpertId], wanted: ExpertId) -> bool:
        """Whether the open layer should rather wait until it is done with an expert of its own than have
        another layer's evicted for `wanted`. True only if the layer holds experts that will come free."""
        return False

    def order_demands(self, missing: list[ExpertId]) -> list[ExpertId]:
        """In what order to load what the open layer misses. Who comes last is sure to stay when more are needed
        than there are slots."""
        return missing

    def begin_pass(self, forecast: Forecast | None) -> None:
        """A pass begins: its layers open one after the other. None: nobody predicts."""
        return None

    def refine(self, layer: int, p_E: Sequence[float]) -> None:
        """A better prediction of one layer of this pass that has not opened yet (look-ahead)."""
        return None

    def layer_opened(self, layer: int, needed: Sequence[ExpertId]) -> None:
        """The router of `layer` has spoken. Comes before `used` and before any room is made for `needed`."""
        return None

    def next_prefetch(self, residents: Collection[ExpertId]) -> ExpertId | None:
        """The expert outside of `residents` to fetch next, or None to leave the link idle. Changes nothing."""
        return None

    def choose_prefetch_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        """As choose_victim, for a prefetch of `wanted`: None also where whoever must go is needed sooner."""
        return self.choose_victim(offered, wanted)
