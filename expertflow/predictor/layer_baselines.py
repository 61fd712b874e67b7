"""Predictors that read the hidden states of the layer at work: gate look-ahead, and the pre-gated MLP.

They speak one layer ahead, so a load has the time of one layer to arrive. Rows are tokens of one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expertflow.predictor.baselines import multi_hot
from expertflow.predictor.lots import Lots

_BAR_STEPS = 3  # sums within a tenth of a percent of top_k, at logits from 0.1 to 40 wide
_BAR_STRIDE = 4.0  # a step from where the slope is flat would fly past


def inclusion_probability(logit_BE: Tensor, top_k: int) -> Tensor:
    """p_BE that a router with these logits chooses the expert, were the logits a little wrong.

    sigmoid(logit - bar), the bar such that the probabilities of a row add up to top_k, as the number of experts
    chosen does: the union over a batch is only as good as these sums. (A bar midway between the last chosen
    and the first that is not makes them add up to four and more for one expert per token.)
    """
    return torch.from_numpy(_inclusion(logit_BE.detach().numpy(), top_k))


def _inclusion(logit_BE: np.ndarray, top_k: int) -> np.ndarray:
    """numpy: these are a few hundred numbers at each layer of each pass, and torch takes twice as long to begin."""
    experts = logit_BE.shape[-1]
    if top_k >= experts:
        return np.ones_like(logit_BE)
    with np.errstate(all="ignore"):  # what is no number stays none
        if logit_BE.size == experts:
            p_E = _inclusion_of_one(logit_BE.reshape(experts), experts, top_k)
            if p_E is not None:
                return p_E.reshape(logit_BE.shape)
        return _inclusion_of_many(logit_BE, experts, top_k)


def _inclusion_of_one(logit_E: np.ndarray, experts: int, top_k: int) -> np.ndarray | None:
    """`_inclusion_of_many` of one row, whose sums are numbers: a third of the calls. None where one of them is none.

    Between products that sweep the core's caches a call takes microseconds however little it does.
    """
    ordered = np.partition(logit_E, (experts - top_k - 1, experts - top_k))
    bar = (ordered[experts - top_k - 1] + ordered[experts - top_k]) / 2
    u, c = np.exp(np.minimum(np.maximum(logit_E - bar, -80), 80)), 1.0
    wanted = math.log(top_k / (experts - top_k))
    for _ in range(_BAR_STEPS):
        p = u / (u + c)
        total, squares = float(np.add.reduce(p)), float(np.add.reduce(p * p))
        rest = experts - total
        if not (total > 0 and rest > 0):
            return None
        step = (math.log(total / rest) - wanted) * total * rest / (experts * max(total - squares, 1e-6))
        c *= math.exp(min(_BAR_STRIDE, max(-_BAR_STRIDE, step)))
    p_E: np.ndarray = u / (u + c)
    return p_E


def _inclusion_of_many(logit: np.ndarray, experts: int, top_k: int) -> np.ndarray:
    best = -np.partition(-logit, (top_k - 1, top_k), axis=-1)
    bar = (best[..., top_k - 1 : top_k] + best[..., top_k : top_k + 1]) / 2
    # sigmoid(logit - bar) = u / (u + c): one exponential of each logit serves all steps.
    u, c = np.exp((logit - bar).clip(-80, 80)), 1.0
    wanted = math.log(top_k / (experts - top_k))
    for _ in range(_BAR_STEPS):
        p = u / (u + c)
        total = p.sum(-1, keepdims=True)
        slope = np.maximum(total - (p * p).sum(-1, keepdims=True), 1e-6)
        # Newton's step on the log odds of the mean: one step solves it where all are small (a softmax).
        rest = experts - total
        step = (np.log(total / rest) - wanted) * total * rest / (experts * slope)
        c = c * np.exp(step.clip(-_BAR_STRIDE, _BAR_STRIDE))
    return u / (u + c)


class GateLookAhead:
    """Asks the next layer's router about this layer's input: the residual stream changes slowly.

    No training. It knows nothing of the first layer, little of the second, and much of the deep ones. How much its
    logits may be trusted, their sharpness, is learnt by layer from the routes that come true: the same expert
    stays first for a token, but the union over a batch depends on it.
    """

    def __init__(
        self, weight_LED: Sequence[Tensor], top_k: int, bias_LE: Sequence[Tensor | None] | None = None
    ):
        """The routers' weights by MoE layer, E x D each, and their biases where they have any."""
        self.weight_LED = [weight.float() for weight in weight_LED]
        self.bias_LE = list(bias_LE) if bias_LE is not None else [None] * len(self.weight_LED)
        self.top_k = top_k
        self.sharpness = Sharpness(top_k, len(self.weight_LED))
        self._lots: Lots[tuple[dict[int, Tensor], dict[int, Tensor]]] = Lots()
        self._said: dict[int, Tensor] = {}  # logit_BE by layer, of this pass
        self._came: dict[int, Tensor] = {}  # routes_BK of the layers that were said

    def observe(self, layer: int, hidden_BD: Tensor | None, routes_BK: Tensor | None) -> Tensor | None:
        if layer == 0:  # the pass before did not come to its end
            self._said.clear()
            self._came.clear()
        if routes_BK is not None and layer in self._said:
            self._came[layer] = routes_BK
        after = layer + 1
        if after == len(self.weight_LED):
            self._learn()
        if hidden_BD is None or after >= len(self.weight_LED):
            return None
        weight_ED = self.weight_LED[after]
        if hidden_BD.shape[-1] != weight_ED.shape[1]:
            raise ValueError(
                f"hidden states of {hidden_BD.shape[-1]} numbers, but the router of layer {after} reads "
                f"{weight_ED.shape[1]}; both must come from one model"
            )
        logit_BE = F.linear(hidden_BD.float(), weight_ED, self.bias_LE[after])
        self._said[after] = logit_BE
        return self.sharpness.probability(after, logit_BE)

    def _learn(self) -> None:
        """The pass is over: of a full lot, all layers of one width at once."""
        rows = max((len(logit_BE) for logit_BE in self._said.values()), default=0)
        lot = self._lots.add((self._said, self._came), rows)
        self._said, self._came = {}, {}
        known = [layer for layer in lot[0][1] if all(layer in came for _, came in lot)] if lot else []
        logit_BE = {layer: torch.cat([said[layer] for said, _ in lot]) for layer in known}
        routes_BK = {layer: torch.cat([came[layer] for _, came in lot]) for layer in known}
        for width in {logit_BE[layer].shape for layer in known}:
            layers = [layer for layer in known if logit_BE[layer].shape == width]
            for some in (layers[i : i + _LAYERS_AT_ONCE] for i in range(0, len(layers), _LAYERS_AT_ONCE)):
                logit_MBE = torch.stack([logit_BE[layer] for layer in some])
                self.sharpness.learn(some, logit_MBE, torch.stack([routes_BK[layer] for layer in some]))


