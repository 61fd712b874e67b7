"""Rivals that fetch for the next layer while this one computes: Cache-MoE's speculation, Pregated-MoE, SE-MoE."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Container, Sequence

from expertflow.cache.policies.base import Forecast, Policy
from expertflow.cache.policies.shares import LayerLRU
from expertflow.core import ExpertId, MoEShape


class NextLayer(LayerLRU):
    """LRU in shares, and prefetches of what the next layer of this pass is predicted to need."""

    looks_ahead = True

    def __init__(self, shape: MoEShape, num_slots: int):
        super().__init__(shape, num_slots)
        self._p_LE: list[Sequence[float]] = []
        self._guesses: list[ExpertId] = []

    @abstractmethod
    def guess(self, p_E: Sequence[float]) -> list[int]:
        """The experts to fetch, the most probable first."""

    def begin_pass(self, forecast: Forecast | None) -> None:
        self._p_LE = list(forecast.p_LE) if forecast is not None else []
        self._guesses = []  # nobody says anything of the first layer: there is no layer before it

    def refine(self, layer: int, p_E: Sequence[float]) -> None:
        if self._p_LE:
            self._p_LE[layer] = p_E
        self._guesses = [ExpertId(layer, expert) for expert in self.guess(p_E)]

    def layer_opened(self, layer: int, needed: Sequence[ExpertId]) -> None:
        after = layer + 1
        said = self._p_LE[after] if after < len(self._p_LE) else ()
        self._guesses = [ExpertId(after, expert) for expert in self.guess(said)]

    def next_prefetch(self, residents: Collection[ExpertId]) -> ExpertId | None:
        return next((expert for expert in self._guesses if expert not in residents), None)

    def choose_prefetch_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        victim = self.choose_victim(offered, wanted)
        return None if victim in self._guesses else victim


class SpeculativeCacheMoE(NextLayer):
    """Cache-MoE with its speculative loading: the two likeliest experts of the next layer, after this one's own."""

    blocking = True

    def guess(self, p_E: Sequence[float]) -> list[int]:
        return sorted(range(len(p_E)), key=lambda expert: (-p_E[expert], expert))[:2]


class Pregated(NextLayer):
    """Pregated-MoE (paper 4.2.1): the next layer's experts by a predictor, at the layer before; corrected here.

    As published the prediction replaces the router, which changes the output; here the router has the last word.
    """

    def guess(self, p_E: Sequence[float]) -> list[int]:
        likely = [expert for expert, p in enumerate(p_E) if p >= 0.5]
        return sorted(likely, key=lambda expert: (-p_E[expert], expert))


class LayerRing(Policy):
    """SE-MoE (paper 4.2.1): whole layers, streamed in order of execution through the slots there are.

    Whoever is needed farthest ahead in the ring goes: the experts of the layer that has just run.
    """

    looks_ahead = True
    whole_layers = True

    def __init__(self, shape: MoEShape, num_slots: int):
        super().__init__(shape, num_slots)
        self._layer = shape.num_layers - 1  # the one that opened last; the next pass begins after it
        # Of each layer, oldest first: whoever goes is found without looking at all.
        self._residents: list[dict[ExpertId, None]] = [{} for _ in range(shape.num_layers)]

    def loaded(self, expert: ExpertId) -> None:
        self._residents[expert.layer][expert] = None

    def used(self, expert: ExpertId) -> None:
        return None

    def evicted(self, expert: ExpertId) -> None:
        del self._residents[expert.layer][expert]

    def layer_opened(self, layer: int, needed: Sequence[ExpertId]) -> None:
        self._layer = layer

    def choose_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        for behind in range(self.shape.num_layers):  # the layer that has just run is farthest ahead
            for expert in self._residents[self._layer - behind]:
                if expert in offered:
                    return expert
        return None

    def next_prefetch(self, residents: Collection[ExpertId]) -> ExpertId | None:
        num_layers = self.shape.num_layers
        for ahead in range(1, num_layers):
            layer = (self._layer + ahead) % num_layers
            if len(self._residents[layer]) == self.shape.experts_per_layer[layer]:
                continue
            for number in range(self.shape.experts_per_layer[layer]):
                if (expert := ExpertId(layer, number)) not in residents:
                    return expert
        return None

    def choose_prefetch_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        victim = self.choose_victim(offered, wanted)
        if victim is None or self._layers_ahead(victim) <= self._layers_ahead(wanted):
            return None
        return victim

    def _layers_ahead(self, expert: ExpertId) -> int:
        return (expert.layer - self._layer - 1) % self.shape.num_layers


class FullLayerRing(LayerRing):
    """SE-MoE with room for two whole layers, which it needs to run as published; say how much memory that is."""

    @classmethod
    def slots_for(cls, shape: MoEShape, num_slots: int) -> int:
        widest = max(
            shape.experts_per_layer[layer] + shape.experts_per_layer[layer - 1]
            for layer in range(shape.num_layers)
        )
        return min(widest, shape.num_experts)
