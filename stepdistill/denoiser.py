"""Denoiser: (x_t, t, cond) -> Prediction, for any network whose call is described by a CallSpec."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from stepdistill.kernels import Rule
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
            guidance scale, the size of each image).
        frame_axis: where the network has an axis of length 1 that latents have not, or None.
        lists: arguments that are lists with an entry per image; where the sample is one, so is the output.
        masks: (mask, its dtype) of each condition that is padded with zeros to the longest of its rows. The mask is
            a condition too: the network's own argument, or (for a list) what is cut out of each row.
        helpers: networks that are asked first, and whose outputs are arguments of this one (a ControlNet).
        appended: where the sample argument is x_t and more after it (an inpainting network's mask and masked image):
            the axis, and x_t's length along it. What comes after is a condition, named :attr:`extra`.
        keeps_norm: guided outputs are scaled back to the conditional ones' norm along the last axis.
        rule: what guidance is besides uncond + w (cond - uncond).
    """

    sample: str
    timestep: str
    timestep_scale: float = 1.0
    timestep_offset: float = 0.0
    timestep_dtype: torch.dtype = torch.float32
    output: Output = "identity"
    constants: Mapping[str, Any] = field(default_factory=dict)
    expanded: frozenset[str] = frozenset()
    frame_axis: int | None = None
    lists: frozenset[str] = frozenset()
    masks: Mapping[str, tuple[str, torch.dtype]] = field(default_factory=dict)
    helpers: tuple["Helper", ...] = ()
    appended: tuple[int, int] | None = None
    keeps_norm: bool = False
    rule: Rule = field(default_factory=Rule)

    @property
    def extra(self) -> str | None:
        """The condition that is appended to x_t, None where nothing is."""
        return None if self.appended is None else f"{self.sample} appended"

    def _of_helper(self, name: str) -> bool:
        return any(name.startswith(helper.prefix) for helper in self.helpers)

    def network_timestep(self, timestep: Tensor) -> Tensor:
        """A scheduler's timestep (any shape) in the unit and dtype of the network."""
        value = timestep.double() * self.timestep_scale + self.timestep_offset
        return (value if self.timestep_dtype.is_floating_point else value.round()).to(self.timestep_dtype)

    def decode_output(self, raw: Any) -> Tensor:
        """The prediction (B, ...) inside whatever the network returned."""
        tensor = first_tensor(raw)
        if self.frame_axis is not None:
            tensor = tensor.squeeze(self.frame_axis)
        match self.output:
            case "identity":
                return tensor
            case "negated":
                return -tensor
            case "first_half":
                return tensor.chunk(2, dim=1)[0]
        raise ValueError(f"unknown output map {self.output!r}")

    def conditions(self, arguments: Mapping[str, Any], names: Iterable[str]) -> Conditions:
        """The conditions ``names`` among the arguments of a call, batch first: the inverse of a Denoiser's call.

        Lists become padded tensors with masks; a mask that was left out, as nothing is padded, becomes one of ones.
        """
        found: Conditions = {}
        for helper in self.helpers:
            told = helper.denoiser.spec.conditions(helper.own(arguments), helper.own(dict.fromkeys(names)))
            found |= {helper.prefix + name: value for name, value in told.items()}
        masks = {mask for mask, _ in self.masks.values()}
        for name in (name for name in names if name not in masks and not self._of_helper(name)):
            if name == self.extra:
                axis, length = self.appended
                whole = arguments[self.sample]
                found[name] = whole.narrow(axis, length, whole.shape[axis] - length)
                continue
            value = arguments[name]
            if name in self.masks:
                mask, dtype = self.masks[name]
                if name in self.lists:
                    kept = pad_sequence([torch.ones(len(row), dtype=dtype) for row in value], batch_first=True)
                    value = pad_sequence(list(value), batch_first=True)
                    found[mask] = kept.to(value.device)
                else:
                    given = arguments.get(mask)
                    found[mask] = given if given is not None else torch.ones_like(value[..., 0], dtype=dtype)
            found[name] = torch.stack(list(value)) if isinstance(value, list | tuple) else value
        return found


