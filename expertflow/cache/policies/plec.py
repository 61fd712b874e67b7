"""PLEC, predictive locality-aware expert caching (paper 3.4.1): as the paper tells it, and as we generalise it."""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from math import ceil, log

from expertflow.cache.policies.base import Forecast, Policy
from expertflow.core import ExpertId, MoEShape

_LIKELY = 0.5  # predicted at all, in the paper's sense


class PaperPLEC(Policy):
    """Slots are divided over the layers by predicted demand and freed layer by layer (the paper's Fig. 5).

    Before a pass: each layer's part of the slots goes to its most probable experts. While it runs, what layers
    that are done leave free goes to the other predicted experts, soonest first.
    """

    looks_ahead = True

    def __init__(self, shape: MoEShape, num_slots: int):
        super().__init__(shape, num_slots)
        self._residents: dict[ExpertId, None] = {}  # least recently used first
        self._layer = -1  # the one that opened last in this pass
        self._p: dict[ExpertId, float] = {}  # of those predicted, while their layer has not opened
        self._order: list[ExpertId] = []  # whom to fetch, soonest first

    def loaded(self, expert: ExpertId) -> None:
        self._residents[expert] = None

    def used(self, expert: ExpertId) -> None:
        del self._residents[expert]
        self._residents[expert] = None

    def evicted(self, expert: ExpertId) -> None:
        del self._residents[expert]

    def begin_pass(self, forecast: Forecast | None) -> None:
        self._layer, self._p = -1, {}
        for layer, p_E in enumerate(forecast.p_LE if forecast is not None else ()):
            self._p.update({ExpertId(layer, e): p for e, p in enumerate(p_E) if p >= _LIKELY})
        self._plan()

    def refine(self, layer: int, p_E: Sequence[float]) -> None:
        self._p = {expert: p for expert, p in self._p.items() if expert.layer != layer}
        self._p.update({ExpertId(layer, e): p for e, p in enumerate(p_E) if p >= _LIKELY})
        self._plan()

    def layer_opened(self, layer: int, needed: Sequence[ExpertId]) -> None:
        self._layer = layer
        self._p = {expert: p for expert, p in self._p.items() if expert.layer > layer}
        self._order = [expert for expert in self._order if expert.layer > layer]

    def _plan(self) -> None:
        ranked = sorted(self._p, key=lambda expert: (expert.layer, -self._p[expert], expert))
        first: list[ExpertId] = []
        for layer in range(self.shape.num_layers):
            own = [expert for expert in ranked if expert.layer == layer]
            # Rounded up, as in the figure: 3 + 2 predicted for 4 slots become 3 + 1.
            part = ceil(self.num_slots * len(own) / max(1, len(ranked)))
            first += own[: min(part, self.num_slots - len(first))]
        self._order = first + [expert for expert in ranked if expert not in set(first)]

    def next_prefetch(self, residents: Collection[ExpertId]) -> ExpertId | None:
        return next((expert for expert in self._order if expert not in residents), None)

    def choose_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        return min((e for e in self._residents if e in offered), key=self._keep, default=None)

    def choose_prefetch_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        victim = self.choose_victim(offered, wanted)
        return None if victim in self._p else victim

    def _keep(self, expert: ExpertId) -> tuple[float, float, float]:
        """The smallest goes first: layers that ran, the last one first; then the unpredicted; then the latest."""
        if expert.layer <= self._layer:
            return 0, -expert.layer, 0
        if expert not in self._p:
            return 1, -expert.layer, 0
        return 2, -expert.layer, self._p[expert]


