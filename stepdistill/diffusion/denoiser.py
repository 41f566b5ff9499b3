"""Denoiser: (x_t, t, cond) -> Prediction, for any network whose call is described by a CallSpec."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from stepdistill.diffusion import experts
from stepdistill.diffusion.experts import Experts, Part, Turn
from stepdistill.diffusion.features import FEATURE_DEPTHS, hidden_states
from stepdistill.diffusion.joint import Joint
from stepdistill.diffusion.nested import first_tensor, tensors_in, unflatten
from stepdistill.diffusion.passes import in_pass
from stepdistill.diffusion.path import Path
from stepdistill.diffusion.ragged import Ragged
from stepdistill.diffusion.routing import Router
from stepdistill.diffusion.row_layout import RowLayout
from stepdistill.diffusion.schedule import Kind, Prediction, Schedule
from stepdistill.diffusion.window import Window
from stepdistill.errors import InputError
from stepdistill.kernels import Rule

Conditions = dict[str, Tensor]
"""Batch-first tensors keyed by the network's argument; an entry of a dict argument is named "argument.key"."""

Output = Literal["identity", "negated", "first_half", "negated_first_half", "first_half_of_last_axis"]
"""How the network's raw output becomes what its scheduler is given."""

SECOND_TIME = "second_time"
"""The argument for r, the end of a step, of networks with ``takes_r = True``."""


