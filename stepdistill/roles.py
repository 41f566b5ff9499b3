"""Teacher, student, critic: full copies of the teacher's network, or adapters on one shared backbone."""

import copy
import itertools
import warnings
from collections.abc import Iterator

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from stepdistill.methods.base import Roles
from stepdistill.pipeline.denoiser import Denoiser


class AdapterView(nn.Module):
    """The shared backbone with one adapter switched on, or with none (the teacher).

    Its parameters are the adapter's alone, so an optimizer or a checkpoint of this role never sees another's.
    """

    def __init__(self, backbone: nn.Module, adapter: str | None):
        super().__init__()
        self.backbone, self.adapter = backbone, adapter

    def forward(self, *arguments, **keywords):
        for layer in _adapter_layers(self.backbone):
            # peft's set_adapter() would also rewrite requires_grad, which belongs to the trainer.
            layer._disable_adapters = self.adapter is None
            layer._active_adapter = [self.adapter] if self.adapter else []
        return self.backbone(*arguments, **keywords)

    def named_parameters(self, *arguments, **keywords) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*arguments, **keywords):
            pairs = itertools.pairwise(name.split("."))
            owner = next((part for before, part in pairs if before.startswith("lora_")), None)
            if owner == self.adapter:
                yield name, parameter


def _adapter_layers(backbone: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]


def build_roles(teacher: Denoiser, train: str, extra: tuple[str, ...], scale: float, lora_rank: int) -> Roles:
    """The roles of a run, all starting as the teacher.

    Args:
        teacher: the traced denoiser; its network is frozen here.
        train: "full" (every role is a copy) or "lora" (every role is an adapter on the teacher's own weights).
        extra: "critic" and "target" where the method wants them. scale: the guidance scale to distil.
    """
    teacher.network.requires_grad_(False)
    names = ("student", *extra)
    if train == "full":
        networks = {name: copy.deepcopy(teacher.network) for name in names}
        return Roles(teacher, scale=scale, **{name: teacher.on(network) for name, network in networks.items()})
    backbone = teacher.network
    # A new adapter starts with B = 0, so each role starts as the teacher exactly.
    with warnings.catch_warnings():
        # Several adapters on one network are the point here, and peft warns of the second.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for name in names:
            config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules="all-linear", init_lora_weights=True)
            inject_adapter_in_model(config, backbone, adapter_name=name)
    backbone.requires_grad_(False)
    views = {name: teacher.on(AdapterView(backbone, name)) for name in names}
    if "target" in views:
        _copy_adapter(views["student"].network, views["target"].network)
    return Roles(teacher.on(AdapterView(backbone, None)), scale=scale, **views)


def _copy_adapter(source: nn.Module, target: nn.Module) -> None:
    for (_, a), (_, b) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        b.data.copy_(a.data)


def plain_network(network: nn.Module) -> nn.Module:
    """The network of a role as one plain module, adapters merged into the weights; always a copy."""
    if not isinstance(network, AdapterView):
        return copy.deepcopy(network)
    merged = copy.deepcopy(network.backbone)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(adapter_names=[network.adapter])
            parent = merged.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    return merged
