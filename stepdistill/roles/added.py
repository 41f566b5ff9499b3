"""Inputs added to a network that fold into its stock weights: a guidance scale, a second time, a smoother time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.diffusion.denoiser import SECOND_TIME
from stepdistill.errors import InputError
from stepdistill.roles.views import hooked, plain_network

if TYPE_CHECKING:
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps


class Adapted(nn.Module, ABC):
    """A network with something added; called like the network, and with what was added as further arguments.

    Its parameters are those the network's view admits to (none of a frozen one) and those that were added.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @property
    def takes_r(self) -> bool:
        """Whether a call may carry the end of its step, see :class:`TimeEmbedded`."""
        return getattr(self.network, "takes_r", False)

    def named_parameters(self, prefix: str = "", *arguments, **keywords) -> Iterator[tuple[str, nn.Parameter]]:
        start = f"{prefix}." if prefix else ""
        for name, child in self.named_children():
            yield from child.named_parameters(start + name, *arguments, **keywords)

    @abstractmethod
    def plain(self) -> nn.Module:
        """A network of the stock class that does the same; always a copy.

        What no stock weights can hold comes fastened to it (:mod:`stepdistill.roles.guidance_adapters`).

        Raises:
            InputError: there is no such network.
        """


class NumberEmbedded(Adapted):
    """A network that gets a number beside the time, on any diffusers UNet or transformer.

    A small MLP of the number's Fourier features is added to every embedding of the time. It starts at zero, so the
    network starts as it was. One number for all calls adds a constant, which :meth:`plain` folds into the embedding's
    bias: stock again. Different numbers at different steps have no stock form.

    Args:
        network: the network or an adapter view of it.
        number: that of calls that name none, and of the export.
        width: hidden width of the MLP.
    """

    FEATURES = 256
    keyword: ClassVar[str]
    """The argument of a call that is the number, (B,)."""

    zero: ClassVar[float] = 0.0
    """The number whose features are those of time 0."""

    def __init__(self, network: nn.Module, number: float, width: int = 256):
        super().__init__(network)
        self.number = number
        modules = time_embeddings(network)
        if not modules:
            raise InputError(f"{type(network).__name__} has no timestep embedding that {self.keyword} could join")
        self.trunk = nn.Sequential(nn.Linear(self.FEATURES, width), nn.SiLU())
        self.leaves = nn.ModuleList(nn.Linear(width, module.linear_2.out_features) for module in modules)
        for leaf in self.leaves:
            nn.init.zeros_(leaf.weight)
            nn.init.zeros_(leaf.bias)

    def forward(self, *arguments, **keywords):
        hidden = self._hidden(keywords.pop(self.keyword, None))
        # At the layer whose bias it becomes: an activation may follow.
        register = [
            partial(
                module.linear_2.register_forward_hook,
                lambda _module, _inputs, out, added=leaf(hidden): out + _row_by_row(added, out).to(out.dtype),
            )
            for module, leaf in zip(time_embeddings(self.network), self.leaves, strict=True)
        ]
        with hooked(*register):
            return self.network(*arguments, **keywords)

    def _hidden(self, numbers: Tensor | None = None) -> Tensor:
        """The trunk's output (B, width) of numbers (B,); None: of its own number, (1, width)."""
        device = self.leaves[0].weight.device
        numbers = torch.full((1,), self.number, device=device) if numbers is None else numbers.to(device)
        return self.trunk(fourier(numbers.float() - self.zero, self.FEATURES))

    def plain(self) -> nn.Module:
        stock = plain_network(self.network)
        self.fold(stock)
        return stock

    @torch.no_grad()
    def fold(self, network: nn.Module, sign: float = 1.0) -> None:
        """Add what the network gets at its own number to its biases, in place; -1 takes it out again."""
        for module, leaf in zip(time_embeddings(network), self.leaves, strict=True):
            bias = sign * leaf(self._hidden())[0].to(module.linear_2.weight)
            module.linear_2.bias = nn.Parameter(bias + (0 if module.linear_2.bias is None else module.linear_2.bias))

    def embedding(self) -> dict[str, Tensor]:
        """The weights of the embedding of the number alone."""
        parts = {"trunk": self.trunk, "leaves": self.leaves}
        return {
            f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()
        }

    def load_embedding(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`embedding`.

        Raises:
            RuntimeError: names or shapes are others.
        """
        for part, module in (("trunk", self.trunk), ("leaves", self.leaves)):
            start = f"{part}."
            module.load_state_dict({n.removeprefix(start): v for n, v in weights.items() if n.startswith(start)})


class GuidanceEmbedded(NumberEmbedded):
    """A network that gets the guidance scale w as ``guidance_scale`` (B,) (Meng et al. 2023, sec. 3.1)."""

    keyword = "guidance_scale"
    zero = 1.0


class TimeEmbedded(NumberEmbedded):
    """A network that gets the end r of its step, a time in [0, 1], beside the time t at which it starts.

    ``Denoiser(x_t, t, cond, r)`` hands r over; 0 is the clean end. The export holds one r: that of a student of one
    step is 0. The steps of a longer run end at different r, which the one bias of a stock network cannot hold.
    """

    keyword = SECOND_TIME
    takes_r = True

    def __init__(self, network: nn.Module, r: float = 0.0, width: int = 256):
        super().__init__(network, r, width)


def _row_by_row(added: Tensor, embedding: Tensor) -> Tensor:
    """``added`` (1 or B, width) for an embedding (B, width), or of times per token: (B, N, width) or (B N, width)."""
    if embedding.ndim > 2:
        return added.reshape(len(added), *[1] * (embedding.ndim - 2), -1)
    return added if len(added) == 1 else added.repeat_interleave(len(embedding) // len(added), 0)


def fourier(t: Tensor, features: int) -> Tensor:
    """Sines and cosines (B, features) of 1000 t, t (B,), at rates from 1 to 1/10000, as diffusers embeds timesteps."""
    half = features // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / (half - 1))
    angles = 1000 * t.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def time_embeddings(network: nn.Module) -> list["TimestepEmbedding"]:
    """The modules that embed the time, in the network's order; of a time for each row their outputs are (B, width).

    Of each parent with sinusoids (diffusers' ``Timesteps``) the first: later ones embed sizes, an aspect or guidance.
    In a network with other sinusoids the first of each parent.
    """
    from diffusers.models.embeddings import TimestepEmbedding

    paired = [embedding for _, embedding in _sinusoids_and_embeddings(network)]
    firsts = (_first_child(parent, TimestepEmbedding) for parent in network.modules())
    return paired or [embedding for embedding in firsts if embedding is not None]


class SlowTime(Adapted):
    """A network whose sense of time is smooth: the fast sinusoids of its timestep embedding are damped.

    A network trained on whole timesteps learns nothing of what lies between them, and its derivative in time is mostly
    the noise of sinusoids with periods of a few timesteps. Damping those leaves its predictions as good as they were.
    :meth:`plain` folds the factors into the embedding's weights: stock again. Networks that embed time otherwise than
    diffusers' ``Timesteps`` stay as they are.

    Args:
        network: the network or an adapter view of it.
        period: damped by half, in timesteps; shorter ones more.
    """

    def __init__(self, network: nn.Module, period: float):
        super().__init__(network)
        self.period = period

    def forward(self, *arguments, **keywords):
        register = [
            partial(
                embedding.linear_1.register_forward_pre_hook,
                lambda _module, inputs, slow=timesteps: (
                    inputs[0] * self.factors(slow, inputs[0].device).to(inputs[0]),
                ),
            )
            for timesteps, embedding in _sinusoids_and_embeddings(self.network)
        ]
        with hooked(*register):
            return self.network(*arguments, **keywords)

    def factors(self, timesteps: "Timesteps", device: torch.device | str = "cpu") -> Tensor:
        """1 / (1 + (period / own period)^4) of each feature (features,), sines and cosines alike."""
        half = timesteps.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float64, device=device) / (half - timesteps.downscale_freq_shift)
        rates = timesteps.scale * torch.exp(-math.log(10000) * exponents)
        factors = 1 / (1 + (self.period * rates / (2 * math.pi)) ** 4)
        return torch.cat([factors, factors, factors.new_ones(timesteps.num_channels % 2)])

    @torch.no_grad()
    def plain(self) -> nn.Module:
        stock = plain_network(self.network)
        for timesteps, embedding in _sinusoids_and_embeddings(stock):
            embedding.linear_1.weight.mul_(self.factors(timesteps).to(embedding.linear_1.weight))
        return stock


def _sinusoids_and_embeddings(network: nn.Module) -> list[tuple["Timesteps", "TimestepEmbedding"]]:
    """Each embedding of time with its sinusoids: the first pair of a parent."""
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    pairs = ((_first_child(parent, Timesteps), _first_child(parent, TimestepEmbedding)) for parent in network.modules())
    return [pair for pair in pairs if None not in pair]


def _first_child(parent: nn.Module, kind: type[nn.Module]) -> nn.Module | None:
    return next((child for child in parent.children() if isinstance(child, kind)), None)
