"""Look-ahead, tuned: the next layer's router on this layer's input, and what training knows better.

Gate look-ahead is right as far as the residual stream keeps still between two layers. What the layer between adds
follows from its input too, so a small network can learn it; it starts from the router itself (scaled, see
`Sharpness`), so on subjects that it was not trained on it still is look-ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expertflow.predictor.baselines import multi_hot

_ROWS = 512  # tokens per step
_RATE = 3e-3  # of Adam at the start; falls to zero as a cosine
_SCALE = 2.0  # of the router's logits at the start, in units of their spread over the experts
_SPREAD_ROWS = 512


class TunedLookAhead(nn.Module):
    """A LayerPredictor. For each layer but the last:

    logits = bias + scale * router of the next layer(hidden) + linear(norm(hidden)) + down(relu(up(norm(hidden))))
    """

    def __init__(
        self,
        weight_LED: Sequence[Tensor],
        bias_LE: Sequence[Tensor | None],
        inner: int = 128,
    ):
        """The routers' weights by MoE layer, E x D each, and their biases where they have any."""
        super().__init__()
        self.num_experts = max(len(weight) for weight in weight_LED)
        hidden = weight_LED[0].shape[1]
        self.steps = nn.ModuleList(
            _Step(weight, bias, self.num_experts, hidden, inner)
            for weight, bias in zip(weight_LED[1:], bias_LE[1:], strict=True)
        )

    def fit(
        self,
        hidden_NLD: Tensor,
        routes_NLK: Tensor,
        steps: int = 600,
        seed: int = 0,
        progress: Callable[[str], None] = lambda what: None,
    ) -> float:
        """Train on what entered each MoE block and what each router chose, token by token; eq. 1's loss.

        hidden_NLD: float16 or wider; routes_NLK: ids, num_experts where dropped. Returns the last step's loss.
        Raises ValueError when there is nothing to train on, or the loss is no number.
        """
        if not len(hidden_NLD):
            raise ValueError("no hidden states to train on; capture some from prompts of the training split")
        generator = torch.Generator().manual_seed(seed)
        self._measure_spread(hidden_NLD[:_SPREAD_ROWS].float(), routes_NLK)
        optimizer = torch.optim.Adam(self.parameters(), lr=_RATE)
        total = float("nan")
        for step in range(steps):
            for parameters in optimizer.param_groups:
                parameters["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            picked = torch.randint(len(hidden_NLD), (_ROWS,), generator=generator)
            wanted_NLE = multi_hot(routes_NLK[picked, 1:], self.num_experts).float()
            loss = F.binary_cross_entropy_with_logits(self(hidden_NLD[picked].float()), wanted_NLE)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total = loss.item()
            if not math.isfinite(total):
                raise ValueError("the loss of look-ahead is not a number; check the hidden states for nan")
            if step % 20 == 0:
                progress(f"tuning look-ahead: step {step} of {steps}, loss {total:.4f}")
        self.requires_grad_(False)
        return total

    def forward(self, hidden_NLD: Tensor) -> Tensor:
        """logits_NME of the layers 1 to L-1, from what entered the layers before them."""
        return torch.stack([step(hidden_NLD[:, layer]) for layer, step in enumerate(self.steps)], dim=1)

    @torch.no_grad()
    def observe(self, layer: int, hidden_BD: Tensor | None, routes_BK: Tensor | None) -> Tensor | None:
        if hidden_BD is None or layer >= len(self.steps):
            return None
        return torch.sigmoid(self.steps[layer](hidden_BD.float()))

    @torch.no_grad()
    def _measure_spread(self, hidden_NLD: Tensor, routes_NLK: Tensor) -> None:
        """Start where look-ahead is: logits of _SCALE times their spread, and each layer's experts as frequent."""
        for layer, step in enumerate(self.steps):
            assert isinstance(step, _Step)
            router_NE = F.linear(hidden_NLD[:, layer], step.router_ED, step.router_bias_E)
            step.scale.fill_(_SCALE / max(float(router_NE.std(-1).mean()), 1e-6))
            used_E = multi_hot(routes_NLK[:, layer + 1], self.num_experts).float().mean(0)
            step.bias_E.copy_(used_E.clamp(1e-3, 1 - 1e-3).logit() - step.scale * router_NE.mean(0))


class _Step(nn.Module):
    """From the input of one layer to the router of the next."""

    router_ED: Tensor
    router_bias_E: Tensor | None

    def __init__(self, weight_ED: Tensor, bias_E: Tensor | None, experts: int, hidden: int, inner: int):
        super().__init__()
        missing = experts - len(weight_ED)  # a narrower layer's experts that are not there
        weight_ED = F.pad(weight_ED.detach().float(), (0, 0, 0, missing))
        self.register_buffer("router_ED", weight_ED, persistent=False)
        bias = None if bias_E is None else F.pad(bias_E.detach().float(), (0, missing))
        self.register_buffer("router_bias_E", bias, persistent=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.bias_E = nn.Parameter(torch.zeros(experts))
        self.norm = nn.LayerNorm(hidden)
        self.linear = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, experts)
        for silent in (self.linear.weight, self.down.weight, self.down.bias):
            nn.init.zeros_(silent)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        normed_ND = self.norm(hidden_ND)
        learnt_NE = self.linear(normed_ND) + self.down(F.relu(self.up(normed_ND)))
        return self.bias_E + self.scale * F.linear(hidden_ND, self.router_ED, self.router_bias_E) + learnt_NE
