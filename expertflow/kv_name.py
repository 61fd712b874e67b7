"""What transformers calls the KV cache that goes from pass to pass: `cache` since 5.24, `past_key_values` before.

It takes the old name until 5.40, so callers of a model may use either: who reads takes both, who writes its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

_OLD = "past_key_values"
KV_CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else _OLD


def kv_cache_in(kwargs: Mapping[str, Any]) -> Any:
    """Of a call's keyword arguments, or None."""
    cache = kwargs.get(KV_CACHE)
    return cache if cache is not None else kwargs.get(_OLD)


def kv_cache_of(output: Any) -> Any:
    """Of what a model returned, or None."""
    return getattr(output, KV_CACHE, None)
