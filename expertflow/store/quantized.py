"""Quantized checkpoints: refused by name and with the remedy, wherever a config.json is read.

Only the refusal is here. How each entry point comes by the config is its own business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    """ValueError if this config.json says that the weights are quantized."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise quantized_error(where, str(method or "unknown").upper())


def quantized_error(where: str, method: str) -> ValueError:
    return ValueError(
        f"{where} is quantized ({method}, by the quantization_config of its config.json), and quantized "
        f"experts are not supported yet; use an unquantized (bf16) copy of the model"
    )
