"""The recipe's method with its roles on the traced teacher's network, and the sampler of its student."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import nn

from stepdistill.diffusion.denoiser import Denoiser, innermost
from stepdistill.diffusion.experts import Experts
from stepdistill.diffusion.samplers import OF_DDIM, SAMPLERS, Sampler
from stepdistill.errors import InputError, in_a_line
from stepdistill.methods.base import DistillMethod
from stepdistill.pipeline.call import SET_ELSEWHERE, TraceError
from stepdistill.pipeline.exports import is_lora, load_adapter
from stepdistill.pipeline.latents import decoder
from stepdistill.pipeline.load import is_export, load_pipeline, pipeline_of
from stepdistill.pipeline.set_up import set_up
from stepdistill.pipeline.stock_call import parameters
from stepdistill.pipeline.trace import Trace
from stepdistill.recipe import Recipe
from stepdistill.roles import Roles
from stepdistill.roles.added import Adapted
from stepdistill.roles.build import LoRA, build_roles
from stepdistill.roles.guidance_adapters import WithGuidanceAdapter
from stepdistill.roles.pruning import pruned
from stepdistill.roles.quantized import quantize_aware
from stepdistill.roles.views import AdapterView, FrozenView, save_memory


def make_sampler(recipe: Recipe, traced: Trace, grid: Callable[[Any, int], dict[str, Any]] | None = None) -> Sampler:
    """The few-step sampler of the recipe's method on the traced teacher's schedule.

    Args:
        grid: (scheduler, steps) -> what the pipeline gives ``set_timesteps``; None: its own run shows it.

    Raises:
        InputError: no stock scheduler runs it there, the pipeline's call cannot use that, or the schedule has no such
            start or no shift.
    """
    config, student, schedule = recipe.method.config, recipe.student, traced.denoiser.schedule
    shift = getattr(config, "time_shift", 1.0)
    if shift != 1 and schedule.name != "flow":
        raise InputError(f"method.time_shift: expected 1 for a {schedule.name} schedule, found {shift:g}")
    sampler = SAMPLERS[recipe.method.implementation.sampler_of(config)]

    def shown(scheduler: Any, steps: int) -> dict[str, Any]:
        try:
            return set_up(traced, scheduler, steps)[0]
        except TraceError as error:
            other = "methods of sampler renoise are dmd2, lcm and most others" if sampler.name == "ddim" else OF_DDIM
            if not _takes(traced, SAMPLERS["renoise" if sampler.name == "ddim" else "ddim"], steps):
                other = _left_out(traced, error.reason) or (
                    "no scheduler of a few steps takes that call, so that no student can be exported"
                )
            raise InputError(
                f"sampler {sampler.name}: with its scheduler in place of the pipeline's own {error.reason}; {other}"
            ) from error

    return sampler(schedule, traced.pipeline.scheduler, student.steps, grid or shown, student.start)


def _left_out(traced: Trace, reason: str) -> str:
    """What leaves out an argument of the pipeline's call that a failure names; empty where it names none."""
    for name, parameter in parameters(traced.pipeline).items():
        named = "_" in name and name.replace("_", " ") in reason.lower()
        if named and name not in SET_ELSEWHERE and traced.arguments.get(name, parameter.default) is not None:
            return f"teacher.arguments.{name}: null leaves it out"
    return ""


def _takes(traced: Trace, kind: type[Sampler], steps: int) -> bool:
    """Whether the pipeline's call runs with the stock scheduler of a sampler."""
    try:
        set_up(traced, kind(traced.denoiser.schedule, traced.pipeline.scheduler, steps).scheduler, steps)
    except InputError:
        return False
    return True


def guidance_scale(recipe: Recipe, traced: Trace) -> float:
    """The scale to distil; 1 where it is an input of the network, and there is no second pass beside it."""
    return 1.0 if traced.guidance.kind == "embedded" else recipe.teacher.guidance.scale


def make_method(
    recipe: Recipe,
    traced: Trace,
    sampler: Sampler,
    scale: float,
    device: torch.device,
    home: torch.device | None = None,
    precise: nn.Module | None = None,
    only: Collection[str] | None = None,
) -> DistillMethod:
    """The recipe's method with its roles on the traced teacher's network.

    Args:
        scale: the guidance to distil.
        device: the teacher's.
        home: that of networks trained whole; None: the teacher's.
        precise: the teacher's network with exact weights, where its own are rounded; None: its own.
        only: names of roles beside the teacher; None: all. A method without some of them cannot train.

    Raises:
        InputError: the network does not allow what the recipe asks of it.
    """
    implementation, config, student = recipe.method.implementation, recipe.method.config, recipe.student
    training = {name: how for name, how in recipe.role_training.items() if only is None or name in only}
    base = _base(recipe, traced, precise)
    lora = LoRA(student.rank, student.alpha, student.targets)
    roles = build_roles(
        traced.denoiser, training, scale, lora, _critic_lora(recipe), base, precise, home, implementation.slow
    )
    roles.decode = decoder(traced)
    if student.init is not None:
        _start_from(Path(student.init), roles.student, traced, student.experts)
    own = ("student", *implementation.slow)
    for name in own if student.quantize is not None else ():
        if training.get(name) == "full":
            network = getattr(roles, name).network
            for one in network.children() if isinstance(network, Experts) else [network]:
                quantize_aware(one, student.quantize)
    for name in training:
        role = getattr(roles, name)
        network = implementation.adapt(config, name, role.network, scale)
        if network is not role.network and recipe.teacher.precision != "fp32":
            raise InputError("teacher.precision: expected fp32 for a method that adds to its networks, found bf16")
        if network is not role.network and name in own and student.quantize is not None:
            raise InputError(f"student.quantize: expected null for {recipe.method.name}, which adds to its network")
        if network is not role.network and role.takes_turns:
            raise InputError(
                f"student.experts: expected 'high' or 'low' for {recipe.method.name}, which adds to one network"
            )
        setattr(roles, name, role.on(network.to(home or device if training[name] == "full" else device)))
    if roles.student.takes_r and sampler.steps > 1:
        why = "whose network takes the end of its step: the export, a stock network, holds the end of one step alone"
        raise InputError(f"student.steps: expected 1 for a student {why}, found {sampler.steps}")
    for name in set(implementation.slow) & set(training):
        # It starts as the student, with what the method added at random or student.init loaded.
        copy = getattr(roles, name).network
        for slow, fast in zip(copy.parameters(), roles.student.network.parameters(), strict=True):
            slow.data.copy_(fast.data)
    if recipe.train.gradient_checkpointing is True:
        _save_memory(roles, traced.denoiser.network)
    missing = recipe.role_training.keys() - training.keys()
    for name in missing:  # a method looks at its roles when it is made
        setattr(roles, name, roles.teacher)
    method = implementation(config, roles, sampler)
    for name in missing:
        delattr(roles, name)
    return method