class NextUse(Policy):
    """Act as Belady would on what is expected: PLEC with one pool of slots for all layers.

    When an expert is needed next is expected from the forecast of this pass and, beyond it, of later passes; of what
    nothing was said, from how often it was used: the mean of two running frequencies, one that forgets slowly and one
    that forgets fast, so that whoever is popular stays, and whoever was here last (docs/log.md). Whoever is needed
    farthest goes. Prefetches come in order of execution, then probability, two layers ahead, as long as the expected
    use comes sooner than the victim's. Where the next pass is another unit's, and predicted already, the two layers may
    be its first.

    What is uncertain counts as the certain use that is worth as much, a use being worth `discount` of what it is
    worth one pass earlier.
    """

    looks_ahead = True
    binds_late = True
    keep_slow, keep_fast = 0.99, 0.8  # by pass, of the running frequencies of use
    share_fast = 0.25  # in their mean
    start_rate = 0.2  # what is assumed of every expert
    start_passes = 6.0  # that this counts for
    least_likely = 0.5  # guesses below it cost bytes and gained no time (docs/log.md)
    discount = 0.7
    # What lies ready for long takes the place of something that would have been used again; further ahead cost bytes
    # and gained no time (docs/log.md).
    layers_ahead = 2

    def __init__(self, shape: MoEShape, num_slots: int):
        super().__init__(shape, num_slots)
        layers = range(shape.num_layers)
        self._layer = -1  # the one that opened last in this pass
        self._residents: list[set[ExpertId]] = [set() for _ in layers]
        self._slow, self._fast = (
            [
                _Frequency(keep, experts, self.start_rate, self.start_passes)
                for experts in shape.experts_per_layer
            ]
            for keep in (self.keep_slow, self.keep_fast)
        )
        self._rate = [[self.start_rate] * experts for experts in shape.experts_per_layer]  # the mean of both
        self._when: list[list[float]] = [
            [] for _ in layers
        ]  # position of the next use, from this pass's start
        self._p: list[Sequence[float]] = [[] for _ in layers]
        self._beyond: Sequence[Sequence[float]] | None = None  # what was said of passes after this one
        self._later: Sequence[Sequence[float]] | None = None  # the same, with what is known of the next
        self._next: Sequence[Sequence[float]] | None = None  # of the pass after this one
        self._foretold = False  # whether anything was said of this pass
        self._farthest: list[list[ExpertId] | None] = [None for _ in layers]  # residents, whom to evict first
        self._wishes: list[list[ExpertId] | None] = [None for _ in layers]
        for layer in layers:
            self._expect(layer)

    def loaded(self, expert: ExpertId) -> None:
        self._residents[expert.layer].add(expert)
        self._farthest[expert.layer] = None

    def used(self, expert: ExpertId) -> None:
        return None

    def evicted(self, expert: ExpertId) -> None:
        self._residents[expert.layer].remove(expert)
        self._farthest[expert.layer] = None

    def begin_pass(self, forecast: Forecast | None) -> None:
        self._layer = -1
        self._next = None
        self._foretold = forecast is not None
        self._beyond = self._later = forecast.later_LE if forecast is not None else None
        for layer in range(self.shape.num_layers):
            self._p[layer] = forecast.p_LE[layer] if forecast is not None else []
            self._expect(layer)

    def refine(self, layer: int, p_E: Sequence[float]) -> None:
        self._p[layer] = p_E
        self._foretold = True
        self._expect(layer)

    def expect_next(self, p_LE: Sequence[Sequence[float]]) -> None:
        self._next = p_LE
        self._foretold = True
        discount, later_LE = self.discount, []
        for layer in range(self.shape.num_layers):
            later_LE.append(
                [
                    log(p * discount + (1 - p) * discount ** max(later, 2.0)) / log(discount)
                    for p, later in zip(p_LE[layer], self._later_of(layer, self._beyond), strict=True)
                ]
            )
        self._later = later_LE
        for layer in range(self.shape.num_layers):
            self._expect(layer)

    def layer_opened(self, layer: int, needed: Sequence[ExpertId]) -> None:
        if layer <= self._layer:  # nobody said that a pass began
            self.begin_pass(None)
        self._layer = layer
        used = [expert.expert for expert in needed]
        slow_E, fast_E = self._slow[layer].after(used), self._fast[layer].after(used)
        share = self.share_fast
        self._rate[layer] = [
            (1 - share) * slow + share * fast for slow, fast in zip(slow_E, fast_E, strict=True)
        ]
        self._expect(layer)

    def _expect(self, layer: int) -> None:
        """Say anew when each expert of this layer is needed next."""
        num_layers = self.shape.num_layers
        rate_E, p_E, later_E = self._rate[layer], self._p[layer], self._later_of(layer, self._later)
        if layer <= self._layer:
            self._when[layer] = [layer + num_layers * later for later in later_E]
        else:
            discount, per_pass = self.discount, num_layers / log(self.discount)
            self._when[layer] = [
                layer + per_pass * log(p + (1 - p) * discount**later)
                for p, later in zip(p_E or rate_E, later_E, strict=True)
            ]
        self._farthest[layer] = self._wishes[layer] = None

    def _later_of(self, layer: int, said_LE: Sequence[Sequence[float]] | None) -> Sequence[float]:
        """Passes from this one to the use after it; where nothing was said, by how often experts were used lately."""
        if said_LE is not None and said_LE[layer]:
            return said_LE[layer]
        return [1 / max(rate, 0.01) for rate in self._rate[layer]]

    def choose_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        victim, farthest = None, -1.0
        for layer, when_E in enumerate(self._when):
            order = self._farthest[layer]
            if order is None:
                order = sorted(self._residents[layer], key=lambda e: (-when_E[e.expert], e.expert))
                self._farthest[layer] = order
            for expert in order:
                if when_E[expert.expert] <= farthest:
                    break
                if expert in offered:
                    victim, farthest = expert, when_E[expert.expert]
                    break
        return victim

    def next_prefetch(self, residents: Collection[ExpertId]) -> ExpertId | None:
        num_layers, looked = self.shape.num_layers, 0
        for position in range(self._layer + 1, self._layer + 1 + num_layers):
            if looked == self.layers_ahead or (position >= num_layers and self._next is None):
                break
            layer = position % num_layers
            wishes = self._wishes_of(layer)
            # An encoder does not run while its decoder decodes: nothing is expected there, and it takes no time.
            looked += bool(wishes) or any(self._soonest_p(layer))
            for expert in wishes:
                if expert not in residents:
                    return expert
        return None

    @property
    def content(self) -> bool:
        return not self._foretold

    def _wishes_of(self, layer: int) -> list[ExpertId]:
        wishes = self._wishes[layer]
        if wishes is None:
            p_E = self._soonest_p(layer)
            likely = [e for e, p in enumerate(p_E) if p >= self.least_likely]
            wishes = [ExpertId(layer, e) for e in sorted(likely, key=lambda e: (-p_E[e], e))]
            self._wishes[layer] = wishes
        return wishes

    def _soonest_p(self, layer: int) -> Sequence[float]:
        """Of the layer's next turn: in this pass, or in the next one, of which nothing may be known."""
        if layer > self._layer:
            return self._p[layer]
        return self._next[layer] if self._next is not None else []

    def choose_prefetch_victim(self, offered: Container[ExpertId], wanted: ExpertId) -> ExpertId | None:
        victim = self.choose_victim(_NotFetchedBefore(self, offered, wanted), wanted)
        if (
            victim is None
            or self._when[victim.layer][victim.expert] <= self._when[wanted.layer][wanted.expert]
        ):
            return None
        return victim

    def fetched_before(self, expert: ExpertId, wanted: ExpertId) -> bool:
        """Whether `expert` would be fetched as well, and before `wanted`."""
        turn, wanted_turn = self._turn(expert.layer), self._turn(wanted.layer)
        if turn > wanted_turn:
            return False
        p_E = self._soonest_p(expert.layer)
        p = p_E[expert.expert] if p_E else 0.0
        if p < self.least_likely:
            return False
        return turn < wanted_turn or (-p, expert) < (-p_E[wanted.expert], wanted)

    def _turn(self, layer: int) -> int:
        """When the layer opens next, counted from this pass's first."""
        return layer if layer > self._layer else layer + self.shape.num_layers


