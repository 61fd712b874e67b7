"""Both names of the KV cache: the one of the transformers that is installed, and the one before."""

from __future__ import annotations

import pytest
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.cache_utils import DynamicCache

from expertflow.kv_name import KV_CACHE, kv_cache_in, kv_cache_of


@pytest.mark.parametrize("name", sorted({KV_CACHE, "past_key_values"}))
def test_a_caller_may_use_either_name(name: str) -> None:
    cache = DynamicCache()  # empty, and so nothing that counts as true
    assert kv_cache_in({name: cache}) is cache
    assert kv_cache_in({KV_CACHE: None, name: cache}) is cache
    assert kv_cache_in({}) is None


def test_transformers_own_models_know_ours() -> None:
    """Whatever is installed: a model's forward takes the name, and its output has it."""
    import torch

    config = Qwen2MoeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=8,
        moe_intermediate_size=4, shared_expert_intermediate_size=4, num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    cache = kv_cache_of(model(torch.zeros(1, 3, dtype=torch.long), use_cache=True))
    assert cache.get_seq_length() == 3
    model(torch.zeros(1, 1, dtype=torch.long), **{KV_CACHE: cache})
    assert cache.get_seq_length() == 4
    assert kv_cache_of(object()) is None
