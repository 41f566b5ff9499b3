"""Rows of many entries in the host's memory: written once, in order, and sent to a device batch by batch."""

from collections.abc import Mapping

import torch
from torch import Tensor


class HostRows:
    """Named tensors of ``count`` rows, each allocated once; rows that are too short are padded with zeros.

    What is written is copied, so that nothing holds on to the device's tensors.

    Args:
        count: rows of each tensor.
    """

    def __init__(self, count: int):
        self.count = count
        self.tensors: dict[str, Tensor] = {}

    def write(self, first: int, rows: Mapping[str, Tensor]) -> None:
        """Copy ``rows`` (B, ...) into rows ``first`` .. ``first + B``; of tensors of rank 2 and more, longer rows
        (dimension 1) make all of them longer."""
        for name, value in rows.items():
            whole = self.tensors.get(name)
            if whole is None:
                whole = self.tensors[name] = torch.zeros(self.count, *value.shape[1:], dtype=value.dtype)
            elif value.ndim > 1 and value.shape[1] > whole.shape[1]:
                longer = torch.zeros(self.count, *value.shape[1:], dtype=value.dtype)
                longer[:, : whole.shape[1]] = whole
                whole = self.tensors[name] = longer
            place = whole[first : first + len(value)]
            (place[:, : value.shape[1]] if value.ndim > 1 else place).copy_(value)


def pinned(rows: Tensor, device: torch.device | str) -> Tensor:
    """``rows`` where a copy to ``device`` can be queued from: for a GPU in pinned memory."""
    if torch.device(device).type not in ("cpu", "meta") and rows.device.type == "cpu":
        return rows.pin_memory()
    return rows


def to_device(rows: Tensor, device: torch.device | str) -> Tensor:
    """``rows`` on ``device``. A copy from the host to a GPU is queued, and the host does not wait for it."""
    return pinned(rows, device).to(device, non_blocking=True)
