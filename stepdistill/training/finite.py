"""Non-finite losses and gradients, detected without making the host wait for the device."""

import math
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.devices import torch_of
from stepdistill.errors import RunError


class NonFiniteError(RunError):
    """A loss, gradient or weight that is not a number: names the player, the term and the step."""


class FiniteWatch:
    """Collects a step's losses and gradient norms, and reads them once, a step later.

    A device then always has work queued while the host looks at numbers it has long finished.
    """

    def __init__(self) -> None:
        self._names: list[tuple[str, int]] = []
        self._values: list[Tensor] = []
        self._pending: tuple[list[tuple[str, int]], Tensor, Any] | None = None

    def add(self, name: str, step: int, value: Tensor) -> None:
        """Watch a 0-d tensor; ``name`` and ``step`` say what it is."""
        self._names.append((name, step))
        self._values.append(value.detach().float())

    def end_step(self) -> None:
        """Start moving this step's numbers to the host, and :meth:`check` those of the step before."""
        self.check()
        if not self._values:
            return
        numbers, event = torch.stack(self._values), None
        if numbers.device.type != "cpu":
            host, event = torch.empty(numbers.shape, pin_memory=True), torch_of(numbers.device).Event()
            numbers = host.copy_(numbers, non_blocking=True)
            event.record()
        self._pending, self._names, self._values = (self._names, numbers, event), [], []

    def check(self) -> None:
        """Read the numbers of the steps that have ended.

        Raises:
            NonFiniteError: one of them is infinite or not a number.
        """
        if self._pending is None:
            return
        (names, numbers, event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        for (name, step), value in zip(names, numbers.tolist(), strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} is {value} at step {step + 1}")
