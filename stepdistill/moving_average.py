"""The student's moving average over the run: the weights that are exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stepdistill.parts import copy_of_part, part


class MovingAverage:
    """An exponential moving average of a network's parameters; ``weights`` has it by name, empty where decay is 0.

    Args:
        network: what is averaged, and carries the average inside :meth:`applied`. decay: how much of it stays a step.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network, self.decay = network, decay
        own = dict(network.named_parameters()) if decay else {}
        self.weights = {name: copy_of_part(parameter) for name, parameter in own.items()}

    def update(self, step: int) -> None:
        """Move towards the network's weights after ``step``."""
        if self.weights:
            moving = [part(parameter) for parameter in self.network.parameters()]
            # A young average of decay 0.999 would mostly be the teacher: its horizon grows with the run.
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.weights.values()), moving, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the average's weights."""
        own = {name: part(parameter) for name, parameter in self.network.named_parameters()}
        kept = {name: own[name].clone() for name in self.weights}
        for name, value in self.weights.items():
            own[name].copy_(value)
        try:
            yield
        finally:
            for name, value in kept.items():
                own[name].copy_(value)
