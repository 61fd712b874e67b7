"""All predictors of a running model as one: asked before each decode step and at each layer, taught after it.

The online table and, where there are any, a trained predictor and look-ahead, mixed while serving; then what the
mixture says of the whole batch, with the running frequencies, as a forecast for the cache. Prompts are learnt from
and not forecast: they need nearly every expert. Knows nothing of models and caches.

`foresee` says of each row what can be said before anybody knows which rows run together: the scheduler groups by it,
and the pass then begins with it. It may be called from another thread while a pass runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from expertflow.predictor.baselines import used_by_any
from expertflow.predictor.combine import Combination, Later, Opinions, at_once
from expertflow.predictor.decoder import PathState
from expertflow.predictor.model import RoutingPathPredictor, prompts_of
from expertflow.predictor.next_use import HORIZONS
from expertflow.predictor.online_table import OnlineTokenTable
from expertflow.predictor.pass_forecast import PassForecast
from expertflow.predictor.protocol import LayerPredictor, PathContext, PathPredictor

TABLE_BYTES = 16 << 20
_PASSES = "passes"  # the lane of what is asked when a pass begins


class Expected(NamedTuple):
    """What is said before a pass: as cache.policies.Forecast, in tensors. Layers are the decoder's."""

    p_LE: Tensor
    later_LE: Tensor | None  # without a next-use head the cache goes by what was used


class Foreseen(NamedTuple):
    """What is said of N rows, one new position each, before their pass; by row, whoever they will run with."""

    said: Opinions
    absent_NCLE: Tensor | None = None  # of the next-use head, at each of HORIZONS

    @property
    def p_NLE(self) -> Tensor:
        """The probability that each row needs each expert."""
        return self.said.mixed_NLE

    def select(self, rows_N: Tensor) -> Foreseen:
        """Of these rows, in this order: indices or a mask."""
        absent_NCLE = None if self.absent_NCLE is None else self.absent_NCLE[rows_N]
        return Foreseen(self.said.select(rows_N), absent_NCLE)

    @staticmethod
    def join(parts: Sequence[Foreseen]) -> Foreseen:
        """Of all their rows, one part after the other; all are of one predictor."""
        absent = [part.absent_NCLE for part in parts if part.absent_NCLE is not None]
        return Foreseen(Opinions.join([part.said for part in parts]), torch.cat(absent) if absent else None)


class PassPredictor(Protocol):
    """What a running model asks: `begin`, then `ahead` at each layer, then `end` (or `forget`).

    One thread at a time runs passes. `foresee` may come from another one, one call at a time for each lane.
    """

    def begin(
        self,
        context: PathContext,
        origin_B: Tensor | None,
        foreseen: Foreseen | None = None,
        drafted_B1LE: Tensor | None = None,
    ) -> Expected | None:
        """What the pass over the new positions of `context` will need; None where nothing is said.

        origin_B: which row of the pass before each row continues (int64); None where not all of them were in it:
        texts begin, or `context` has the end of what was before. foreseen: what has been said of these very rows
        already, all of them real; then nobody is asked again. drafted_B1LE: what a draft of this pass said of each row.
        """
        ...

    def foresee(self, context: PathContext, origin_B: Tensor | None, lane: Hashable) -> Foreseen | None:
        """What can be said of rows before their pass; None where nothing is said.

        lane: calls of one lane follow the same sequences, and origin_B counts the rows of its last call.
        """
        ...

    def soon(self, foreseen: Foreseen) -> Tensor:
        """p_LE that a pass to come, of these rows, needs the experts. May be called from another thread."""
        ...

    def profile(self, ids_T: Tensor) -> Tensor | None:
        """p_LE: how often a text of such tokens needs each expert, before it runs; None where nothing is said.

        May be called from another thread.
        """
        ...

    def ahead(self, layer: int, hidden_ND: Tensor, routes_NK: Tensor) -> Tensor | None:
        """What entered MoE block `layer` at the N real new positions, and what its router chose -> p_E that the pass
        needs the experts of the next layer. None where nothing is said."""
        ...

    def end(self, context: PathContext, routes_BSLK: Tensor, later: Later = at_once) -> None:
        """The pass is over: learn from what the routers chose at the new positions.

        later: who does what the next pass need not wait for.
        """
        ...

    def learn(self, context: PathContext, routes_BSLK: Tensor, later: Later = at_once) -> None:
        """A pass over other sequences ran beside the one that has ended (a prompt): learn from it too."""
        ...

    def forget(self) -> None:
        """The pass that began did not come to its end."""
        ...


