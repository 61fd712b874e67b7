"""Predictors that read the hidden states of the layer at work: gate look-ahead, and the pre-gated MLP.

They speak one layer ahead, so a load has the time of one layer to arrive. Rows are tokens of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expertflow.predictor.baselines import multi_hot


def inclusion_probability(logit_BE: Tensor, top_k: int) -> Tensor:
    """p_BE that a router with these logits chooses the expert, were the logits a little wrong.

    One half lies midway between the last chosen and the first that is not.
    """
    if top_k >= logit_BE.shape[-1]:
        return torch.ones_like(logit_BE)
    best = logit_BE.topk(top_k + 1, dim=-1).values
    midway = (best[..., top_k - 1 : top_k] + best[..., top_k : top_k + 1]) / 2
    return torch.sigmoid(logit_BE - midway)


class GateLookAhead:
    """Asks the next layer's router about this layer's input: the residual stream changes slowly.

    No training. It knows nothing of the first layer, little of the second, and much of the deep ones.
    """

    def __init__(
        self, weight_LED: Sequence[Tensor], top_k: int, bias_LE: Sequence[Tensor | None] | None = None
    ):
        """The routers' weights by MoE layer, E x D each, and their biases where they have any."""
        self.weight_LED = [weight.float() for weight in weight_LED]
        self.bias_LE = list(bias_LE) if bias_LE is not None else [None] * len(self.weight_LED)
        self.top_k = top_k

    def observe(self, layer: int, hidden_BD: Tensor | None, routes_BK: Tensor | None) -> Tensor | None:
        after = layer + 1
        if hidden_BD is None or after >= len(self.weight_LED):
            return None
        weight_ED = self.weight_LED[after]
        if hidden_BD.shape[-1] != weight_ED.shape[1]:
            raise ValueError(
                f"hidden states of {hidden_BD.shape[-1]} numbers, but the router of layer {after} reads "
                f"{weight_ED.shape[1]}; both must come from one model"
            )
        return inclusion_probability(F.linear(hidden_BD.float(), weight_ED, self.bias_LE[after]), self.top_k)


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
