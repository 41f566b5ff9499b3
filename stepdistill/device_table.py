"""Small constants that live on every device at once."""

from collections.abc import Callable

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
