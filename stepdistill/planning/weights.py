"""Bytes of a run's weights in a plan: of each role, of encoders and autoencoder, and where a frozen backbone rests."""

from dataclasses import dataclass

import torch
from torch import nn

from stepdistill.methods.base import DistillMethod
from stepdistill.planning.fake_pipeline import Blueprint
from stepdistill.recipe import Teacher
from stepdistill.roles.stored_weights import Frozen, stored_layers

ENCODERS, AUTOENCODER = "encoders", "autoencoder and others"
# A weight in 4 bits has a float32 scale for each block of 64; in 8 bits the scale of its row is next to nothing.
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}


@dataclass(frozen=True)
class Weights:
    """Of all networks of a run.

    Args:
        sizes: (parameters, bytes on the device) by name.
        loaded: bytes of the teacher's network as it is loaded.
        offloaded: bytes of it that rest in the host's memory.
        autoencoder: bytes of the autoencoder alone, which rests beside an offloaded network.
    """

    sizes: dict[str, tuple[int, int]]
    loaded: int
    offloaded: int = 0
    autoencoder: int = 0


def weights_of(teacher: Teacher, drawn: Blueprint, method: DistillMethod) -> Weights:
    """Of all networks of a run; what several share counts for the first of them."""
    roles, pipeline = method.roles, drawn.trace.pipeline
    backbone = getattr(roles.teacher.network, "backbone", roles.teacher.network)
    trained = {name: role.network for name, role in roles.items() if name != "teacher"}
    adapters = {id(p) for network in trained.values() for p in network.parameters()}
    groups: dict[str, list[torch.Tensor]] = {
        "teacher": [t for t in (*nn.Module.parameters(backbone), *backbone.buffers()) if id(t) not in adapters]
    }
    for name, network in trained.items():
        groups[name] = [*network.parameters(), *network.buffers()]
    for player in method.players:
        groups.setdefault(player, []).extend(
            p for module in method.checked_modules(player) for p in module.parameters()
        )
    for name in (ENCODERS, AUTOENCODER):
        groups[name] = []
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name not in drawn.trace.components:
            group = groups[ENCODERS if name in drawn.trace.encoders else AUTOENCODER]
            group += [*component.parameters(), *component.buffers()]
    seen: set[int] = set()
    sizes = {}
    for name, tensors in groups.items():
        storages = {id(t.untyped_storage()): t for t in tensors if id(t.untyped_storage()) not in seen}
        seen |= storages.keys()
        count = sum(t.numel() for t in storages.values() if isinstance(t, nn.Parameter))
        sizes[name] = count, sum(t.untyped_storage().nbytes() for t in storages.values())
    count, size = sizes["teacher"]
    loaded = size
    if teacher.quantize is not None:
        size -= _saved(backbone, teacher.quantize, adapters)
    frozen, offloaded = Frozen(None, teacher.storage, teacher.offload), 0
    if frozen:
        away, passing, offloaded = _stored(backbone, frozen)
        size += passing - away
    vae = pipeline.components.get("vae") if "vae" not in drawn.trace.encoders else None
    held = [*vae.parameters(), *vae.buffers()] if isinstance(vae, nn.Module) else []
    autoencoder = sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in held}.values())
    return Weights(sizes | {"teacher": (count, size)}, loaded, offloaded, autoencoder)


def _saved(backbone: nn.Module, quantize: str, adapters: set[int]) -> int:
    """Bytes that few bits save of the linear layers."""
    linear = [module.weight for module in backbone.modules() if isinstance(module, nn.Linear)]
    saves = [w.numel() * (w.element_size() - QUANTIZED_BYTES[quantize]) for w in linear]
    return int(sum(size for weight, size in zip(linear, saves, strict=True) if id(weight) not in adapters))


def _stored(backbone: nn.Module, frozen: Frozen) -> tuple[int, int, int]:
    """Bytes that stored weights save on the device, that the largest takes there while it is used, and in the host."""
    away = passing = offloaded = 0
    for layer, eight in stored_layers(backbone, frozen):
        whole = layer.weight.numel() * layer.weight.element_size()
        held = layer.weight.numel() if eight else whole
        away += whole if frozen.offload else whole - held
        offloaded += held if frozen.offload else 0
        # What is stored, of this layer and the next one, and the restored weight.
        passing = max(passing, (2 * held if frozen.offload else 0) + (whole if eight else 0))
    return away, passing, offloaded
