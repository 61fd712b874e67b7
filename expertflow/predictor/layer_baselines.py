"""Predictors that read the hidden states of the layer at work: gate look-ahead, and the pre-gated MLP.

They speak one layer ahead, so a load has the time of one layer to arrive. Rows are tokens of one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expertflow.predictor.baselines import multi_hot

_BAR_STEPS = 3  # sums within a tenth of a percent of top_k, at logits from 0.1 to 40 wide
_BAR_STRIDE = 4.0  # a step from where the slope is flat would fly past


def inclusion_probability(logit_BE: Tensor, top_k: int) -> Tensor:
    """p_BE that a router with these logits chooses the expert, were the logits a little wrong.

    sigmoid(logit - bar), the bar such that the probabilities of a row add up to top_k, as the number of experts
    chosen does: the union over a batch is only as good as these sums. (A bar midway between the last chosen
    and the first that is not makes them add up to four and more for one expert per token.)
    """
    experts = logit_BE.shape[-1]
    if top_k >= experts:
        return torch.ones_like(logit_BE)
    best = logit_BE.topk(top_k + 1, dim=-1).values
    bar_B1 = (best[..., top_k - 1 : top_k] + best[..., top_k : top_k + 1]) / 2
    for _ in range(_BAR_STEPS):
        p_BE = torch.sigmoid(logit_BE - bar_B1)
        total_B1 = p_BE.sum(-1, keepdim=True)
        slope_B1 = (p_BE * (1 - p_BE)).sum(-1, keepdim=True).clamp(min=1e-6)
        # Newton's step on the log odds of the mean: one step solves it where all are small (a softmax).
        odds_B1 = total_B1 / (experts - total_B1)
        step_B1 = (odds_B1.log() - math.log(top_k / (experts - top_k))) * total_B1 * (experts - total_B1)
        bar_B1 = bar_B1 + (step_B1 / experts / slope_B1).clamp(-_BAR_STRIDE, _BAR_STRIDE)
    return torch.sigmoid(logit_BE - bar_B1)


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
        self.sharpness_L = [Sharpness(top_k) for _ in self.weight_LED]
        self._said: tuple[int, Tensor] | None = None

    def observe(self, layer: int, hidden_BD: Tensor | None, routes_BK: Tensor | None) -> Tensor | None:
        if routes_BK is not None and self._said is not None and self._said[0] == layer:
            self.sharpness_L[layer].learn(self._said[1], routes_BK)
        self._said = None
        after = layer + 1
        if hidden_BD is None or after >= len(self.weight_LED):
            return None
        weight_ED = self.weight_LED[after]
        if hidden_BD.shape[-1] != weight_ED.shape[1]:
            raise ValueError(
                f"hidden states of {hidden_BD.shape[-1]} numbers, but the router of layer {after} reads "
                f"{weight_ED.shape[1]}; both must come from one model"
            )
        logit_BE = F.linear(hidden_BD.float(), weight_ED, self.bias_LE[after])
        self._said = (after, logit_BE)
        return self.sharpness_L[after].probability(logit_BE)


class Sharpness:
    """The factor on a router's logits that has lately made them the best probabilities, of a few candidates.

    Candidates are in units of the logits' own spread over the experts, so one list serves every model.
    """

    CANDIDATES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0)
    START = 3.0
    KEEP = 0.995  # by row, of the running losses
    MAX_ROWS = 32

    def __init__(self, top_k: int):
        self.top_k = top_k
        self.relative = self.START
        self._spread = 0.0
        self._loss_C = torch.zeros(len(self.CANDIDATES))
        self._seen = 0.0

    def probability(self, logit_BE: Tensor) -> Tensor:
        spread = self._spread or float(logit_BE.std(-1).mean())
        return inclusion_probability(logit_BE * (self.relative / max(spread, 1e-6)), self.top_k)

    def learn(self, logit_BE: Tensor, routes_BK: Tensor) -> None:
        """routes_BK: what the router chose where logit_BE had been said of it."""
        picked = torch.linspace(0, len(logit_BE) - 1, min(len(logit_BE), self.MAX_ROWS)).long()
        logit_BE, truth_BE = logit_BE[picked], multi_hot(routes_BK[picked], logit_BE.shape[-1])
        keep = self.KEEP ** len(picked)
        self._seen = self._seen * keep + (1 - keep)
        share = (1 - keep) / self._seen
        self._spread += share * (float(logit_BE.std(-1).mean()) - self._spread)
        factor_C11 = torch.tensor(self.CANDIDATES)[:, None, None] / max(self._spread, 1e-6)
        p_CBE = inclusion_probability(logit_BE * factor_C11, self.top_k).clamp(1e-3, 1 - 1e-3)
        loss_CBE = F.binary_cross_entropy(p_CBE, truth_BE.expand(p_CBE.shape).float(), reduction="none")
        self._loss_C += share * (loss_CBE.mean((1, 2)) - self._loss_C)
        self.relative = self.CANDIDATES[int(self._loss_C.argmin())]


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
