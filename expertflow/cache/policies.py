"""Policies: which expert to evict. Pure decisions: no tensor, thread, file or clock.

A new policy costs two edits: its class and its line in POLICIES; the conformance suite finds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Container, Iterator

from expertflow.core import ExpertId, MoEShape


class Policy(ABC):
    """What the cache tells a policy, and the one question it asks.

    The cache calls `loaded` when an expert gets a slot, `used` when a layer that needs it opens, and
    `evicted` when it loses the slot.
    """

    def __init__(self, shape: MoEShape, num_slots: int):
        self.shape = shape
        self.num_slots = num_slots

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


class LayerLRU(Policy):
    """Least recently used within each layer's share of the slots (Cache-MoE's rule, paper 4.2.1).

    Shares are equal; slots that a layer does not fill yet are lent to others and taken back first.
    A single LRU order over all layers would be worse than none: layers run in a cycle, so whatever is
    least recently used is what runs soonest, and with fewer slots than one cycle needs it never hits.
    """

    def __init__(self, shape: MoEShape, num_slots: int):
        super().__init__(shape, num_slots)
        num_layers = shape.num_layers
        bounds = [layer * num_slots // num_layers for layer in range(num_layers + 1)]
        self.share = [bounds[layer + 1] - bounds[layer] for layer in range(num_layers)]
        self._order: list[OrderedDict[ExpertId, None]] = [OrderedDict() for _ in range(num_layers)]

    def loaded(self, expert: ExpertId) -> None:
        self._order[expert.layer][expert] = None

    def used(self, expert: ExpertId) -> None:
        self._order[expert.layer].move_to_end(expert)

    def evicted(self, expert: ExpertId) -> None:
        del self._order[expert.layer][expert]

    def choose_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        for layer in self._layers_to_shrink(wanted.layer):
            for expert in self._order[layer]:
                if expert in offered:
                    return expert
        return None

    def prefers_waiting(self, offered: Container[ExpertId], wanted: ExpertId) -> bool:
        # A layer that needs more than its share (a prompt, a large batch) would take every slot of the
        # others while its own are in use, each layer in turn, and none would find anything. Two of its own
        # are enough to load one while another computes.
        own = self._order[wanted.layer]
        return len(own) >= max(2, self.share[wanted.layer]) and not any(expert in offered for expert in own)

    def _layers_to_shrink(self, wanted_layer: int) -> Iterator[int]:
        own_share_is_full = len(self._order[wanted_layer]) >= max(1, self.share[wanted_layer])
        if own_share_is_full:
            yield wanted_layer
        others = [layer for layer in range(len(self._order)) if layer != wanted_layer]
        # Who borrowed most gives first. Among equals: the layer that ran last, which is needed again last.
        num_layers = len(self._order)
        others.sort(
            key=lambda layer: (
                self.share[layer] - len(self._order[layer]),
                (wanted_layer - layer) % num_layers,
            )
        )
        yield from others
        if not own_share_is_full:
            yield wanted_layer


POLICIES: dict[str, type[Policy]] = {"lru": LayerLRU}
