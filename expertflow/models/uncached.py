"""`generate(use_cache=False)` on a model whose prompts run in chunks.

transformers takes the chunk size from the model's generation config and then refuses to go on without a cache,
since chunks hand their keys and values to each other in it. Without a cache every step runs the whole sequence.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from expertflow.config import Settings
from expertflow.kv_name import kv_cache_in


def run_whole_without_cache(model: PreTrainedModel, settings: Settings) -> None:
    """Have `generate` run a prompt in one piece if there is no cache, on this instance only.

    A chunk size that the caller asked for is transformers' to judge. ValueError for a sequence that would grow longer
    than the memory plan has scratch for.
    """
    prefill: Callable[..., Any] | None = getattr(type(model), "_prefill", None)
    if prefill is None:  # it does not generate
        return
    # Not the model itself: a cycle would keep its weights alive until the next garbage collection.
    reference = weakref.ref(model)

    @wraps(prefill)
    def whole_without_cache(
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        **rest: Any,
    ) -> Any:
        this = reference()
        assert this is not None, "called on a model that is gone"
        without_cache = generation_config.use_cache is False and kv_cache_in(model_kwargs) is None
        if without_cache and generation_config.prefill_chunk_size == settings.prefill_chunk:
            sequences, longest = input_ids.shape[0], generation_config.max_length
            if sequences * longest > settings.batch * settings.prefill_chunk:
                raise ValueError(
                    f"use_cache=False runs {sequences} sequence(s) of up to {longest} tokens whole at every step, and "
                    f"there is scratch memory for {settings.batch} x {settings.prefill_chunk}; load the model with a "
                    f"larger prefill_chunk= or batch=, ask for fewer new tokens, or leave use_cache out"
                )
            generation_config.prefill_chunk_size = None  # generate's own copy, of this call
        return prefill(this, input_ids, generation_config, model_kwargs, **rest)

    setattr(model, "_prefill", whole_without_cache)  # noqa: B010 - mypy guards methods
