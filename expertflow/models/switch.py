"""Switch and NLLB experts, which lie outside transformers' experts interface.

They are an nn.ModuleDict of small modules, called with a one-hot mask. attach.py asks this file for them
(`find_modulelist_experts`) and puts `OffloadedExperts.replacing(module)` in their place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

from expertflow.cache.expert_cache import Weights
from expertflow.models.experts import Attachment, run_experts


def find_modulelist_experts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """(qualified name, module), in the order of the module tree: Switch's encoder comes first."""
    for name, module in model.named_modules():
        if isinstance(module, (SwitchTransformersExperts, NllbMoeExperts)):
            yield name, module


class OffloadedExperts(nn.Module):
    """Stands where a ModuleDict of experts stood; `expertflow` is set by attach.py."""

    expertflow: Attachment

    @staticmethod
    def replacing(module: nn.Module) -> OffloadedExperts:
        first = next(iter(module.children()))
        return OffloadedSwitchExperts(first.act)

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act


class OffloadedSwitchExperts(OffloadedExperts):
    def forward(self, hidden_TD: Tensor, mask_T1E: Tensor, weight_T1: Tensor) -> Tensor:
        if hidden_TD.is_meta:
            return hidden_TD.new_empty(hidden_TD.shape)
        routed_T1 = mask_T1E.sum(dim=-1) > 0
        index_T1 = mask_T1E.argmax(dim=-1).masked_fill(~routed_T1, self.expertflow.num_experts)
        return run_experts(self.expertflow, hidden_TD, index_T1, weight_T1, self._multiply)

    def _multiply(self, rows_ND: Tensor, weights: Weights) -> Tensor:
        inner = self.act(F.linear(rows_ND, weights["wi.weight"][0]))
        return F.linear(inner.to(weights["wo.weight"][0].dtype), weights["wo.weight"][0])
