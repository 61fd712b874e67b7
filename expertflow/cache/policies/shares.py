"""Policies that give every layer an equal share of the slots and evict within it: LRU and LFU.

No prediction; Cache-MoE (Eliseev and Mazur 2023; paper 4.2.1) is the first with blocking loads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator

from expertflow.cache.policies.base import Policy
from expertflow.core import ExpertId, MoEShape


class LayerShares(Policy):
    """Evicts within each layer's share of the slots.

    Shares are equal; slots that a layer does not fill yet are lent to others and taken back first.
    One order over all layers would be worse than none: layers run in a cycle, so whatever is
    least recently used is what runs soonest, and with fewer slots than one cycle needs it never hits.
    """

    def __init__(self, shape: MoEShape, num_slots: int):
        super().__init__(shape, num_slots)
        num_layers = shape.num_layers
        bounds = [layer * num_slots // num_layers for layer in range(num_layers + 1)]
        self.share = [bounds[layer + 1] - bounds[layer] for layer in range(num_layers)]
        # Least recently used first.
        self._order: list[OrderedDict[ExpertId, None]] = [OrderedDict() for _ in range(num_layers)]

    @abstractmethod
    def first_to_go(self, layer: int) -> Iterable[ExpertId]:
        """The residents of one layer, whom to evict first in front."""

    def loaded(self, expert: ExpertId) -> None:
        self._order[expert.layer][expert] = None

    def used(self, expert: ExpertId) -> None:
        self._order[expert.layer].move_to_end(expert)

    def evicted(self, expert: ExpertId) -> None:
        del self._order[expert.layer][expert]

    def choose_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        for layer in self._layers_to_shrink(wanted.layer):
            for expert in self.first_to_go(layer):
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


class LayerLRU(LayerShares):
    """Least recently used within each layer's share."""

    def first_to_go(self, layer: int) -> Iterable[ExpertId]:
        return self._order[layer]


class LayerLFU(LayerShares):
    """Least frequently used since it was loaded, within each layer's share; among equals the least recent.

    What was evicted is forgotten: the textbook's LFU, as in libCacheSim.
    """

    def __init__(self, shape: MoEShape, num_slots: int):
        super().__init__(shape, num_slots)
        self._uses: dict[ExpertId, int] = {}

    def loaded(self, expert: ExpertId) -> None:
        super().loaded(expert)
        self._uses[expert] = 0

    def used(self, expert: ExpertId) -> None:
        super().used(expert)
        self._uses[expert] += 1

    def evicted(self, expert: ExpertId) -> None:
        super().evicted(expert)
        del self._uses[expert]

    def first_to_go(self, layer: int) -> Iterable[ExpertId]:
        return sorted(self._order[layer], key=self._uses.__getitem__)  # stable: the least recent first


class CacheMoE(LayerLRU):
    """Cache-MoE as published: LRU in fixed shares, and arithmetic waits for all loads of its layer."""

    blocking = True