def _base(recipe: Recipe, traced: Trace, precise: nn.Module | None) -> nn.Module | None:
    """What the student stands on instead of all of the teacher's network: one expert, fewer blocks; None: all of it.

    Raises:
        InputError: the teacher has no experts, or blocks of several are to be left out.
    """
    student = recipe.student
    whole = traced.denoiser.network if precise is None or recipe.role_training["student"] != "full" else precise
    network = whole
    if student.experts != "each":
        if not isinstance(whole, Experts):
            name = type(traced.pipeline).__name__
            raise InputError(
                f"student.experts: expected 'each' for {name}, which has one denoiser, found {student.experts!r}"
            )
        network = whole[expert_of(traced, student.experts)]
    if student.config:
        if isinstance(network, Experts):
            raise InputError("student.config: expected none beside student.experts 'each', which are several networks")
        network = pruned(network, student.config)
        set_layout_and_attention(network, recipe)
    return None if network is whole else network


def expert_of(traced: Trace, end: Literal["high", "low"]) -> str:
    """The component that denoises at high or at low noise."""
    return traced.components[0 if end == "high" else -1]


def _critic_lora(recipe: Recipe) -> LoRA:
    """The critic's adapter: what its section leaves open is the student's."""
    student, critic = recipe.student, recipe.critic
    return LoRA(
        student.rank if critic.rank is None else critic.rank,
        student.alpha if critic.alpha is None else critic.alpha,
        student.targets if critic.targets is None else critic.targets,
        "student" if critic.targets is None else "critic",
    )


def _save_memory(roles: Roles, backbone: nn.Module) -> None:
    """Recompute activations, of the teacher's network and of every copy of it."""
    for _, role in roles.items():
        network = role.network.network if isinstance(role.network, Adapted) else role.network
        if isinstance(role.network, WithGuidanceAdapter):
            # It keeps what its hooks saw of one call, and a block may run again after the next.
            raise InputError("train.gradient_checkpointing: expected false for a student with a guidance adapter")
        if not isinstance(network, AdapterView | FrozenView):
            save_memory(network)
    save_memory(backbone)


def compile_networks(roles: Roles, graphs: bool = False) -> None:
    """torch.compile every role's network, in place: parameters, names and what is put around it stay as they are.

    Args:
        graphs: replay launches as CUDA graphs, on a GPU. What a network returned is gone after the next
            ``torch.compiler.cudagraph_mark_step_begin()``; a trainer's steps begin with it.
    """
    # A network that is called plain and with something added by hooks is one module: hooks are part of what a graph is
    # checked by, or the graph of the plain call would stand for both.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    # A logged step takes the gradient of each loss term from one graph, and then that of the sum.
    torch._functorch.config.donated_buffer = False
    # One network has a graph for each of: with and without gradients, full and doubled batch, each adapter.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    networks = {innermost(role.network) for _, role in roles.items()}
    for network in {one for each in networks for one in (each.values() if isinstance(each, Experts) else [each])}:
        network.compile(mode="reduce-overhead" if graphs else None)


def set_layout_and_attention(network: nn.Module, recipe: Recipe) -> None:
    """Set how the teacher's network runs; every role is a copy of it or stands on it."""
    if recipe.train.channels_last:
        network.to(memory_format=torch.channels_last)
    backend = recipe.train.attention_backend
    if backend is None:
        return
    if backend.endswith("_hub"):
        raise InputError(f"train.attention_backend: expected one that is installed, found {backend}, code from the hub")
    try:
        network.set_attention_backend(backend)
    except (AttributeError, ValueError, RuntimeError, ImportError) as error:
        reason = in_a_line(error)
        raise InputError(f"train.attention_backend: {backend!r} does not work here: {reason}") from None


def _start_from(path: Path, student: Denoiser, traced: Trace, experts: Literal["each", "high", "low"]) -> None:
    """Copy the weights of an export (or of a run's export) into the student; a LoRA student takes those of a LoRA."""
    folder = Path(pipeline_of(path))
    if not is_export(folder):
        raise InputError(f"student.init: expected an exported pipeline or a run with an export, found {path}")
    if isinstance(student.network, AdapterView):
        if not is_lora(folder):
            raise InputError(f"student.init: expected the export of a LoRA student for a LoRA student, found {path}")
        return load_adapter(traced.pipeline, traced.components, folder, student.network)
    source = traced.denoiser_in(load_pipeline(folder))
    if experts != "each":
        source = source[expert_of(traced, experts)]
    try:
        student.network.load_state_dict(source.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"student.init: {path} does not fit the teacher's network: {reason}") from None
