"""Experts: several networks of one class as one denoiser, each at times of its own (Wan 2.2) or for its conditions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

EXPERT = "expert"
"""The argument that names the network which answers a call of :class:`Experts`."""


class Experts(nn.ModuleDict):
    """Networks that take turns, by the names of their pipeline's components, as one module.

    A role trains, copies and stores it as it does any other network: its weights are named "component.weight". Which
    network answers is the caller's affair (:class:`stepdistill.diffusion.denoiser.Denoiser` splits a batch by time).
    """

    def forward(self, **arguments: Any) -> Any:
        """What the network named by ``expert`` returns for the other arguments, one call for rows of its times."""
        return self[arguments.pop(EXPERT)](**arguments)

    @property
    def first(self) -> nn.Module:
        """The network of the noise end. The others have its class, and take what it takes."""
        return next(iter(self.values()))

    @property
    def _supports_gradient_checkpointing(self) -> bool:
        return getattr(self.first, "_supports_gradient_checkpointing", False)

    def enable_gradient_checkpointing(self, function: Callable) -> None:
        """As diffusers' networks do."""
        networks: Any = self.values()
        for network in networks:
            network.enable_gradient_checkpointing(function)

    def set_attention_backend(self, backend: str) -> None:
        """As diffusers' networks do."""
        networks: Any = self.values()
        for network in networks:
            network.set_attention_backend(backend)


class Turn(NamedTuple):
    """When one of several networks is called, and how it is guided.

    Args:
        lowest: the lowest timestep of the scheduler at which it is called.
        scale: the guidance scale that it has of its own; None: the pipeline's.
    """

    lowest: float
    scale: float | None = None


def in_words(turns: Mapping[str, Turn]) -> str:
    """When each is called, in a sentence."""
    said, above = [], ""
    for name, turn in turns.items():
        times = f"{f'below {above}' if above else ''}{' and ' if above and turn.lowest else ''}"
        times += f"from timestep {turn.lowest:g} up" if turn.lowest else ""
        said.append(f"{name} {times}{f', guided with its own scale {turn.scale:g}' if turn.scale is not None else ''}")
        above = f"{turn.lowest:g}"
    return "; ".join(said)


Part = tuple[str, Tensor | None]
"""An expert and the indices (rows,) of its rows in a batch; None: it has them all."""


def parts(timestep: Tensor, turns: Mapping[str, Turn]) -> list[Part]:
    """The experts that answer a batch, with their rows. It is one read from the device.

    Args:
        timestep: the scheduler's, (B,).
        turns: of each expert, from the noise end to the clean end.
    """
    if len(turns) == 1:
        return [(name, None) for name in turns]
    # In float32, in which pipelines compare: there and back through a time in [0, 1] is exact in it.
    values = timestep.detach().float().cpu()
    edges = torch.tensor([turn.lowest for turn in turns.values()][:-1], dtype=torch.float32)
    place = (values[:, None] < edges).sum(1)
    rows = {name: (place == number).nonzero()[:, 0] for number, name in enumerate(turns)}
    present = {name: index.to(timestep.device) for name, index in rows.items() if len(index)}
    return [(name, index if len(present) > 1 else None) for name, index in present.items()]


def taken(value: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of ``value`` (B, ...); None: all."""
    return value if rows is None else value[rows]


def gathered(outputs: Sequence[Tensor], split: Sequence[Part]) -> Tensor:
    """The rows (B, ...) of a batch in their order, from those of each part."""
    if split[0][1] is None:
        return outputs[0]
    return torch.cat(list(outputs))[torch.cat([rows for _, rows in split]).argsort()]
