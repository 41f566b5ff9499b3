"""The student's average over the run: the weights that are exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class MovingAverage:
    """An exponential moving average of a network's parameters; ``weights`` has it by name, empty where decay is 0.

    Args:
        network: what is averaged, and carries the average inside :meth:`applied`.
        decay: how much of it stays a step.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network, self.decay = network, decay
        own = dict(network.named_parameters()) if decay else {}
        self.weights = {name: parameter.detach().clone() for name, parameter in own.items()}

    def update(self, step: int) -> None:
        """Move towards the network's weights after ``step``."""
        if self.weights:
            moving = [parameter.detach() for parameter in self.network.parameters()]
            # A young average of decay 0.999 would mostly be the teacher: its horizon grows with the run.
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.weights.values()), moving, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the average's weights."""
        average = self.weights
        own = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        before = {name: own[name].clone() for name in average}
        for name, value in average.items():
            own[name].copy_(value)
        try:
            yield
        finally:
            for name, value in before.items():
                own[name].copy_(value)


class ScheduleFreeAverage(MovingAverage):
    """The average x of schedule-free AdamW (Defazio et al. 2024), as that optimizer's ``eval`` makes it.

    A network in training has y = beta1 x + (1 - beta1) z. To be exported or drawn is x, which is derived from y and the
    optimizer's z whenever it is wanted: the network goes on from the same bits, as it would not after ``eval`` and
    ``train`` in turn.

    Args:
        network: the student's.
        optimizer: schedulefree's AdamWScheduleFree, in its training mode.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer):
        self.network, self.optimizer = network, optimizer

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """x by name; the network's own weights before the first update."""
        beta, average = self.optimizer.param_groups[0]["betas"][0], {}
        for name, parameter in self.network.named_parameters():
            y, z = parameter.detach(), self.optimizer.state.get(parameter, {}).get("z")
            average[name] = y.clone() if z is None else torch.lerp(y, z, 1 - 1 / beta)
        return average

    def update(self, step: int) -> None:
        """Nothing: the optimizer does it."""
