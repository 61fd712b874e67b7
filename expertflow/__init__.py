"""Run Mixture-of-Experts language models that do not fit in memory, exactly as transformers would.

Importing this package imports no torch: the names below load their modules on first use, so that
`expertflow --help` answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertflow.engine.engine import Engine
    from expertflow.engine.llm import LLM
    from expertflow.engine.sampling import SamplingParams
    from expertflow.models.attach import ExpertFlowConfig

__version__ = "0.1.0"
__all__ = ["LLM", "Engine", "ExpertFlowConfig", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "expertflow.engine.llm",
    "Engine": "expertflow.engine.engine",
    "SamplingParams": "expertflow.engine.sampling",
    "ExpertFlowConfig": "expertflow.models.attach",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'expertflow' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
