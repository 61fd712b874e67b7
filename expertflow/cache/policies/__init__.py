"""Policies: which expert to evict, and what to fetch ahead. One file for each family, a screen each.

A new policy costs two edits: its class and its line here; the conformance suite finds it.
"""

from __future__ import annotations

from expertflow.cache.policies.base import Forecast, Policy, Visit
from expertflow.cache.policies.belady import Belady, PrefetchingBelady
from expertflow.cache.policies.plec import NextUse, PaperPLEC
from expertflow.cache.policies.shares import CacheMoE, LayerLFU, LayerLRU
from expertflow.cache.policies.streams import FullLayerRing, LayerRing, Pregated, SpeculativeCacheMoE

# What an engine can run.
POLICIES: dict[str, type[Policy]] = {
    "lru": LayerLRU,
    "lfu": LayerLFU,
    "plec": NextUse,
    "plec-paper": PaperPLEC,
    "cache-moe": CacheMoE,
    "cache-moe-speculative": SpeculativeCacheMoE,
    "pregated-moe": Pregated,
}
# What needs the future, or loads experts that no router asked for: the simulator alone.
SIMULATED: dict[str, type[Policy]] = {
    "se-moe": LayerRing,
    "se-moe-ring": FullLayerRing,
    "belady": Belady,
    "belady-prefetch": PrefetchingBelady,
}

__all__ = ["POLICIES", "SIMULATED", "Forecast", "LayerLRU", "Policy", "Visit"]
