"""Denoiser: (x_t, t, cond) -> Prediction, for any network whose call is described by a CallSpec."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepdistill.schedule import Kind, Prediction, Schedule

Conditions = dict[str, Tensor]
"""Batch-first tensors keyed by the network's argument; an entry of a dict argument is named "argument.key"."""

Output = Literal["identity", "negated", "first_half"]
"""How the network's raw output becomes what its scheduler is given."""

FEATURE_DEPTHS = 4


@dataclass(frozen=True)
class CallSpec:
    """How to call one network.

    Args:
        sample: name of the argument that takes x_t. timestep: name of the one that takes time, (B,).
        timestep_scale, timestep_offset: network's timestep = scale * scheduler's timestep + offset.
        timestep_dtype: what the network is handed; integer types are rounded to.
        output: how the raw output becomes the prediction (the first half of the channels where the
            second is a learned variance).
        constants: arguments that are neither sample, time nor condition (img_ids, return_dict=False, ...),
            named like conditions.
        expanded: the constants that are stored as one row and want the batch's length (an embedded
            guidance scale).
    """

    sample: str
    timestep: str
    timestep_scale: float = 1.0
    timestep_offset: float = 0.0
    timestep_dtype: torch.dtype = torch.float32
    output: Output = "identity"
    constants: Mapping[str, Any] = field(default_factory=dict)
    expanded: frozenset[str] = frozenset()

    def network_timestep(self, timestep: Tensor) -> Tensor:
        """A scheduler's timestep (any shape) in the unit and dtype of the network."""
        value = timestep.double() * self.timestep_scale + self.timestep_offset
        return (value if self.timestep_dtype.is_floating_point else value.round()).to(self.timestep_dtype)

    def decode_output(self, raw: Any) -> Tensor:
        """The prediction (B, ...) inside whatever the network returned."""
        tensor = first_tensor(raw)
        match self.output:
            case "identity":
                return tensor
            case "negated":
                return -tensor
            case "first_half":
                return tensor.chunk(2, dim=1)[0]
        raise ValueError(f"unknown output map {self.output!r}")


def first_tensor(output: Any) -> Any:
    """The first entry of a network's return value: a tensor itself, a tuple's or a model output's first."""
    if isinstance(output, Tensor):
        return output
    return next(iter(output.values() if isinstance(output, Mapping) else output))


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """``output`` with another first entry; the inverse of :func:`first_tensor`."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, Mapping):
        return type(output)(**{**output, next(iter(output)): tensor})
    return type(output)((tensor, *output[1:]))


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict arguments as one level with dotted names; empty dicts stay values."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`, in new dicts (networks pop from the dicts they are given)."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[leaf] = dict(value) if isinstance(value, Mapping) else value
    return nested


class Denoiser:
    """One role's view of a network.

    Args:
        network: any module; it is put in eval mode and stays there (label dropout lives in train mode).
        spec: how it is called. schedule, kind: what its output means.

    ``evaluations`` counts the rows that went through the network so far, the unit of a run's cost.
    """

    def __init__(self, network: nn.Module, spec: CallSpec, schedule: Schedule, kind: Kind):
        self.network = network.eval()
        self.spec, self.schedule, self.kind = spec, schedule, kind
        self.evaluations = 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Prediction:
        """What the network says at ``x_t`` (B, ...) and time ``t`` (B,) in [0, 1], 1 = noise."""
        raw = self.network(**self.arguments(x_t, t, cond))
        return Prediction(self.spec.decode_output(raw), x_t, t, self.schedule, self.kind)

    def on(self, network: nn.Module) -> "Denoiser":
        """The same call on other weights."""
        return Denoiser(network, self.spec, self.schedule, self.kind)

    def features(self, x_t: Tensor, t: Tensor, cond: Conditions) -> list[Tensor]:
        """Hidden states of the network's blocks, shallow to deep, with grad; at most 4.

        A network of equal blocks gives evenly spaced depths, (B, tokens, width) each; a UNet gives the
        deepest of its down blocks and its middle, (B, channels, h, w).
        """
        return hidden_states(self.network, lambda: self.network(**self.arguments(x_t, t, cond)))

    def arguments(self, x_t: Tensor, t: Tensor, cond: Conditions) -> dict[str, Any]:
        """The keyword arguments of the network's call; floating tensors in the network's dtype."""
        spec, batch = self.spec, len(x_t)
        self.evaluations += batch
        dtype = _dtype(self.network)
        flat: dict[str, Any] = {}
        for name, value in spec.constants.items():
            if isinstance(value, Tensor):
                value = value.to(x_t.device)
                if name in spec.expanded:
                    value = value.expand(batch, *value.shape[1:])
            flat[name] = value
        for name, value in cond.items():
            flat[name] = value.to(dtype) if dtype and value.is_floating_point() else value
        flat[spec.sample] = x_t.to(dtype) if dtype else x_t
        flat[spec.timestep] = spec.network_timestep(self.schedule.timestep(t))
        return unflatten(flat)


def hidden_states(network: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """What the feature blocks of ``network`` emit while ``run`` calls it, in order, with grad."""
    captured: list[Tensor] = []
    with ExitStack() as hooks:
        for block in feature_blocks(network):
            handle = block.register_forward_hook(lambda _module, _inputs, out: captured.append(_hidden(out)))
            hooks.callback(handle.remove)
        run()
    return captured


def feature_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks whose outputs are the network's features, in call order.

    Raises:
        ValueError: the network has no list of blocks.
    """
    lists: dict[str, nn.ModuleList] = {}
    middle: list[nn.Module] = []
    for name, module in network.named_modules():
        if any(name.startswith(f"{outer}.") for outer in lists):
            continue
        if isinstance(module, nn.ModuleList) and len(module):
            lists[name] = module
        elif name.split(".")[-1] == "mid_block":
            middle.append(module)
    if middle:
        down = [block for name, blocks in lists.items() if name.endswith("down_blocks") for block in blocks]
        return [*down, *middle][-FEATURE_DEPTHS:]
    blocks = [block for name, blocks in lists.items() if name.endswith("blocks") for block in blocks]
    blocks = blocks or [block for blocks in lists.values() for block in blocks]
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no ModuleList of blocks to take features from")
    count = min(FEATURE_DEPTHS, len(blocks))
    return [blocks[(i + 1) * len(blocks) // count - 1] for i in range(count)]


def _hidden(output: Any) -> Tensor:
    """A block's image stream: its output, or the last tensor of a tuple (text stream first, residuals nested)."""
    if isinstance(output, Tensor):
        return output
    return [value for value in output if isinstance(value, Tensor)][-1]


def _dtype(network: nn.Module) -> torch.dtype | None:
    """The dtype of the network's floating parameters, None when it has none; of a view those of what it looks at."""
    while (inner := getattr(network, "backbone", getattr(network, "network", None))) is not None:
        network = inner
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), None)
