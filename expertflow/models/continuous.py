"""transformers' continuous batching (`generate_batch`) inside the budget.

Left alone it gives its paged KV cache nine tenths of the memory that is free. The budget has put KV for
`sequences` x `context` tokens aside: that is what the pages get.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from expertflow.config import Settings

_SPARE_BLOCKS = 2  # what transformers allocates beside the pages asked for, to write padding to


def keep_pages_in_budget(model: PreTrainedModel, settings: Settings) -> None:
    """Have `model.init_continuous_batching`, which generate_batch goes through, size its cache by `settings`.

    A ContinuousBatchingConfig of the caller's is filled up where it leaves sizes open; one that asks for more is
    a ValueError. On this instance only.
    """
    start: Callable[..., Any] | None = getattr(type(model), "init_continuous_batching", None)
    if start is None:  # an encoder-decoder
        return
    # Not the model itself: a cycle would keep its weights alive until the next garbage collection.
    reference = weakref.ref(model)

    @wraps(start)
    def within_budget(
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        this = reference()
        assert this is not None, "called on a model that is gone"
        given = continuous_batching_config or getattr(
            generation_config or this.generation_config, "continuous_batching_config", None
        )
        return start(this, generation_config, pages_for(given, settings), *args, **kwargs)

    setattr(model, "init_continuous_batching", within_budget)  # noqa: B010 - mypy guards methods


def pages_for(given: ContinuousBatchingConfig | None, settings: Settings) -> ContinuousBatchingConfig:
    """`given`, or transformers' defaults, with as many pages as the KV budget holds. ValueError if it asks for more."""
    tokens = settings.held * settings.context
    pages = given or ContinuousBatchingConfig()
    if given is None:
        # A request takes whole pages, so they are small against a context.
        pages = replace(pages, page_size=max(4, min(pages.page_size, settings.context // 32)))
    blocks = pages.num_blocks
    if blocks is None:
        if pages.max_memory_percent is not None:
            raise ValueError(
                f"max_memory_percent={pages.max_memory_percent} counts what is free and not the KV budget of "
                f"{settings.held} x {settings.context} tokens; give num_blocks, or leave both out"
            )
        blocks = tokens // pages.page_size - _SPARE_BLOCKS
    if blocks < 1 or (blocks + _SPARE_BLOCKS) * pages.page_size > tokens:
        raise ValueError(
            f"{max(1, blocks)} block(s) of {pages.page_size} tokens and {_SPARE_BLOCKS} spare ones exceed the KV "
            f"budget of {settings.held} x {settings.context} tokens; load the model with a larger context= or "
            f"batch=, or use fewer or smaller blocks (num_blocks=, page_size=)"
        )
    # What is free was divided when the model was loaded: transformers need not leave four tenths of it alone.
    share = 1.0 if pages.max_memory_percent is None else pages.max_memory_percent
    pages = replace(pages, num_blocks=blocks, max_memory_percent=share)
    if pages.max_batch_tokens is None:
        pages = replace(pages, max_batch_tokens=settings.prefill_chunk)
    return pages
