from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fakes import FakeStore

from expertflow.cache.expert_cache import ExpertCache
from expertflow.core import MoEShape

SHAPE = MoEShape((6, 6, 6))


@pytest.fixture
def new_cache() -> Iterator[Callable[..., ExpertCache]]:
    """Makes caches over three layers of six experts, and closes them after the test."""
    caches: list[ExpertCache] = []

    def new(num_slots: int = 4, store: FakeStore | None = None, **settings) -> ExpertCache:
        caches.append(ExpertCache(store or FakeStore(SHAPE), SHAPE, num_slots, **settings))
        return caches[-1]

    yield new
    for cache in caches:
        cache.close()
