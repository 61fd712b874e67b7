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
    later_LE: passes until its next use after this pass (1: the next pass); None: not known, an empty row: not of this
    layer. Where that is uncertain, the number worth as much: the logarithm of the expected discount ** passes, to the
    base of NextUse's discount.
    """

    p_LE: Sequence[Sequence[float]]
    later_LE: Sequence[Sequence[float]] | None = None

    def within_bounds(self, shape: MoEShape) -> Forecast:
        """The same with nothing in it that a policy could stumble over, whatever a predictor has said.

        An unlimited distance, or one that is no number, would have policies compare what cannot be compared and
        exchange two experts for ever. Raises ValueError for a forecast of another shape.
        """
        for rows_LE in (self.p_LE, self.later_LE):
            if rows_LE is not None and len(rows_LE) != shape.num_layers:
                raise ValueError(f"a forecast of {len(rows_LE)} layers, and the model has {shape.num_layers}")
        experts_L = shape.experts_per_layer
        p_LE = [probabilities(p_E, experts) for p_E, experts in zip(self.p_LE, experts_L, strict=True)]
        if self.later_LE is None:
            return Forecast(p_LE)
        later_LE = []
        for later_E, experts in zip(self.later_LE, experts_L, strict=True):
            if later_E:
                _verify_length(later_E, experts)
            later_LE.append([max(1.0, min(FARTHEST, later)) for later in later_E])  # nan becomes FARTHEST
        return Forecast(p_LE, later_LE)


FARTHEST = 100.0  # passes ahead: as good as never, and a power of any discount that is still above zero


def probabilities(p_E: Sequence[float], experts: int) -> list[float]:
    """p_E between 0 and 1, nan as 0. Raises ValueError unless it has so many."""
    _verify_length(p_E, experts)
    return [min(1.0, max(0.0, p)) for p in p_E]


def _verify_length(values_E: Sequence[float], experts: int) -> None:
    if len(values_E) != experts:
        raise ValueError(f"a forecast of {len(values_E)} experts for a layer of {experts}")


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

    def expect_next(self, p_LE: Sequence[Sequence[float]]) -> None:
        """What the pass after the one that runs will need: that of other sequences, whose newest tokens are known."""
        return None

    def layer_opened(self, layer: int, needed: Sequence[ExpertId]) -> None:
        """The router of `layer` has spoken. Comes before `used` and before any room is made for `needed`."""
        return None

    def next_prefetch(self, residents: Collection[ExpertId]) -> ExpertId | None:
        """The expert outside of `residents` to fetch next, or None to leave the link idle. Changes nothing."""
        return None

    @property
    def content(self) -> bool:
        """Whether it will name no prefetch before it is told of a pass, or something better of a layer."""
        return not self.looks_ahead

    def choose_prefetch_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        """As choose_victim, for a prefetch of `wanted`: None also where whoever must go is needed sooner."""
        return self.choose_victim(offered, wanted)
