"""Small constants cached on every device, and which devices can be used."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DeviceTable:
    """A constant tensor that is copied to each device once: every copy of host memory waits for the device's work.

    Args:
        value: the tensor, or what makes it at its first use.
    """

    def __init__(self, value: Tensor | Callable[[], Tensor]):
        self._make = value if callable(value) and not isinstance(value, Tensor) else lambda: value
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device | str) -> Tensor:
        """The constant on ``device``; not to be changed in place."""
        device = torch.device(device)
        if device not in self._copies:
            self._copies[device] = self._make().to(device)
        return self._copies[device]


def best_device() -> torch.device:
    """The kind of accelerator that this torch finds (CUDA, which ROCm calls itself too, or XPU), else the CPU."""
    found = None if on_cpu() else torch.accelerator.current_accelerator()
    return torch.device("cpu") if found is None else torch.device(found.type)


def device_count() -> int:
    """How many accelerators this machine has that can be used."""
    return 0 if on_cpu() else torch.accelerator.device_count()


def torch_of(device: torch.device | str) -> Any:
    """The module with a device's functions and random state: torch.cuda, torch.xpu; torch itself for the CPU."""
    device = torch.device(device)
    return torch if device.type == "cpu" else torch.get_device_module(device)


def empty_cache() -> None:
    """Return memory that the accelerator's allocator keeps and does not use."""
    if (device := best_device()).type != "cpu":
        torch_of(device).empty_cache()


def on_cpu() -> bool:
    """Whether accelerate must stay on the CPU: without an accelerator it joins a launcher's processes only then;
    and one without float64, in which times are, it would choose."""
    return not torch.accelerator.is_available() or not has_float64(torch.accelerator.current_accelerator())


def has_float64(device: torch.device) -> bool:
    """Whether an accelerator computes in float64: Apple's GPUs and small ones of Intel do not."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"
