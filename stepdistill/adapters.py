"""What is put around a network: LoRA views of a shared backbone, a guidance-scale input, small trained parts."""

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.recipe_errors import suggest


class AdapterView(nn.Module):
    """The shared backbone with one adapter switched on, or with none (the teacher).

    Its parameters are the adapter's alone, so an optimizer or a checkpoint of this role never sees another's.
    """

    def __init__(self, backbone: nn.Module, adapter: str | None):
        super().__init__()
        self.backbone, self.adapter = backbone, adapter

    def forward(self, *arguments, **keywords):
        _switch(_adapter_layers(self.backbone), self.adapter is None, [self.adapter] if self.adapter else [])
        return self.backbone(*arguments, **keywords)

    def named_parameters(self, *arguments, **keywords) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*arguments, **keywords):
            pairs = itertools.pairwise(name.split("."))
            owner = next((part for before, part in pairs if before.startswith("lora_")), None)
            if owner == self.adapter:
                yield name, parameter


def save_memory(network: nn.Module) -> None:
    """Let a diffusers network recompute its blocks' activations in the backward pass, adapters as they were.

    The adapter that is on belongs to the whole backbone, and another role has run by the time of the backward pass.

    Raises:
        InputError: the network has no blocks that it could recompute.
    """
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise InputError(f"train.gradient_checkpointing: {type(network).__name__} does not support it")
    layers = _adapter_layers(network)

    def recomputed(block: Callable, *arguments: Any) -> Any:
        then = _switches(layers)

        def run(*inputs: Any) -> Any:
            now = _switches(layers)
            _switch(layers, *then)
            try:
                return block(*inputs)
            finally:
                _switch(layers, *now)

        return torch.utils.checkpoint.checkpoint(run, *arguments, use_reentrant=False)

    network.enable_gradient_checkpointing(recomputed)


def _switches(layers: list[BaseTunerLayer]) -> tuple[bool, list[str]]:
    """What is on: the same for all layers, since views switch them together."""
    return (layers[0]._disable_adapters, layers[0]._active_adapter) if layers else (True, [])


def _switch(layers: list[BaseTunerLayer], disabled: bool, active: list[str]) -> None:
    for layer in layers:
        # peft's set_adapter() would also rewrite requires_grad, which belongs to the trainer.
        layer._disable_adapters, layer._active_adapter = disabled, active


def lora_targets(
    network: nn.Module, wanted: Sequence[str] | Literal["auto"] = "auto", key: str = "student.targets"
) -> list[str]:
    """Full names of the layers that get a LoRA.

    Args:
        wanted: endings of names, such as "to_q" or "ff.net.0.proj"; "auto": every linear layer, and the ungrouped
            convolutions of a UNet's or transformer's blocks. key: of the recipe, for messages.

    Raises:
        InputError: an ending fits no linear layer or convolution.
    """
    layers = {
        name: module
        for name, module in network.named_modules()
        # An IP-Adapter's weights are no parameters.
        if isinstance(module, nn.Linear | nn.Conv2d) and isinstance(module.weight, nn.Parameter)
    }
    if wanted == "auto":
        # A convolution outside of the blocks reads or writes the image itself; peft's rank must divide into groups.
        return [
            name
            for name, layer in layers.items()
            if isinstance(layer, nn.Linear) or (layer.groups == 1 and "block" in name)
        ]
    for ending in wanted:
        if not any(_ends(name, ending) for name in layers):
            endings = {name.rpartition(".")[2] for name in layers}
            raise InputError(
                f"{key}: expected endings of layers of {type(network).__name__}, found {ending!r}"
                f"{suggest(ending, endings)}"
            )
    return [name for name in layers if any(_ends(name, ending) for ending in wanted)]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _adapter_layers(backbone: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]


