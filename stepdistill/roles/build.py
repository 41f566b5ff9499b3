"""Teacher, student, critic: full copies of the teacher's network, or adapters on one shared backbone."""

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.roles import Roles, RoleTraining
from stepdistill.roles.views import AdapterView, FrozenView, lora_targets


@dataclass(frozen=True)
class LoRA:
    """The adapter of a role: W + alpha / rank B A.

    Args:
        rank: of A and B.
        alpha: None: the rank, at which the adapter's scale is 1.
        targets: the layers, see :func:`stepdistill.roles.views.lora_targets`.
        section: of the recipe, for messages.
    """

    rank: int
    alpha: float | None = None
    targets: Sequence[str] | Literal["auto"] = "auto"
    section: str = "student"

    @property
    def config(self) -> dict[str, float]:
        """Rank and alpha as peft names them."""
        return {"r": self.rank, "lora_alpha": self.rank if self.alpha is None else self.alpha}


def build_roles(
    teacher: Denoiser,
    training: Mapping[str, RoleTraining],
    scale: float,
    lora: LoRA,
    critic: LoRA | None = None,
    base: nn.Module | None = None,
    precise: nn.Module | None = None,
    home: torch.device | None = None,
    slow: Sequence[str] = ("target",),
) -> Roles:
    """The roles of a run, all starting as the teacher.

    Args:
        teacher: the traced denoiser; its network is frozen here.
        training: how each role beside the teacher gets its weights, by the role's name: "full" (a copy), "lora" (an
            adapter on the teacher's own weights) or "frozen" (the teacher's own weights, for methods that add to them).
        scale: the guidance scale to distil.
        lora: every role's adapter.
        critic: the critic's; None: like the others'.
        base: what the student and its slow copies stand on instead of the teacher's network: a smaller one
            (:func:`stepdistill.roles.pruning.pruned`), or one of the teacher's experts; an adapter needs the latter.
        precise: the teacher's network with exact weights, which copies are made of where its own are rounded.
        home: where copies are kept; None: where the teacher is.
        slow: names of the roles that start as the student.

    Raises:
        InputError: a target names no layer.
    """
    for frozen in (teacher.network, *(helper.denoiser.network for helper in teacher.spec.helpers)):
        frozen.requires_grad_(False)
    networks: dict[str, nn.Module] = {}
    own = ("student", *slow) if base is not None else ()
    # Copies first: an adapter changes the network it is put on.
    for name, how in training.items():
        if how == "full":
            source = teacher.network if precise is None else precise
            source = base if name in own else source
            networks[name] = _copied(source, home or _device(teacher.network))
    backbone, adapters = teacher.network, [name for name, how in training.items() if how == "lora"]
    backbones = {name: base if name in own else backbone for name in training}
    # A new adapter starts with B = 0, so each role starts as the teacher exactly.
    with warnings.catch_warnings():
        # Several adapters on one network are the point here, and peft warns of the second.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        settings = {name: critic if critic and name == "critic" else lora for name in adapters}
        # Names of layers, all of them before the first adapter changes them.
        layers = {
            name: lora_targets(backbones[name], one.targets, f"{one.section}.targets") for name, one in settings.items()
        }
        for name, one in settings.items():
            targets = "|".join(map(re.escape, layers[name]))
            config = LoraConfig(**one.config, target_modules=targets, init_lora_weights=True)
            inject_adapter_in_model(config, backbones[name], adapter_name=name)
    for module in backbone.modules():
        if isinstance(module, BaseTunerLayer):
            for part in module.adapter_layer_names:
                getattr(module, part).float()  # the backbone may be in half precision
    backbone.requires_grad_(False)
    bare = {id(one): AdapterView(one, None) if adapters else one for one in (backbone, *backbones.values())}
    for name, how in training.items():
        if how != "full":
            one = backbones[name]
            networks[name] = AdapterView(one, name) if how == "lora" else FrozenView(bare[id(one)])
    for name in set(slow) & set(adapters) if "student" in adapters else ():
        _copy_adapter(networks["student"], networks[name])
    views = {name: teacher.on(network) for name, network in networks.items()}
    return Roles(teacher.on(bare[id(backbone)]), scale=scale, **views)


def _copied(source: nn.Module, home: torch.device) -> nn.Module:
    """A copy in float32, each of whose tensors is made where it stays."""
    memo: dict[int, torch.Tensor] = {}
    for tensor in (*nn.Module.parameters(source), *source.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        made = tensor.detach().to(home, dtype, copy=True)
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(source, memo)


def share_weights(network: nn.Module, source: nn.Module) -> None:
    """Give a copy of ``source`` on the meta device its weights: the same memory, often pages of files.

    They are not to be changed in place before the copy is sharded.
    """
    for name, module in network.named_modules():
        own = source.get_submodule(name)
        for key, weight in own.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(weight.detach(), requires_grad=False))
        for key, buffer in own.named_buffers(recurse=False):
            module._buffers[key] = buffer.detach().clone()


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _copy_adapter(source: nn.Module, target: nn.Module) -> None:
    for (_, a), (_, b) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        b.data.copy_(a.data)
