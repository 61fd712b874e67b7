"""Switch and NLLB experts, which lie outside transformers' experts interface.

They are an nn.ModuleDict of small modules, called with a mask over experts instead of expert numbers.
attach.py asks this file for them (`find_modulelist_experts`) and puts `OffloadedExperts.replacing(module)` in
their place. The routers stay transformers' own: they decide capacity, dropped tokens and the second expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import NllbMoeConfig, PreTrainedModel
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

from expertflow.cache.expert_cache import Weights
from expertflow.models.experts import Attachment, run_experts
from expertflow.models.products import linear


def find_modulelist_experts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """(qualified name, module), in the order of the module tree: the encoder's come before the decoder's."""
    for name, module in model.named_modules():
        if isinstance(module, (SwitchTransformersExperts, NllbMoeExperts)):
            yield name, module


class OffloadedExperts(nn.Module):
    """Stands where a ModuleDict of experts stood, holds no weights; `expertflow` is set by attach.py.

    Inference only: in training mode transformers drops activations out; here forward raises ValueError.
    """

    expertflow: Attachment

    @staticmethod
    def replacing(module: nn.Module) -> OffloadedExperts:
        """The stand-in for a module that find_modulelist_experts yields; `module` is not changed."""
        act = module.get_submodule("expert_0.act")
        if isinstance(module, NllbMoeExperts):
            check_nllb_reads_its_mask_as_expert_numbers()
            return OffloadedNllbExperts(act, module.moe_token_dropout)
        assert isinstance(module, SwitchTransformersExperts), f"no stand-in for {type(module).__name__}"
        return OffloadedSwitchExperts(act)

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def _refuse_training(self) -> None:
        if self.training:
            raise ValueError(
                "experts held by expertflow are read-only: call model.eval() before the forward pass"
            )


class OffloadedSwitchExperts(OffloadedExperts):
    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        """hidden_states [T, D]; selected_experts [T, 1, E], one-hot or zero; routing_weights [T, 1].

        Returns [T, D], zero for the tokens over capacity, whose row of selected_experts is zero.
        """
        self._refuse_training()
        if hidden_states.is_meta:
            return torch.empty_like(hidden_states)
        dropped_T1 = selected_experts.sum(dim=-1) == 0
        index_T1 = selected_experts.argmax(dim=-1).masked_fill(dropped_T1, self.expertflow.num_experts)
        return run_experts(self.expertflow, hidden_states, index_T1, routing_weights, self._multiply)

    def _multiply(self, rows_ND: Tensor, weights: Weights) -> Tensor:
        (wi,), (wo,) = weights["wi.weight"], weights["wo.weight"]
        return linear(self.act(linear(rows_ND, wi)).to(wo.dtype), wo)


class OffloadedNllbExperts(OffloadedExperts):
    """NLLB as transformers computes it, which is not as it was trained.

    NllbMoeExperts.forward applies one_hot to the router's top-1 mask, which already is one-hot. So the mask's
    *values* are taken for expert numbers: expert 1 runs for the pairs where the mask is 1, expert 0 for all
    the others, and no further expert ever runs (tried with transformers 5.23: of 8 experts two were called).
    The weights are the router's: expert 1 gets the best expert's, expert 0 the second-best expert's, and on a
    token whose best expert was over capacity expert 1 gets none. We promise transformers' output, so this
    reproduces it.
    """

    def __init__(self, act: nn.Module, token_dropout: float):
        super().__init__(act)
        # transformers scales by this at inference, where dropout would normally do nothing.
        self.kept = 1 - token_dropout

    def forward(self, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
        """hidden_states [T, D]; router_mask [T, E], 1 at the best expert; router_probs [T, E], two non-zeros.

        Returns [T, D], zero where every weight is zero (padding, both experts over capacity).
        """
        self._refuse_training()
        if hidden_states.is_meta:
            return torch.empty_like(hidden_states)
        # At most one non-zero in each sum, so nothing is rounded.
        weight_TK = torch.stack(
            [(router_probs * (router_mask == value)).sum(dim=-1) for value in (0, 1)], dim=-1
        )
        expert_K = torch.arange(2, device=router_mask.device)
        index_TK = torch.where(weight_TK != 0, expert_K, self.expertflow.num_experts)
        return run_experts(self.expertflow, hidden_states, index_TK, weight_TK * self.kept, self._multiply)

    def _multiply(self, rows_ND: Tensor, weights: Weights) -> Tensor:
        (fc1,), (fc1_bias,) = weights["fc1.weight"], weights["fc1.bias"]
        (fc2,), (fc2_bias,) = weights["fc2.weight"], weights["fc2.bias"]
        return linear(self.act(linear(rows_ND, fc1, fc1_bias)).to(fc2.dtype), fc2, fc2_bias)


def check_nllb_reads_its_mask_as_expert_numbers() -> None:
    """Raise ValueError unless the installed transformers runs NLLB's experts as OffloadedNllbExperts does.

    The day transformers mends it, our output would silently differ from its own; better to refuse.
    """
    config = NllbMoeConfig(num_experts=3, d_model=1, moe_token_dropout=0.0)
    with torch.device("meta"):  # nothing drawn from the global generator
        experts = NllbMoeExperts(config, ffn_dim=1)
    experts = experts.to_empty(device="cpu").eval()
    with torch.device("cpu"), torch.no_grad():
        for name, tensor in experts.named_parameters():
            says = 1 + int(name.split(".")[0].removeprefix("expert_"))  # expert e answers e + 1
            tensor.fill_(says if name.endswith("fc2.bias") else 0)
        # The router chose expert 2 (weight 0.5), then expert 1 (weight 0.25).
        out = experts(torch.ones(1, 1), torch.tensor([[0, 0, 1]]), torch.tensor([[0.0, 0.25, 0.5]]))
    if out.item() != 0.25 * 1 + 0.5 * 2:
        raise ValueError(
            "this version of transformers runs other NLLB-MoE experts than 5.23 does, which we reproduce; "
            "install transformers==5.23.*, or a newer expertflow"
        )