class Adapted(nn.Module, ABC):
    """A network with something added; called like the network, with an optional ``guidance_scale`` (B,).

    Its parameters are those the network's view admits to (none of a frozen one) and those that were added.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def named_parameters(self, prefix: str = "", *arguments, **keywords) -> Iterator[tuple[str, nn.Parameter]]:
        start = f"{prefix}." if prefix else ""
        for name, child in self.named_children():
            yield from child.named_parameters(start + name, *arguments, **keywords)

    @abstractmethod
    def plain(self) -> nn.Module:
        """A network of the stock class that does the same; always a copy.

        What no stock weights can hold comes fastened to it (:mod:`stepdistill.guidance_adapters`).

        Raises:
            InputError: there is no such network.
        """


class GuidanceEmbedded(Adapted):
    """A network that is told the guidance scale w, on any diffusers UNet or transformer (Meng et al. 2023, sec. 3.1).

    A small MLP of w's Fourier features is added to every embedding of the time. It starts at zero, so the network
    starts as it was. At one w it adds a constant, which :meth:`plain` folds into the embedding's bias: stock again.

    Args:
        network: the network or an adapter view of it. scale: the w of calls that name none, and of the export.
    """

    FEATURES = 256

    def __init__(self, network: nn.Module, scale: float, width: int = 256):
        super().__init__(network)
        self.scale = scale
        modules = time_embeddings(network)
        if not modules:
            raise InputError(f"{type(network).__name__} has no timestep embedding that a guidance scale could join")
        self.trunk = nn.Sequential(nn.Linear(self.FEATURES, width), nn.SiLU())
        self.leaves = nn.ModuleList(nn.Linear(width, module.linear_2.out_features) for module in modules)
        for leaf in self.leaves:
            nn.init.zeros_(leaf.weight)
            nn.init.zeros_(leaf.bias)

    def forward(self, *arguments, guidance_scale: Tensor | None = None, **keywords):
        device = self.leaves[0].weight.device
        w = torch.full((1,), self.scale, device=device) if guidance_scale is None else guidance_scale
        hidden = self.trunk(fourier(w.to(device), self.FEATURES))
        with ExitStack() as hooks:
            for module, leaf in zip(time_embeddings(self.network), self.leaves, strict=True):
                # At the layer whose bias it becomes: an activation may follow.
                handle = module.linear_2.register_forward_hook(
                    lambda _module, _inputs, out, added=leaf(hidden): out + added.to(out.dtype)
                )
                hooks.callback(handle.remove)
            return self.network(*arguments, **keywords)

    def plain(self) -> nn.Module:
        stock = plain_network(self.network)
        self.fold(stock)
        return stock

    @torch.no_grad()
    def fold(self, network: nn.Module, sign: float = 1.0) -> None:
        """Add what the network gets at its own w to its biases, in place; -1 takes it out again."""
        device = self.leaves[0].weight.device
        hidden = self.trunk(fourier(torch.full((1,), self.scale, device=device), self.FEATURES))
        for module, leaf in zip(time_embeddings(network), self.leaves, strict=True):
            bias = sign * leaf(hidden)[0].to(module.linear_2.weight)
            module.linear_2.bias = nn.Parameter(bias + (0 if module.linear_2.bias is None else module.linear_2.bias))

    def embedding(self) -> dict[str, Tensor]:
        """The weights of the embedding of w alone."""
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


def fourier(w: Tensor, features: int) -> Tensor:
    """sin and cos features (B, features) of guidance scales (B,), as LCM embeds them: of 1000 (w - 1), base 10000."""
    half = features // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=w.device, dtype=torch.float32) / (half - 1))
    angles = 1000 * (w.float() - 1)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def time_embeddings(network: nn.Module) -> list[TimestepEmbedding]:
    """The modules that embed the time, in the network's order; their outputs are (B, width).

    Of each parent with sinusoids (diffusers' ``Timesteps``) the first: later ones embed sizes, an aspect or guidance.
    In a network with other sinusoids the first of each parent.
    """
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
        network: the network or an adapter view of it. period: damped by half, in timesteps; shorter ones more.
    """

    def __init__(self, network: nn.Module, period: float):
        super().__init__(network)
        self.period = period

    def forward(self, *arguments, **keywords):
        with ExitStack() as hooks:
            for timesteps, embedding in _sinusoids_and_embeddings(self.network):
                handle = embedding.linear_1.register_forward_pre_hook(
                    lambda _module, inputs, slow=timesteps: (
                        inputs[0] * self.factors(slow, inputs[0].device).to(inputs[0]),
                    )
                )
                hooks.callback(handle.remove)
            return self.network(*arguments, **keywords)

    def factors(self, timesteps: Timesteps, device: torch.device | str = "cpu") -> Tensor:
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


def _sinusoids_and_embeddings(network: nn.Module) -> list[tuple[Timesteps, TimestepEmbedding]]:
    """Each embedding of time with its sinusoids: the first pair of a parent."""
    pairs = ((_first_child(parent, Timesteps), _first_child(parent, TimestepEmbedding)) for parent in network.modules())
    return [pair for pair in pairs if None not in pair]


def _first_child(parent: nn.Module, kind: type[nn.Module]) -> nn.Module | None:
    return next((child for child in parent.children() if isinstance(child, kind)), None)


class FrozenView(nn.Module):
    """A network that a role uses and must not train: it runs, and has no parameters to show."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, *arguments, **keywords):
        return self.backbone(*arguments, **keywords)

    def named_parameters(self, *arguments, **keywords) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())

    def plain(self) -> nn.Module:
        """A copy of the network itself."""
        return copy.deepcopy(self.backbone)


def plain_network(network: nn.Module) -> nn.Module:
    """The network of a role as one plain module, adapters merged into the weights; always a copy.

    Raises:
        InputError: what was added to the network has no stock form.
    """
    if isinstance(network, Adapted | FrozenView):
        return network.plain()
    if not isinstance(network, AdapterView):
        return copy.deepcopy(network)
    merged = copy.deepcopy(network.backbone)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if network.adapter:
                module.merge(adapter_names=[network.adapter])
            parent = merged.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    return merged
