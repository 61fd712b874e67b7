"""transformers' continuous batching (`generate_batch`) inside the budget.

Left alone it gives its paged KV cache nine tenths of the memory that is free. The budget has put KV for
`batch` x `context` tokens aside: that is what the pages get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from expertflow.config import Settings


def keep_pages_in_budget(model: PreTrainedModel, settings: Settings) -> None:
    """Have `model.init_continuous_batching`, which generate_batch goes through, size its cache by `settings`.

    A ContinuousBatchingConfig of the caller's is filled up where it leaves sizes open; one that asks for more is
    a ValueError. On this instance only.
    """
    start: Callable[..., Any] | None = getattr(model, "init_continuous_batching", None)
    if start is None:  # an encoder-decoder
        return

    @wraps(start)
    def within_budget(
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given = continuous_batching_config or getattr(generation_config, "continuous_batching_config", None)
        return start(generation_config, pages_for(given, settings), *args, **kwargs)

    setattr(model, "init_continuous_batching", within_budget)  # noqa: B010 - mypy guards methods


def pages_for(given: ContinuousBatchingConfig | None, settings: Settings) -> ContinuousBatchingConfig:
    """`given`, or transformers' defaults, with as many pages as the KV budget holds. ValueError if it asks for more."""
    tokens = settings.batch * settings.context
    budget = f"the KV budget of {settings.batch} x {settings.context} tokens"
    remedy = "load the model with a larger context= or batch="
    pages = given or ContinuousBatchingConfig()
    if pages.max_memory_percent is not None:
        raise ValueError(
            f"max_memory_percent={pages.max_memory_percent} counts what is free and not {budget}; give num_blocks, or "
            f"leave both out"
        )
    if pages.num_blocks is None:
        # A request takes whole pages: several fit into a short context.
        page_size = pages.page_size if given else max(4, min(pages.page_size, settings.context // 8))
        pages = replace(pages, page_size=page_size, num_blocks=tokens // page_size)
    if not pages.num_blocks or pages.num_blocks * pages.page_size > tokens:
        raise ValueError(
            f"{max(1, pages.num_blocks or 0)} block(s) of {pages.page_size} tokens exceed {budget}; {remedy}, or use "
            f"fewer or smaller blocks (num_blocks=, page_size=)"
        )
    if pages.max_batch_tokens is None:
        pages = replace(pages, max_batch_tokens=settings.prefill_chunk)
    return pages
