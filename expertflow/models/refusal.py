"""Our refusal of a quantized checkpoint, where transformers would refuse in words that help nobody.

A checkpoint with a quantization_config of its own is turned down by AutoHfQuantizer.merge_quantization_configs,
long before our quantizer exists: it compares the class names of that config and of ours, and asks for "the same
quantization config class". That comparison is the one moment where something of ours is asked and the format is
known. So the name of our class answers it. Should transformers compare otherwise some day, its own refusal is back;
so it is for a format whose package is missing (compressed-tensors): it is asked for before the comparison.
"""

from __future__ import annotations

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from expertflow.store.quantized import quantized_error


class RefusingName(str):
    """A class name as any other, but ValueError when asked whether it differs from that of a quantized format."""

    __slots__ = ()

    # Python asks the right operand first when its class derives from the left one's.
    def __ne__(self, other: object) -> bool:
        methods = [
            method.upper()
            for method, config in AUTO_QUANTIZATION_CONFIG_MAPPING.items()
            if config.__name__ == other
        ]
        if methods and not self == other:
            raise quantized_error("the checkpoint", " or ".join(methods).replace("_", " "))
        return super().__ne__(other)