def joined(parts: Sequence[Conditions]) -> Conditions:
    """The rows of all ``parts``, padded with zeros to one length where their lengths differ."""
    whole: Conditions = {}
    for name in parts[0]:
        rows = [part[name] for part in parts]
        if rows[0].ndim > 1:
            longest = max(value.shape[1] for value in rows)
            padding = (0, 0) * (rows[0].ndim - 2)
            rows = [functional.pad(value, (*padding, 0, longest - value.shape[1])) for value in rows]
        whole[name] = torch.cat(rows)
    return whole


def first_tensor(output: Any) -> Any:
    """The first entry of a network's return value: a tensor itself, a tuple's or a model output's first.

    A list that holds a tensor per image is stacked.
    """
    if not isinstance(output, Tensor | list):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return torch.stack(output) if is_list_of_rows(output) else output


def is_list_of_rows(value: Any) -> bool:
    """Whether ``value`` is a list of tensors of one shape."""
    return isinstance(value, list) and all(isinstance(row, Tensor) for row in value) and len({*map(_shape, value)}) == 1


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """``output`` with another first entry; the inverse of :func:`first_tensor`."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, list):
        return list(tensor.unbind())
    if isinstance(output, Mapping):
        name, first = next(iter(output.items()))
        return type(output)(**{**output, name: with_first_tensor(first, tensor)})
    return type(output)((with_first_tensor(output[0], tensor), *output[1:]))


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict arguments as one level with dotted names; empty dicts stay values.

    A list of tensors inside a dict (an image embedding for each IP-Adapter) is one, named by numbers.
    """
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if prefix and isinstance(value, list) and value and all(isinstance(item, Tensor) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
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
    return {name: _with_lists(value) for name, value in nested.items()}


def _with_lists(value: Any) -> Any:
    """``value`` with lists for the dicts in it that have numbers as names."""
    if not isinstance(value, dict):
        return value
    inner = {name: _with_lists(item) for name, item in value.items()}
    return list(inner.values()) if "0" in inner else inner


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
        self._placed: dict[torch.device, dict[str, Any]] = {}

    @property
    def keeps_norm(self) -> bool:
        """Whether guidance leaves the conditional output's norm as it was, see :class:`CallSpec`."""
        return self.spec.keeps_norm

    @property
    def rule(self) -> Rule:
        """How guidance combines this network's outputs, see :class:`CallSpec`."""
        return self.spec.rule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Prediction:
        """What the network says at ``x_t`` (B, ...) and time ``t`` (B,) in [0, 1], 1 = noise."""
        raw = self.network(**self.arguments(x_t, t, cond))
        return Prediction(self.spec.decode_output(raw), x_t, t, self.schedule, self.kind)

    def on(self, network: nn.Module) -> "Denoiser":
        """The same call on other weights."""
        return Denoiser(network, self.spec, self.schedule, self.kind)

    def features(self, x_t: Tensor, t: Tensor, cond: Conditions, depths: int | None = FEATURE_DEPTHS) -> list[Tensor]:
        """Hidden states of the network's blocks, shallow to deep, with grad; at most ``depths``, None: of all.

        A network of equal blocks gives evenly spaced depths, (B, tokens, width) each; a UNet gives the
        deepest of its down blocks and its middle, (B, channels, h, w).
        """
        return hidden_states(self.network, lambda: self.network(**self.arguments(x_t, t, cond)), depths)

    def arguments(self, x_t: Tensor, t: Tensor, cond: Conditions) -> dict[str, Any]:
        """The keyword arguments of the network's call; floating tensors in the network's dtype."""
        spec, batch = self.spec, len(x_t)
        self.evaluations += batch
        dtype = _dtype(self.network)
        flat: dict[str, Any] = {}
        if x_t.device not in self._placed:  # copied there once: each copy would wait for the device
            self._placed[x_t.device] = {name: _on(x_t.device, value) for name, value in spec.constants.items()}
        for name, value in self._placed[x_t.device].items():
            if name in spec.expanded:
                value = value.expand(batch, *value.shape[1:]) if isinstance(value, Tensor) else value * batch
            flat[name] = value
        for helper in spec.helpers:
            cond, told = dict(cond), helper.own(cond)
            for name in told:
                del cond[helper.prefix + name]
            flat |= helper.outputs(x_t, t, told, dtype)
        for name, value in cond.items():
            flat[name] = value.to(dtype) if dtype and value.is_floating_point() else value
        flat[spec.sample] = x_t.to(dtype) if dtype else x_t
        if spec.appended is not None:
            flat[spec.sample] = torch.cat([flat[spec.sample], flat.pop(spec.extra)], spec.appended[0])
        if spec.frame_axis is not None:
            flat[spec.sample] = flat[spec.sample].unsqueeze(spec.frame_axis)
        for name in spec.lists & flat.keys():
            rows = list(flat[name].unbind())
            if name in spec.masks:
                rows = [row[kept] for row, kept in zip(rows, flat.pop(spec.masks[name][0]), strict=True)]
            flat[name] = rows
        flat[spec.timestep] = spec.network_timestep(self.schedule.timestep(t))
        return unflatten(flat)


@dataclass(frozen=True)
class Helper:
    """A network that is asked about the same sample at every step, and what its outputs are for the denoiser.

    Args:
        name: the pipeline's component. Its conditions are named "name/argument".
        denoiser: how it is called; what it says is no prediction.
        feeds: the denoiser's argument that is its i-th output tensor, or the list of several.
    """

    name: str
    denoiser: Denoiser
    feeds: Mapping[str, int | tuple[int, ...]]

    @property
    def prefix(self) -> str:
        """What the names of its conditions start with."""
        return f"{self.name}/"

    def own(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Of ``named`` what is this network's, under its own names."""
        return {name.removeprefix(self.prefix): v for name, v in named.items() if name.startswith(self.prefix)}

    def outputs(self, x_t: Tensor, t: Tensor, cond: Conditions, dtype: torch.dtype | None) -> dict[str, Any]:
        """The denoiser's arguments that this network makes, in ``dtype``, with graph."""
        said = tensors_in(self.denoiser.network(**self.denoiser.arguments(x_t, t, cond)))
        said = [value.to(dtype) if dtype else value for value in said]
        return {
            name: said[index] if isinstance(index, int) else [said[one] for one in index]
            for name, index in self.feeds.items()
        }


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors inside nested lists, tuples and mappings, in order."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [value] if isinstance(value, Tensor) else []


def hidden_states(network: nn.Module, run: Callable[[], Any], depths: int | None = FEATURE_DEPTHS) -> list[Tensor]:
    """What the feature blocks of ``network`` emit while ``run`` calls it, in order, with grad."""
    captured: list[Tensor] = []
    with ExitStack() as hooks:
        # Compiled code has no place for hooks that come later.
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for block in feature_blocks(network, depths):
            handle = block.register_forward_hook(lambda _module, _inputs, out: captured.append(_hidden(out)))
            hooks.callback(handle.remove)
        run()
    return captured


def feature_blocks(network: nn.Module, depths: int | None = FEATURE_DEPTHS) -> list[nn.Module]:
    """The blocks whose outputs are the network's features, in call order; at most ``depths``, None: all.

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
        return [*down, *middle][-(depths or 0) :]
    blocks = [block for name, blocks in lists.items() if name.endswith("blocks") for block in blocks]
    blocks = blocks or [block for blocks in lists.values() for block in blocks]
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no ModuleList of blocks to take features from")
    count = min(depths or len(blocks), len(blocks))
    return [blocks[(i + 1) * len(blocks) // count - 1] for i in range(count)]


def _hidden(output: Any) -> Tensor:
    """A block's image stream: its output, or the last tensor of a tuple (text stream first, residuals nested)."""
    if isinstance(output, Tensor):
        return output
    return [value for value in output if isinstance(value, Tensor)][-1]


def _on(device: torch.device, value: Any) -> Any:
    """``value`` with the tensors in it on ``device``."""
    if isinstance(value, list | tuple):
        return type(value)(_on(device, item) for item in value) if type(value) in (list, tuple) else value
    return value.to(device) if isinstance(value, Tensor) else value


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _dtype(network: nn.Module) -> torch.dtype | None:
    """The dtype of the network's floating parameters, None when it has none; of a view those of what it looks at."""
    return next((p.dtype for p in innermost(network).parameters() if p.is_floating_point()), None)


def innermost(network: nn.Module) -> nn.Module:
    """The network that a view, or what was put around a network, stands on; the network itself otherwise."""
    while (inner := getattr(network, "backbone", getattr(network, "network", None))) is not None:
        network = inner
    return network
