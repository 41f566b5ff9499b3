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

from stepdistill.adapters import AdapterView, FrozenView, lora_targets
from stepdistill.denoiser import Denoiser
from stepdistill.methods.base import Roles, RoleTraining


@dataclass(frozen=True)
class LoRA:
    """The adapter of a role: W + alpha / rank B A.

    Args:
        rank: of A and B.
        alpha: None: the rank, at which the adapter's scale is 1.
        targets: the layers, see :func:`stepdistill.adapters.lora_targets`.
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
    smaller: nn.Module | None = None,
    precise: nn.Module | None = None,
    home: torch.device | None = None,
) -> Roles:
    """The roles of a run, all starting as the teacher.

    Args:
        teacher: the traced denoiser; its network is frozen here.
        training: how each role beside the teacher gets its weights, by the role's name: "full" (a copy), "lora" (an
            adapter on the teacher's own weights) or "frozen" (the teacher's own weights, for methods that add to them).
        scale: the guidance scale to distil.
        lora: every role's adapter.
        critic: the critic's; None: like the others'.
        smaller: what student and target are copies of instead, see :func:`stepdistill.pruning.pruned`.
        precise: the teacher's network in float32, which copies are made of where its own weights are rounded.
        home: where copies are kept; None: where the teacher is.

    Raises:
        InputError: a target names no layer.
    """
    for frozen in (teacher.network, *(helper.denoiser.network for helper in teacher.spec.helpers)):
        frozen.requires_grad_(False)
    networks: dict[str, nn.Module] = {}
    # Copies first: an adapter changes the network it is put on.
    for name, how in training.items():
        if how == "full":
            source = teacher.network if precise is None else precise
            source = smaller if smaller is not None and name in ("student", "target") else source
            networks[name] = copy.deepcopy(source).to(home or _device(teacher.network)).float()
    backbone, adapters = teacher.network, [name for name, how in training.items() if how == "lora"]
    # A new adapter starts with B = 0, so each role starts as the teacher exactly.
    with warnings.catch_warnings():
        # Several adapters on one network are the point here, and peft warns of the second.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        wanted = {name: critic if critic and name == "critic" else lora for name in adapters}
        # Names of layers, all of them before the first adapter changes them.
        layers = {name: lora_targets(backbone, one.targets, f"{one.section}.targets") for name, one in wanted.items()}
        for name, one in wanted.items():
            targets = "|".join(map(re.escape, layers[name]))
            config = LoraConfig(**one.config, target_modules=targets, init_lora_weights=True)
            inject_adapter_in_model(config, backbone, adapter_name=name)
    for module in backbone.modules():
        if isinstance(module, BaseTunerLayer):
            for part in module.adapter_layer_names:
                getattr(module, part).float()  # the backbone may be in half precision
    backbone.requires_grad_(False)
    bare = AdapterView(backbone, None) if adapters else backbone
    for name, how in training.items():
        if how != "full":
            networks[name] = AdapterView(backbone, name) if how == "lora" else FrozenView(bare)
    if {"student", "target"} <= set(adapters):
        _copy_adapter(networks["student"], networks["target"])
    views = {name: teacher.on(network) for name, network in networks.items()}
    return Roles(teacher.on(bare), scale=scale, **views)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _copy_adapter(source: nn.Module, target: nn.Module) -> None:
    for (_, a), (_, b) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        b.data.copy_(a.data)
