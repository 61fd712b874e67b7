"""All predictors of a running model as one: asked before each decode step and at each layer, taught after it.

The online table and, where there are any, a trained predictor and look-ahead, mixed while serving; then what the
mixture says of the whole batch, with the running frequencies, as a forecast for the cache. Prompts are learnt from
and not forecast: they need nearly every expert. Knows nothing of models, caches and threads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from expertflow.predictor.baselines import multi_hot
from expertflow.predictor.combine import Combination
from expertflow.predictor.decoder import PathState
from expertflow.predictor.model import RoutingPathPredictor, prompts_of
from expertflow.predictor.next_use import HORIZONS
from expertflow.predictor.online_table import OnlineTokenTable
from expertflow.predictor.pass_forecast import PassForecast
from expertflow.predictor.protocol import LayerPredictor, PathContext, PathPredictor

TABLE_BYTES = 16 << 20


class Expected(NamedTuple):
    """What is said before a pass: as cache.policies.Forecast, in tensors. Layers are the decoder's."""

    p_LE: Tensor
    later_LE: Tensor


class PassPredictor(Protocol):
    """What a running model asks: `begin`, then `ahead` at each layer, then `end` (or `forget`)."""

    def begin(self, context: PathContext, origin_B: Tensor | None) -> Expected | None:
        """What the pass over the new positions of `context` will need; None where nothing is said.

        origin_B: which row of the pass before each row continues (int64); None where not all of them were in it:
        texts begin, or `context` has the end of what was before.
        """
        ...

    def ahead(self, layer: int, hidden_ND: Tensor, routes_NK: Tensor) -> Tensor | None:
        """What entered MoE block `layer` at the N real new positions, and what its router chose -> p_E that the pass
        needs the experts of the next layer. None where nothing is said."""
        ...

    def end(self, context: PathContext, routes_BSLK: Tensor) -> None:
        """The pass is over: learn from what the routers chose at the new positions."""
        ...

    def learn(self, context: PathContext, routes_BSLK: Tensor) -> None:
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
    ):
        self.trained = trained
        self._spoken = _Spoken()
        table = OnlineTokenTable(layers, num_experts, top_k, TABLE_BYTES)
        sources: list[PathPredictor] = [table] if trained is None else [self._spoken, table]
        self.combination = Combination(sources, layers, num_experts, ahead)
        self.has_head = trained is not None and trained.next_use_head is not None
        self.expected = PassForecast(layers, num_experts, top_k, True, self.has_head)
        self.num_experts = num_experts
        self._state: PathState | None = None
        self._forecast_made = False

    @staticmethod
    def num_bytes(layers: int, num_experts: int) -> int:
        """Without the trained predictor and the routers that look-ahead asks, as float32."""
        passes = 1 + max(HORIZONS)
        features = 3 + 3  # of PassForecast, for this pass and each horizon
        per_expert = 4 * (passes * (1 + len(HORIZONS)) * features + 8)
        return TABLE_BYTES + layers * num_experts * per_expert

    def begin(self, context: PathContext, origin_B: Tensor | None) -> Expected | None:
        if origin_B is None and context.routes_BTLK is None:
            self.forget()
        decoding = context.num_new == 1
        absent_CLE = None
        if self.trained is not None:
            states_BSD = self._advance(self.trained, context, origin_B)
            if states_BSD is None:
                return None
            if decoding:
                absent_CLE = self._speak(self.trained, context, states_BSD)
        if not decoding:
            self.forget()
            return None
        p_BSLE = self.combination.predict(context)
        real_B = _real_rows(context)
        now_LE, later_LE = self.expected.forecast(_any_row(p_BSLE[real_B, 0]), absent_CLE)
        self._forecast_made = True
        return Expected(now_LE, later_LE)

    def ahead(self, layer: int, hidden_ND: Tensor, routes_NK: Tensor) -> Tensor | None:
        if not self._forecast_made:
            return None
        p_NE = self.combination.observe(layer, hidden_ND, routes_NK)
        return None if p_NE is None else _any_row(p_NE)

    def end(self, context: PathContext, routes_BSLK: Tensor) -> None:
        self.combination.observe_pass(context, routes_BSLK)
        if self._forecast_made:
            routes_RLK = routes_BSLK[_real_rows(context), 0]
            self.expected.observe(multi_hot(routes_RLK, self.num_experts).any(0))
            self._forecast_made = False

    def learn(self, context: PathContext, routes_BSLK: Tensor) -> None:
        self.combination.observe_pass(context, routes_BSLK)

    def forget(self) -> None:
        self.combination.forget()
        self.expected.end_of_text()
        self._forecast_made = False

    def _advance(
        self, trained: RoutingPathPredictor, context: PathContext, origin_B: Tensor | None
    ) -> Tensor | None:
        """states_BSD of the new positions, or None where the trained predictor lacks what the encoder read."""
        new = context.num_new
        if origin_B is None or self._state is None:  # begin with all that is known of these texts
            context = replace(context, num_new=context.target_BT.shape[1])
        mask_BS = context.new_mask_BS
        if mask_BS is None:
            mask_BS = torch.ones_like(context.new_BS, dtype=torch.bool)
        with torch.inference_mode():
            if origin_B is None or self._state is None:
                self._state = _start(trained, context, mask_BS)
                if self._state is None:
                    return None
            elif not torch.equal(origin_B, torch.arange(self._state.num_rows)):
                self._state = self._state.select(origin_B)
            # Not `advance`: of a prompt the states alone are wanted, not what the heads say of each position.
            states_BSD = trained.decoder.advance(self._state, trained.embedding(context.new_BS), mask_BS)
            return states_BSD[:, -new:]

    def _speak(
        self, trained: RoutingPathPredictor, context: PathContext, states_B1D: Tensor
    ) -> Tensor | None:
        """Leaves what it predicts in the mixture's source; absent_CLE of the batch where it has a next-use head."""
        with torch.inference_mode():
            p_B1LE = trained.target_heads(states_B1D, context.new_BS).sigmoid()
            absent_CLE = None
            if self.has_head:
                # A longer horizon includes a shorter.
                within_BCLE = trained.next_use_logits(states_B1D)[:, 0].sigmoid().cummax(1).values
                absent_CLE = (1 - within_BCLE[_real_rows(context)]).prod(0)
        # Copies: tensors made in inference mode could not be learnt from outside of it.
        self._spoken.p_BSLE = p_B1LE.clone()
        return None if absent_CLE is None else absent_CLE.clone()


class _Spoken:
    """Stands for the trained predictor in the mixture, which has been asked already (see `advance`)."""

    def __init__(self) -> None:
        self.p_BSLE = torch.zeros(0)

    def predict(self, context: PathContext) -> Tensor:
        return self.p_BSLE


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
    return 1 - (1 - p_NXE).prod(0)