class _Frequency:
    """How often a layer's experts were used lately, in shares of its passes.

    Sums over counted passes: a mean that starts somewhere and keeps .99 of itself would believe in its start for a
    hundred passes (docs/log.md).
    """

    def __init__(self, keep: float, experts: int, start_rate: float, start_passes: float):
        self._keep, self._passes = keep, start_passes
        self._used_E = [start_rate * start_passes] * experts

    def after(self, used: Sequence[int]) -> list[float]:
        """rate_E once another pass has used these."""
        keep = self._keep
        self._passes = passes = keep * self._passes + 1
        self._used_E = used_E = [keep * uses for uses in self._used_E]
        for expert in used:
            used_E[expert] += 1
        return [uses / passes for uses in used_E]


class _NotFetchedBefore(Container[ExpertId]):
    """`offered` without those that would be fetched again before `wanted`: the two would push each other out for ever.

    Whom to evict goes by the expected use, in which probability counts; what to fetch goes by layers first.
    """

    def __init__(self, policy: NextUse, offered: Container[ExpertId], wanted: ExpertId):
        self.policy, self.offered, self.wanted = policy, offered, wanted

    def __contains__(self, expert: object) -> bool:
        return (
            isinstance(expert, ExpertId)
            and expert in self.offered
            and not self.policy.fetched_before(expert, self.wanted)
        )