class ServingPredictor:
    """A PassPredictor. Everything it learns is in bounded memory: see `num_bytes`."""

    def __init__(
        self,
        layers: int,
        num_experts: int,
        top_k: int,
        trained: RoutingPathPredictor | None = None,
        ahead: LayerPredictor | None = None,
        drafts: bool = False,
    ):
        """drafts: `begin` will be given what drafts said."""
        self.trained = trained
        table = OnlineTokenTable(layers, num_experts, top_k, TABLE_BYTES)
        sources: list[PathPredictor] = [table] if trained is None else [trained, table]
        self._share = top_k / num_experts
        self.drafts = drafts
        if drafts:
            sources.append(_Drafts())
        self.combination = Combination(sources, layers, num_experts, ahead)
        self.has_head = trained is not None and trained.next_use_head is not None
        self.expected = PassForecast(layers, num_experts, top_k, True, self.has_head)
        self.num_experts = num_experts
        self._states: dict[Hashable, PathState] = {}  # of the trained predictor, by lane
        self._forecast_made = False

    @staticmethod
    def num_bytes(layers: int, num_experts: int) -> int:
        """Without the trained predictor and the routers that look-ahead asks, as float32."""
        passes = 1 + max(HORIZONS)
        features = 3 + 3  # of PassForecast, for this pass and each horizon
        per_expert = 4 * (passes * (1 + len(HORIZONS)) * features + 8)
        return TABLE_BYTES + layers * num_experts * per_expert

    def begin(
        self,
        context: PathContext,
        origin_B: Tensor | None,
        foreseen: Foreseen | None = None,
        drafted_B1LE: Tensor | None = None,
    ) -> Expected | None:
        if origin_B is None and context.routes_BTLK is None:
            self.forget()
        if context.num_new > 1:
            if self.trained is not None and self._advance(self.trained, context, origin_B, _PASSES) is None:
                return None
            self.forget()
            return None
        if foreseen is None:
            foreseen = self._foresee(context, origin_B, _PASSES, drafted_B1LE)
            if foreseen is None:
                return None
            if context.new_mask_BS is not None:
                foreseen = foreseen.select(_real_rows(context))
        else:
            self._states.pop(_PASSES, None)  # it has not seen this pass
        self.combination.adopt(foreseen.said)
        absent_CLE = None if foreseen.absent_NCLE is None else foreseen.absent_NCLE.prod(0)
        now_LE, later_LE = self.expected.forecast(_any_row(foreseen.p_NLE), absent_CLE)
        self._forecast_made = True
        return Expected(now_LE, later_LE)

    def foresee(self, context: PathContext, origin_B: Tensor | None, lane: Hashable) -> Foreseen | None:
        return self._foresee(context, origin_B, lane, None)

    def _foresee(
        self, context: PathContext, origin_B: Tensor | None, lane: Hashable, drafted_B1LE: Tensor | None
    ) -> Foreseen | None:
        assert context.num_new == 1, "rows of one new position"
        answers: dict[int, Tensor] = {}
        absent_BCLE = None
        if self.drafts:
            if drafted_B1LE is None:  # no draft of this pass: what says nothing
                shape = (
                    len(context.target_BT),
                    1,
                    self.combination.before.weight_LCM.shape[0],
                    self.num_experts,
                )
                drafted_B1LE = torch.full(shape, self._share)
            answers[len(self.combination.sources) - 1] = drafted_B1LE
        if self.trained is not None:
            states_B1D = self._advance(self.trained, context, origin_B, lane)
            if states_B1D is None:
                return None
            answers[0], absent_BCLE = self._speak(self.trained, context, states_B1D)
        return Foreseen(self.combination.consult(context, answers), absent_BCLE)

    def soon(self, foreseen: Foreseen) -> Tensor:
        return self.expected.peek(_any_row(foreseen.p_NLE))

    def profile(self, ids_T: Tensor) -> Tensor | None:
        return self.combination.profile(ids_T)

    def ahead(self, layer: int, hidden_ND: Tensor, routes_NK: Tensor) -> Tensor | None:
        if not self._forecast_made:
            return None
        p_NE = self.combination.observe(layer, hidden_ND, routes_NK)
        return None if p_NE is None else _any_row(p_NE)

    def end(self, context: PathContext, routes_BSLK: Tensor, later: Later = at_once) -> None:
        self.combination.observe_pass(context, routes_BSLK, later)
        if self._forecast_made:
            routes_BLK = routes_BSLK[:, 0]
            if context.new_mask_BS is not None:
                routes_BLK = routes_BLK[_real_rows(context)]
            self.expected.observe(used_by_any(routes_BLK, self.num_experts))
            self._forecast_made = False

    def learn(self, context: PathContext, routes_BSLK: Tensor, later: Later = at_once) -> None:
        self.combination.observe_pass(context, routes_BSLK, later)

    def forget(self) -> None:
        self.combination.forget()
        self.expected.end_of_text()
        self._forecast_made = False

    def _advance(
        self, trained: RoutingPathPredictor, context: PathContext, origin_B: Tensor | None, lane: Hashable
    ) -> Tensor | None:
        """states_BSD of the new positions, or None where the trained predictor lacks what the encoder read."""
        new = context.num_new
        state = None if origin_B is None else self._states.get(lane)
        if state is None:  # begin with all that is known of these texts
            context = replace(context, num_new=context.target_BT.shape[1])
        mask_BS = context.new_mask_BS
        if mask_BS is None:
            mask_BS = torch.ones_like(context.new_BS, dtype=torch.bool)
        with torch.inference_mode():
            if state is None:
                self._states.pop(lane, None)
                state = _start(trained, context, mask_BS)
                if state is None:
                    return None
            elif origin_B is not None and not torch.equal(origin_B, torch.arange(state.num_rows)):
                state = state.select(origin_B)
            self._states[lane] = state
            # Not `advance`: of a prompt the states alone are wanted, not what the heads say of each position.
            states_BSD = trained.decoder.advance(state, trained.embedding(context.new_BS), mask_BS)
            return states_BSD[:, -new:]

    def _speak(
        self, trained: RoutingPathPredictor, context: PathContext, states_B1D: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """p_B1LE, and absent_BCLE where it has a next-use head."""
        with torch.inference_mode():
            p_B1LE = trained.target_heads(states_B1D, context.new_BS).sigmoid()
            absent_BCLE = None
            if self.has_head:
                # A longer horizon includes a shorter.
                absent_BCLE = 1 - trained.next_use_logits(states_B1D)[:, 0].sigmoid().cummax(1).values
        # Copies: tensors made in inference mode could not be learnt from outside of it.
        return p_B1LE.clone(), None if absent_BCLE is None else absent_BCLE.clone()


class _Drafts:
    """Stands for the draft among the sources of a combination, which always gets its answers."""

    def predict(self, context: PathContext) -> Tensor:
        raise AssertionError("a draft is made by who runs the model")


def _start(trained: RoutingPathPredictor, context: PathContext, mask_BS: Tensor) -> PathState | None:
    if trained.encoder is None:
        return trained.start(None, mask_BS[:, :0])
    if trained.reads_source:
        if context.source_BS is None:
            return None
        return trained.start(context.source_BS, context.source_mask_BS)
    return trained.start(*prompts_of(context.new_BS, mask_BS, mask_BS.sum(1)))


def _real_rows(context: PathContext) -> Tensor:
    """Of one new position each."""
    mask_BS = context.new_mask_BS
    return torch.ones(len(context.target_BT), dtype=torch.bool) if mask_BS is None else mask_BS[:, -1]


def _any_row(p_NXE: Tensor) -> Tensor:
    """The probability that at least one of N rows needs it."""
    if len(p_NXE) == 1:
        return p_NXE[0]
    return 1 - (1 - p_NXE).prod(0)