_LAYERS_AT_ONCE = 8  # more would save little time and take memory


class Sharpness:
    """By layer, the factor on a router's logits that has lately made them the best probabilities, of a few candidates.

    Candidates are in units of the logits' own spread over the experts, so one list serves every model.
    """

    CANDIDATES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0)
    START = 3.0
    KEEP = 0.995  # by row, of the running losses
    MAX_ROWS = 32

    def __init__(self, top_k: int, layers: int):
        self.top_k = top_k
        self._spread_L = torch.zeros(layers)
        self._factor_L: list[float | None] = [None] * layers  # on the logits, once there is one
        self._loss_LC = torch.zeros(layers, len(self.CANDIDATES))
        self._seen_L = torch.zeros(layers)

    def probability(self, layer: int, logit_BE: Tensor) -> Tensor:
        factor = self._factor_L[layer]
        if factor is None:
            factor = self.START / max(float(logit_BE.std(-1).mean()), 1e-6)
        return torch.from_numpy(_inclusion(logit_BE.detach().numpy() * factor, self.top_k))

    def learn(self, layers: list[int], logit_MBE: Tensor, routes_MBK: Tensor) -> None:
        """routes_MBK: what the routers of these M layers chose where logit_MBE had been said of it."""
        rows, experts = logit_MBE.shape[1:]
        if rows > self.MAX_ROWS:
            picked = torch.linspace(0, rows - 1, self.MAX_ROWS).long()
            logit_MBE, routes_MBK = logit_MBE[:, picked], routes_MBK[:, picked]
        truth_MBE = multi_hot(routes_MBK, experts).float()
        keep = self.KEEP ** logit_MBE.shape[1]
        seen_M = self._seen_L[layers] * keep + (1 - keep)
        share_M = (1 - keep) / seen_M
        spread_M = self._spread_L[layers]
        spread_M = spread_M + share_M * (logit_MBE.std(-1).mean(-1) - spread_M)
        factor_CM = torch.tensor(self.CANDIDATES)[:, None] / spread_M.clamp(min=1e-6)
        p_CMBE = inclusion_probability(logit_MBE * factor_CM[..., None, None], self.top_k)
        loss_CMBE = F.binary_cross_entropy(
            p_CMBE.clamp(1e-3, 1 - 1e-3), truth_MBE.expand(p_CMBE.shape), reduction="none"
        )
        loss_MC = self._loss_LC[layers]
        loss_MC = loss_MC + share_M[:, None] * (loss_CMBE.mean((2, 3)).T - loss_MC)
        self._seen_L[layers], self._spread_L[layers], self._loss_LC[layers] = seen_M, spread_M, loss_MC
        for layer, best, spread in zip(layers, loss_MC.argmin(1).tolist(), spread_M.tolist(), strict=True):
            self._factor_L[layer] = self.CANDIDATES[best] / max(spread, 1e-6)