@dataclass(frozen=True)
class CallSpec:
    """How to call one network.

    Args:
        sample: name of the argument that takes x_t.
        timestep: name of the one that takes time, (B,).
        timestep_scale: network's timestep = scale * scheduler's timestep + offset.
        timestep_offset: the offset in it.
        timestep_dtype: what the network is handed; integer types are rounded to.
        timestep_mask: of a network that takes a time for each frame or token: ones of shape (1, ...), and zeros where
            its time is 0 at every step. None: it takes a time for each row, (B,).
        times: further arguments that are given the same time at every call.
        times_apart: such arguments with a layout of their own, and what :attr:`timestep_mask` is of each.
        output: how the raw output becomes the prediction (the first half of the channels where the
            second is a learned variance).
        constants: arguments that are neither sample, time nor condition (img_ids, return_dict=False, ...),
            named like conditions.
        expanded: the constants stored as one row that want the batch's length (an embedded guidance scale).
        window: where x_t lies in the argument that takes it. What is beside it are conditions, see :attr:`beside`.
        lists: arguments that are lists with an entry per image; where the sample is one, so is the output.
        apart: arguments that are lists (or tuples: their type) of tensors with a row per image each (the pictures of
            several ControlNets): each tensor is a condition, named "argument.number".
        layouts: of the arguments whose rows are not those of the first axis.
        masks: (mask, its dtype) of each condition that is padded with zeros to the longest of its rows. The mask is
            a condition too: the network's own argument, or (for a list) what is cut out of each row.
        helpers: networks that run first and whose outputs are arguments of this one (a ControlNet).
        norm_axis: along which guided outputs are scaled back to the conditional ones' norm; None: they are not.
        guided_channels: how many channels are guided, where those after them are the conditional output's; None: all.
        rule: what guidance is besides uncond + w (cond - uncond).
        experts: when each is called, from the noise end to the clean end, where several networks take turns.
        router: which of several students is called for which condition; None: there is one.
        mix: (a, b) of each unconditional pass, the first of which is the null condition, where there are several: the
            guided output is w cond + the sum of (a + b w) times theirs. Empty: there is one.
        guider: a :class:`stepdistill.diffusion.guiders.Guider` in the place of all these rules; None: these rules.
        path: how the network sees x_t and what it emits, where the pipeline converts both; None: as the scheduler does.
        joint: how several samples make one; then :attr:`sample` names the packed one, which the network does not take.
        ragged: how conditions whose rows have shapes of their own reach the network; None: none have.
    """

    sample: str
    timestep: str
    timestep_scale: float = 1.0
    timestep_offset: float = 0.0
    timestep_dtype: torch.dtype = torch.float32
    timestep_mask: Tensor | None = field(default=None, compare=False)
    times: frozenset[str] = frozenset()
    times_apart: Mapping[str, Tensor | None] = field(default_factory=dict, compare=False)
    output: Output = "identity"
    constants: Mapping[str, Any] = field(default_factory=dict)
    expanded: frozenset[str] = frozenset()
    window: Window = field(default_factory=Window)
    lists: frozenset[str] = frozenset()
    apart: Mapping[str, type] = field(default_factory=dict)
    layouts: Mapping[str, RowLayout] = field(default_factory=dict)
    masks: Mapping[str, tuple[str, torch.dtype]] = field(default_factory=dict)
    helpers: tuple["Helper", ...] = ()
    norm_axis: int | None = None
    guided_channels: int | None = None
    rule: Rule = field(default_factory=Rule)
    experts: Mapping[str, Turn] = field(default_factory=dict)
    router: Router | None = None
    mix: tuple[tuple[float, float], ...] = ()
    guider: Any = None
    path: Path | None = None
    joint: Joint | None = None
    ragged: Ragged | None = None

    @property
    def beside(self) -> tuple[str, ...]:
        """The names of the conditions that are beside x_t in its argument, one for each axis that holds more."""
        return self.window.beside_names(self.sample)

    def _of_helper(self, name: str) -> bool:
        return any(name.startswith(helper.prefix) for helper in self.helpers)

    def network_timestep(self, timestep: Tensor) -> Tensor:
        """A scheduler's timestep (any shape) in the unit and dtype of the network."""
        value = timestep.double() * self.timestep_scale + self.timestep_offset
        return (value if self.timestep_dtype.is_floating_point else value.round()).to(self.timestep_dtype)

    def raw_output(self, returned: Any) -> Tensor:
        """The tensor in whatever the network returned that holds the prediction."""
        return first_tensor(returned) if self.joint is None else self.joint.output(returned)

    def decode_output(self, returned: Any) -> Tensor:
        """The prediction (B, ...) inside whatever the network returned."""
        tensor = self.window.prediction(self.raw_output(returned))
        if "first_half" in self.output:
            tensor = tensor.chunk(2, dim=-1 if self.output.endswith("last_axis") else 1)[0]
        return -tensor if self.output.startswith("negated") else tensor

    def taken_apart(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call with the tensors of the lists that are :attr:`apart` under names of their own."""
        lists = {name: arguments[name] for name in self.apart.keys() & arguments.keys()}
        parts = {f"{name}.{number}": part for name, value in lists.items() for number, part in enumerate(value)}
        return {name: value for name, value in arguments.items() if name not in lists} | parts

    def conditions(self, arguments: Mapping[str, Any], names: Iterable[str]) -> Conditions:
        """The conditions ``names`` among the arguments of a call, batch first: the inverse of a Denoiser's call.

        Lists become padded tensors with masks; a mask that was left out, as nothing is padded, becomes one of ones.
        """
        conditions: Conditions = {}
        arguments = arguments if self.joint is None else self.joint.packed_call(arguments)
        if self.ragged is not None:
            arguments = self.ragged.packed_call(arguments, self.window.rows(arguments[self.sample]))
        for helper in self.helpers:
            inner = helper.denoiser.spec.conditions(helper.own(arguments), helper.own(dict.fromkeys(names)))
            conditions |= {helper.prefix + name: value for name, value in inner.items()}
        arguments, masks = self.taken_apart(arguments), {mask for mask, _ in self.masks.values()}
        if self.window.spans:
            arguments |= dict(zip(self.beside, self.window.beside(arguments[self.sample]), strict=True))
        for name in (name for name in names if name not in masks and not self._of_helper(name)):
            value = arguments[name]
            if name in self.masks:
                mask, dtype = self.masks[name]
                if name in self.lists:
                    present = pad_sequence([torch.ones(len(row), dtype=dtype) for row in value], batch_first=True)
                    value = pad_sequence(list(value), batch_first=True)
                    conditions[mask] = present.to(value.device)
                else:
                    given = arguments.get(mask)
                    conditions[mask] = given if given is not None else torch.ones_like(value[..., 0], dtype=dtype)
            if name in self.layouts:
                value = self.layouts[name].rows(value)
            conditions[name] = torch.stack(list(value)) if isinstance(value, list | tuple) else value
        return conditions


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


class Denoiser:
    """One role's view of a network, or of several: each gets the rows of a batch at its times or of its conditions.

    Args:
        network: any module; it is put in eval mode and stays there (label dropout lives in train mode).
        spec: how it is called.
        schedule: alpha and sigma of its time.
        kind: what its output means.

    ``evaluations`` counts the rows that went through the network so far, the unit of a run's cost.
    """

    def __init__(self, network: nn.Module, spec: CallSpec, schedule: Schedule, kind: Kind):
        self.network = network.eval()
        self.spec, self.schedule, self.kind = spec, schedule, kind
        self.evaluations = 0
        self._placed: dict[tuple[torch.device, int], tuple[CallSpec, dict[str, Any]]] = {}

    @property
    def norm_axis(self) -> int | None:
        """The axis along which guidance leaves the conditional output's norm as it was, see :class:`CallSpec`."""
        return self.spec.norm_axis

    @property
    def rule(self) -> Rule:
        """How guidance combines this network's outputs, see :class:`CallSpec`."""
        return self.spec.rule

    @property
    def mix(self) -> tuple[tuple[float, float], ...]:
        """How several unconditional passes are combined, see :class:`CallSpec`."""
        return self.spec.mix

    @property
    def takes_r(self) -> bool:
        """Whether a call may carry the end of its step (:class:`stepdistill.roles.added.TimeEmbedded`)."""
        return getattr(self.network, "takes_r", False)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditions, r: Tensor | None = None) -> Prediction:
        """The network's prediction at ``x_t`` (B, ...) and time ``t`` (B,) in [0, 1], 1 = noise.

        Args:
            r: the time (B,) at which the step ends, 0 the clean end, for a network that takes one.

        Raises:
            InputError: there is an r and the network has no place for it.
        """
        raw, path = self.spec.decode_output(self.run(x_t, t, cond, r)), self.spec.path
        if path is not None:
            raw = path.prediction(raw, self.schedule, x_t, t, self.kind)
        return Prediction(raw, x_t, t, self.schedule, self.kind)

    def run(self, x_t: Tensor, t: Tensor, cond: Conditions, r: Tensor | None = None) -> Any:
        """The network's own return value, of one counted call; of several calls the output (B, ...) of all rows.

        Experts take one each, and so does every row where conditions have shapes of their own.
        """
        self.evaluations += len(x_t)
        if not self.takes_turns and self.spec.ragged is None:
            return self.network(**self.arguments(x_t, t, cond, r))
        split = self._split(t, cond)
        return experts.gathered([self.spec.raw_output(self._part(one, x_t, t, cond, r)) for one in split], split)

    @property
    def takes_turns(self) -> bool:
        """Whether several networks answer, each at its own times or for its own conditions."""
        return isinstance(innermost(self.network), Experts)

    def _split(self, t: Tensor, cond: Conditions) -> list[Part]:
        """The networks that answer a batch, with their rows; where there is one it has no name."""
        if self.spec.ragged is not None:
            return self.spec.ragged.rows(in_pass(cond, 0))
        if self.spec.router is not None:
            return self.spec.router.parts(cond)
        return experts.parts(self.schedule.timestep(t), self.spec.experts)

    def _part(self, part: Part, x_t: Tensor, t: Tensor, cond: Conditions, r: Tensor | None = None) -> Any:
        """What one network returns for its rows of a batch."""
        name, rows = part
        cond = {key: experts.taken(value, rows) for key, value in cond.items()}
        x_t, t, r = experts.taken(x_t, rows), experts.taken(t, rows), None if r is None else experts.taken(r, rows)
        return self.network(**self.arguments(x_t, t, cond, r), **({experts.EXPERT: name} if name else {}))

    def on(self, network: nn.Module) -> "Denoiser":
        """The same call on other weights."""
        return Denoiser(network, self.spec, self.schedule, self.kind)

    def called(self, spec: CallSpec, schedule: Schedule | None = None) -> "Denoiser":
        """The same network called in another way."""
        return Denoiser(self.network, spec, schedule or self.schedule, self.kind)

    def call_as(self, other: "Denoiser") -> None:
        """Call this network as ``other`` is called, from here on: the call of samples of another size."""
        self.spec, self.schedule = other.spec, other.schedule

    def features(self, x_t: Tensor, t: Tensor, cond: Conditions, depths: int | None = FEATURE_DEPTHS) -> list[Tensor]:
        """Hidden states of the network's blocks, shallow to deep, with grad; at most ``depths``, None: of all.

        A network of equal blocks gives evenly spaced depths, (B, tokens, width) each; a UNet gives the
        deepest of its down blocks and its middle, (B, channels, h, w).
        """
        if not self.takes_turns and self.spec.ragged is None:
            return hidden_states(self.network, lambda: self.run(x_t, t, cond), depths)
        self.evaluations += len(x_t)
        own, split = innermost(self.network).get_submodule, self._split(t, cond)
        states = [hidden_states(own(one[0]), partial(self._part, one, x_t, t, cond), depths) for one in split]
        if len({tuple(state.shape[1:] for state in part) for part in states}) > 1:
            reason = "expected prompts of one length for a method that reads the network's hidden states"
            raise InputError(f"data.conditions: {reason}, found several, which this pipeline does not pad")
        return [experts.gathered(depth, split) for depth in zip(*states, strict=True)]

    def arguments(self, x_t: Tensor, t: Tensor, cond: Conditions, r: Tensor | None = None) -> dict[str, Any]:
        """The keyword arguments of the network's call; floating tensors in the network's dtype."""
        spec, batch = self.spec, len(x_t)
        dtype = _dtype(self.network)
        flat: dict[str, Any] = {}
        place = x_t.device, id(spec)
        if place not in self._placed:  # copied there once: each copy would wait for the device
            constants = {**spec.constants, **spec.times_apart, spec.timestep: spec.timestep_mask}
            self._placed[place] = spec, {name: _on(x_t.device, value) for name, value in constants.items()}
        for name, value in self._placed[place][1].items():
            if name in spec.expanded:
                value = value.expand(batch, *value.shape[1:]) if isinstance(value, Tensor) else value * batch
            flat[name] = value
        for helper in spec.helpers:
            cond, inner = dict(cond), helper.own(cond)
            for name in inner:
                del cond[helper.prefix + name]
            flat |= helper.outputs(x_t, t, inner, dtype)
        for name, value in in_pass(cond, 0).items():
            flat[name] = value.to(dtype) if dtype and value.is_floating_point() else value
        beside = [flat.pop(name) for name in spec.beside]
        seen = x_t if spec.path is None else spec.path.sample(self.schedule, x_t, t)
        flat[spec.sample] = spec.window.argument(seen.to(dtype) if dtype else seen, beside)
        for name in spec.lists & flat.keys():
            rows = list(flat[name].unbind())
            if name in spec.masks:
                rows = [row[present] for row, present in zip(rows, flat.pop(spec.masks[name][0]), strict=True)]
            flat[name] = rows
        times = self.schedule.timestep(t) if spec.path is None else spec.path.time(self.schedule, t)
        times = spec.network_timestep(times)
        for name in (spec.timestep, *spec.times_apart):
            mask = flat[name]
            flat[name] = times if mask is None else times.reshape(-1, *[1] * (mask.ndim - 1)) * mask
        flat |= dict.fromkeys(spec.times, flat[spec.timestep])
        for name in spec.layouts.keys() & flat.keys():
            flat[name] = spec.layouts[name].argument(flat[name])
        if r is not None:
            if not self.takes_r:
                name = type(innermost(self.network)).__name__
                raise InputError(f"{name} has no input for a second time r; TimeEmbedded, in adapt(), adds one")
            flat[SECOND_TIME] = r
        flat = flat if spec.ragged is None else spec.ragged.network_call(flat)
        nested = unflatten(flat if spec.joint is None else spec.joint.network_call(flat))
        return nested | {name: kind(nested[name]) for name, kind in spec.apart.items() if name in nested}


@dataclass(frozen=True)
class Helper:
    """A network that takes the same sample at every step and feeds its outputs to the denoiser.

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
        tensors = tensors_in(self.denoiser.run(x_t, t, cond))
        tensors = [value.to(dtype) if dtype else value for value in tensors]
        return {
            name: tensors[index] if isinstance(index, int) else [tensors[one] for one in index]
            for name, index in self.feeds.items()
        }


def _on(device: torch.device, value: Any) -> Any:
    """``value`` with the tensors in it on ``device``."""
    if isinstance(value, list | tuple):
        return type(value)(_on(device, item) for item in value) if type(value) in (list, tuple) else value
    return value.to(device) if isinstance(value, Tensor) else value


def _dtype(network: nn.Module) -> torch.dtype | None:
    """The dtype of the network's floating parameters, None when it has none; of a view those of what it looks at."""
    return next((p.dtype for p in innermost(network).parameters() if p.is_floating_point()), None)


def innermost(network: nn.Module) -> nn.Module:
    """The network that a view, or what was put around a network, stands on; the network itself otherwise."""
    inner = getattr(network, "backbone", getattr(network, "network", None))
    # Experts may have any names.
    return network if inner is None or isinstance(network, Experts) else innermost(inner)
