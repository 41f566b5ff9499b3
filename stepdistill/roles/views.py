"""Views of networks for a role: one adapter of a shared backbone, or weights that the role must not train."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils.hooks import RemovableHandle

from stepdistill.errors import InputError, suggest
from stepdistill.roles.quantized import baked

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer


_hooks: list[Callable[[], RemovableHandle]] = []
"""What :func:`hooked` has registered now."""


@contextmanager
def hooked(*register: Callable[[], RemovableHandle]) -> Iterator[None]:
    """Inside, these hooks are registered; blocks that run again in the backward pass have those of their forward."""
    with ExitStack() as handles:
        for one in register:
            handles.callback(one().remove)
        _hooks.extend(register)
        try:
            yield
        finally:
            del _hooks[len(_hooks) - len(register) :]


class AdapterView(nn.Module):
    """The shared backbone, which has all its adapters, with one switched on while it runs, or none (the teacher).

    Outside of a view's forward the backbone is bare: whoever calls it gets the teacher.

    Its parameters are the adapter's alone, so an optimizer or a checkpoint of this role never sees another's.
    """

    def __init__(self, backbone: nn.Module, adapter: str | None):
        super().__init__()
        self.backbone, self.adapter = backbone, adapter
        self._layers = peft_layers(backbone)  # found once: for a large network the walk takes long beside a step

    def forward(self, *arguments, **keywords):
        _switch(self._layers, self.adapter is None, [self.adapter] if self.adapter else [])
        try:
            return self.backbone(*arguments, **keywords)
        finally:
            _switch(self._layers, True, [])

    def named_parameters(self, *arguments, **keywords) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*arguments, **keywords):
            pairs = itertools.pairwise(name.split("."))
            owner = next((part for before, part in pairs if before.startswith("lora_")), None)
            if owner == self.adapter:
                yield name, parameter


def save_memory(network: nn.Module) -> None:
    """Let a diffusers network recompute its blocks' activations in the backward pass, adapters and hooks as they were.

    These belong to the whole backbone, and another role has run by the time of the backward pass.

    Raises:
        InputError: the network has no blocks that it could recompute.
    """
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise InputError(f"train.gradient_checkpointing: {type(network).__name__} does not support it")
    layers = peft_layers(network)

    def recomputed(block: Callable, *arguments: Any) -> Any:
        then, hooks = _switches(layers), tuple(_hooks)

        def run(*inputs: Any) -> Any:
            now = _switches(layers)
            _switch(layers, *then)
            try:
                with hooked(*(one for one in hooks if one not in _hooks)):
                    return block(*inputs)
            finally:
                _switch(layers, *now)

        return torch.utils.checkpoint.checkpoint(run, *arguments, use_reentrant=False)

    network.enable_gradient_checkpointing(recomputed)


def _switches(layers: list["BaseTunerLayer"]) -> tuple[bool, list[str]]:
    """What is on: the same for all layers, since views switch them together."""
    return (layers[0]._disable_adapters, layers[0]._active_adapter) if layers else (True, [])


def _switch(layers: list["BaseTunerLayer"], disabled: bool, active: list[str]) -> None:
    for layer in layers:
        # peft's set_adapter() would also rewrite requires_grad, which belongs to the trainer. Past the slow
        # __setattr__ of nn.Module, because this runs twice in every call, for each layer.
        layer.__dict__.update(_disable_adapters=disabled, _active_adapter=active)


@contextmanager
def noting_inputs(network: nn.Module) -> Iterator[None]:
    """Inside, each layer that is given its input by name is noted: peft's layers take no names, so it gets no LoRA."""

    def note(layer: nn.Module, arguments: tuple, keywords: dict) -> None:
        if keywords and not arguments:
            layer.input_by_name = True

    with ExitStack() as handles:
        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                handles.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield


def lora_targets(
    network: nn.Module, targets: Sequence[str] | Literal["auto"] = "auto", key: str = "student.targets"
) -> list[str]:
    """Full names of the layers that get a LoRA.

    Args:
        targets: endings of names, such as "to_q" or "ff.net.0.proj"; "auto": every linear layer, and the ungrouped
            convolutions of a UNet's or transformer's blocks; not those that :func:`noting_inputs` has noted.
        key: of the recipe, for messages.

    Raises:
        InputError: an ending fits no linear layer or convolution, or one that can have no LoRA.
    """
    layers = {
        name: module
        for name, module in network.named_modules()
        # An IP-Adapter's weights are no parameters.
        if isinstance(module, nn.Linear | nn.Conv2d) and isinstance(module.weight, nn.Parameter)
    }
    by_name = {name for name, layer in layers.items() if getattr(layer, "input_by_name", False)}
    if targets == "auto":
        # A convolution outside of the blocks reads or writes the image itself; peft's rank must divide into groups.
        return [
            name
            for name, layer in layers.items()
            if name not in by_name and (isinstance(layer, nn.Linear) or (layer.groups == 1 and "block" in name))
        ]
    for ending in targets:
        if not any(_ends(name, ending) for name in layers):
            endings = {name.rpartition(".")[2] for name in layers}
            raise InputError(
                f"{key}: expected endings of layers of {type(network).__name__}, found {ending!r}"
                f"{suggest(ending, endings)}"
            )
    chosen = [name for name in layers if any(_ends(name, ending) for ending in targets)]
    if refused := by_name.intersection(chosen):
        name = type(network).__name__
        raise InputError(
            f"{key}: expected no layer that {name} gives its input by name, which a LoRA's layers do not take, found "
            f"{min(refused)}"
        )
    return chosen


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def peft_layers(backbone: nn.Module) -> list["BaseTunerLayer"]:
    """The layers that have adapters, of any role."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]


def adapter_layers(view: AdapterView) -> list["BaseTunerLayer"]:
    """The layers that have the view's own adapter."""
    return [layer for layer in peft_layers(view.backbone) if view.adapter in layer.scaling]


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
    """The network of a role as one plain module, adapters merged into the weights, weights rounded that it rounds.

    Always a copy.

    Raises:
        InputError: what was added to the network has no stock form.
    """
    if hasattr(network, "plain"):
        return network.plain()
    if not isinstance(network, AdapterView):
        return baked(copy.deepcopy(network))
    merged = copy.deepcopy(network.backbone)
    layers = set(peft_layers(merged))
    for name, module in list(merged.named_modules()):
        if module in layers:
            if network.adapter:
                module.merge(adapter_names=[network.adapter])
            parent = merged.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    return merged