class PreGate(nn.Module):
    """Pre-gated MoE (Hwang et al. 2024): an MLP at layer l chooses the experts of layer l + 1.

    The published one changes the model's output; ours is a guess which the router corrects.
    """

    def __init__(self, layers: int, hidden: int, experts: int, inner: int = 128):
        super().__init__()
        self.num_experts = experts
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden), nn.Linear(hidden, inner), nn.ReLU(), nn.Linear(inner, experts)
            )
            for _ in range(layers - 1)
        )

    def fit(
        self,
        hidden_NLD: Tensor,
        routes_NLK: Tensor,
        steps: int = 300,
        rows: int = 256,
        learning_rate: float = 2e-3,
        seed: int = 0,
    ) -> float:
        """Train on what entered each MoE block and what each router chose, token by token.

        Returns the loss of the last step. Raises ValueError when there is nothing to train on, or the loss is
        no number.
        """
        if not len(hidden_NLD):
            raise ValueError("no hidden states to train on; capture some from prompts of the training split")
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        total = float("nan")
        for _ in range(steps):
            picked = torch.randint(len(hidden_NLD), (rows,), generator=generator)
            wanted_NLE = multi_hot(routes_NLK[picked, 1:], self.num_experts).float()
            hidden = hidden_NLD[picked].float()
            logits = torch.stack([mlp(hidden[:, layer]) for layer, mlp in enumerate(self.mlps)], dim=1)
            loss = F.binary_cross_entropy_with_logits(logits, wanted_NLE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = loss.item()
            if total != total:
                raise ValueError("the loss of the pre-gate is not a number; check the hidden states for nan")
        return total

    @torch.no_grad()
    def observe(self, layer: int, hidden_BD: Tensor | None, routes_BK: Tensor | None) -> Tensor | None:
        if hidden_BD is None or layer >= len(self.mlps):
            return None
        return torch.sigmoid(self.mlps[layer](hidden_BD.float()))
