"""Where a model computes: on the CPU or on the accelerator that torch sees; and what memory there is.

torch's device-agnostic API only, so that any of its devices will do. No weight is moved here.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from expertflow.cache.device import AcceleratorDevice, HostDevice, SlotDevice
from expertflow.config import Settings

# What the allocator of a device may not find in one piece, and others may still ask for.
_USABLE_SHARE = 0.9


def choose_device(settings: Settings, device_map: Any = None) -> torch.device:
    """The one device of `settings.device` and of transformers' device_map, if that names one.

    ValueError for a device that torch does not see, for several, and for two that differ.
    """
    mapped = _of_device_map(device_map)
    named = None if settings.device == "auto" else _seen(settings.device, f"device={settings.device!r}")
    if mapped is not None and named is not None and mapped != named:
        raise ValueError(
            f"device_map={device_map!r} and device={settings.device!r} name two devices; give one of them"
        )
    # An accelerator only when it is named: nobody should be the first to run it on hardware without knowing.
    device = named or mapped or torch.device("cpu")
    if device.type == "cpu" and settings.host_memory is not None:
        raise ValueError(
            f"host_memory={settings.host_memory!r} is RAM between an accelerator and the disk, and this model runs on "
            f"the CPU ({_what_torch_sees()}); use memory= instead"
        )
    return device


def _of_device_map(device_map: Any) -> torch.device | None:
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if {str(place) for place in places} <= {"None", "auto"}:
        return None
    said = f"device_map={device_map!r}"
    if len(places) > 1:
        raise ValueError(
            f"{said} spreads the model over several devices, and expertflow computes on one; name one"
        )
    return _seen(places.pop(), said)


def _seen(name: Any, said: str) -> torch.device:
    """The device of that name, with its number, if torch sees it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        # A bare number is an accelerator's, and torch may know of none.
        raise ValueError(f"{said} is no device that torch can use: {_what_torch_sees()}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    accelerator = _accelerator()
    if accelerator is None or device.type != accelerator.type:
        raise ValueError(f"{said} is no device that torch can use: {_what_torch_sees()}")
    if device.index is None:
        return accelerator
    if device.index >= torch.accelerator.device_count():
        raise ValueError(f"{said} is no device that torch can use: {_what_torch_sees()}")
    return device


def _accelerator() -> torch.device | None:
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, "available, and not there"
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _what_torch_sees() -> str:
    accelerator = _accelerator()
    if accelerator is None:
        return f"torch {torch.__version__} sees no accelerator, only cpu"
    names = [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    return f"torch {torch.__version__} sees cpu, {', '.join(names)}"


def slot_device(settings: Settings, device_map: Any = None) -> SlotDevice:
    """Where the experts of a model go. ValueError as choose_device."""
    device = choose_device(settings, device_map)
    return HostDevice() if device.type == "cpu" else AcceleratorDevice(device)


def device_memory(device: torch.device) -> tuple[int, int]:
    """(bytes of an accelerator that this process holds, bytes that it may use, those included)."""
    held = torch.accelerator.memory_reserved(device)
    free, _ = torch.accelerator.get_memory_info(device)
    return held, held + int(free * _USABLE_SHARE)


class _Inputs:
    """Takes what a module is called with to its device, and logits back to where the first of it came from.

    So callers may go on with tensors on the CPU, as the engine and transformers' examples do. A cache of keys and
    values is not looked into: it is on the device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._came_from = threading.local()

    def to_device(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._came_from.device = None
        return self._moved(args), self._moved(kwargs)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device != self.device and self._came_from.device is None:
                self._came_from.device = value.device
            return value.to(self.device)
        if type(value) is dict:
            return {key: self._moved(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._moved(item) for item in value)
        return value

    def logits_back(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._came_from.device is not None and isinstance(output, ModelOutput) and "logits" in output:
            output["logits"] = output["logits"].to(self._came_from.device)
        return output


def take_inputs_from_anywhere(model: PreTrainedModel, device: torch.device) -> None:
    """Let a model on `device` be called with tensors that are elsewhere; its logits come back there."""
    inputs = _Inputs(device)
    model.register_forward_pre_hook(inputs.to_device, with_kwargs=True)
    model.register_forward_hook(inputs.logits_back)
    if model.config.is_encoder_decoder:  # generate() calls the encoder past the model's own forward
        model.get_encoder().register_forward_pre_hook(_Inputs(device).to_device, with_kwargs=True)
