"""Everything a recipe stands for, built and ready: used by training, export and resume alike."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from stepdistill import checkpoint
from stepdistill.adapters import Adapted, AdapterView, FrozenView, save_memory
from stepdistill.data import images
from stepdistill.data.batch import Batch
from stepdistill.data.conditions import wanted
from stepdistill.data.paths import Paths, teacher_paths
from stepdistill.denoiser import Denoiser, innermost
from stepdistill.errors import InputError
from stepdistill.exporting.lora import is_lora, load_adapter
from stepdistill.generation.generate import set_up
from stepdistill.generation.latents import decoder, encode_images, image_shape
from stepdistill.half_precision import check_rounding, check_scheduler
from stepdistill.host_rows import to_device
from stepdistill.methods.base import DistillMethod, PathNeeds, Roles
from stepdistill.pipeline.conditioning import Conditioning, encode, entries, rest_encoders, unread
from stepdistill.pipeline.load import is_export, load_pipeline
from stepdistill.pipeline.trace import Trace, asked_for, sampled_at, trace, under
from stepdistill.progress import say
from stepdistill.pruning import pruned
from stepdistill.recipe import Recipe
from stepdistill.roles import LoRA, build_roles
from stepdistill.samplers import SAMPLERS, TCD, Sampler


@dataclass
class Session:
    """A traced teacher, its conditions, the method with its roles, and the data it needs besides.

    ``rows`` are real samples in the host's memory: latents (N, ...) and the index of each one's condition (N,).
    ``paths`` are the teacher's trajectories, and the clean ends of ``made`` stand for real samples.
    """

    recipe: Recipe
    trace: Trace
    conditioning: Conditioning
    method: DistillMethod
    sampler: Sampler
    rows: tuple[Tensor, Tensor] | None
    device: torch.device
    paths: Paths | None = None
    made: Paths | None = None

    def batch(self, step: int, first: int, size: int) -> Batch:
        """Rows ``first`` .. ``first + size`` of the global batch of ``step``."""
        train = self.recipe.train
        batch = Batch(
            seed=train.seed,
            step=step,
            first=first,
            size=size,
            total=train.batch_size,
            shape=self.trace.latent_shape,
            cond={},
            device=self.device,
        )
        if self.made is not None:
            made = self.made.rows(batch.rows("made row", len(self.made)), self.conditioning, self.device)
            batch.latents, batch.cond, batch.null = made.points[:, -1], made.cond, made.null
        elif self.rows is not None:
            row = batch.rows("row", len(self.rows[0]))
            batch.latents = to_device(self.rows[0][row], self.device)
            batch.cond, batch.null = self.conditioning.batch(self.rows[1][row])
        else:
            batch.cond, batch.null = self.conditioning.batch(batch.rows("condition", len(self.conditioning)))
        if self.paths is not None:
            row = batch.rows("path row", len(self.paths))
            batch.path = self.paths.rows(row, self.conditioning, self.device)
        return batch

    def prepare(self) -> None:
        """Let the method make what depends on the shapes of a batch; the last thing before training."""
        self.method.prepare(self.batch(0, 0, 1))
        if self.recipe.train.compile:
            compile_networks(self.method.roles, self.recipe.train.compile == "cuda-graphs")


def build(
    recipe: Recipe,
    device: torch.device,
    cache: Path | None = None,
    with_data: bool = True,
    shared: bool = False,
    prompts: int | None = None,
) -> Session:
    """Load and trace the teacher, encode conditions and images, build roles and method.

    Args:
        cache: folder for encoded conditions and latents; None keeps them in memory only.
        with_data: False leaves images and trajectories out (export needs none).
        shared: copies of the teacher stay in the host's memory, to be shared out among processes from there
            (:func:`stepdistill.sharding.share_out`); :meth:`Session.prepare` is to be called after that.
        prompts: encode only the first so many; None: all.

    Raises:
        InputError: whatever the recipe asks for and the pipeline or data cannot give.
    """
    dtype = torch.bfloat16 if recipe.teacher.precision == "bf16" else torch.float32
    source = recipe.teacher
    check_scheduler(recipe)
    pipeline = load_pipeline(
        source.pipeline, source.revision, dtype, source.quantize, source.ip_adapter, source.variant
    )
    if device.type != "cpu":
        pipeline.to(device)
    traced = sampled_at(trace(pipeline, recipe.teacher.arguments), recipe.student.shift)
    make_sampler(recipe, traced)  # what no stock scheduler runs ends here, before anything is encoded
    _switch(traced.denoiser.network, recipe)
    scale = recipe.teacher.guidance.scale
    traced = asked_for(traced, scale)
    if traced.guidance.kind == "embedded":
        scale = 1.0  # it is an input of the network, and there is nothing beside it to distil
    implementation, config, data = recipe.method.implementation, recipe.method.config, recipe.data
    needs, real = implementation.data_needs(config), None
    if with_data and needs.images:
        if common := [name for name in traced.pictures if name not in data.arguments]:
            raise InputError(
                f"data.images: expected none beside teacher.arguments.{common[0]}, and a method or settings that need "
                "none: real images would have to be those of that picture; data.arguments gives each its own"
            )
        real = images.load(data, *image_shape(traced))
    pictures = None
    if data.conditions != "captions" or real is None:
        told, pictures = wanted(data, aloud=with_data)
    elif data.arguments:
        _, told, pictures = real
    else:
        told = list(dict.fromkeys(real[1]))
    asked = entries(traced, told)
    if prompts is not None and traced.entry == "prompt":
        asked, pictures = asked[:prompts], pictures and pictures[:prompts]
    conditioning = encode(traced, asked, cache, pictures).to(device)
    if with_data and (cut := unread(traced, asked)):
        prompt, end = max(cut.items(), key=lambda one: len(one[1]))
        longer = f"{len(cut)} of {len(asked)} prompts are longer than the pipeline reads"
        say(f"data.conditions: {longer}; it does not see “{end}” of “{prompt}”")
    if scale != 1 and conditioning.null is None:
        raise InputError(f"teacher.guidance.scale: expected 1 for a pipeline without guidance, found {scale}")
    traced = under(traced, recipe.teacher.guidance.rule)
    sampler = make_sampler(recipe, traced)
    if isinstance(sampler, TCD):
        # Stable Diffusion's pipelines hand every scheduler an eta of their own, 0 in a plain call.
        sampler.gamma = set_up(traced, sampler.scheduler, recipe.student.steps)[1].get("eta", sampler.gamma)
    check_rounding(recipe, sampler, traced.denoiser.kind)
    rounded = [key for key in ("train", "teacher") if getattr(recipe, key).precision == "bf16"]
    if implementation.guides_both and rounded and with_data:
        # Cosine of VSD's gradient with float32's, critic .3 % from the teacher: .37, with float32 outputs alone .44.
        keys = " and ".join(f"{key}.precision" for key in rounded)
        why = f"{recipe.method.name} compares two guided scores that begin equal; bf16 rounding hides their difference"
        say(f"{keys}: fp32 is better: {why}")
    if device.type != "cpu":
        rest_encoders(traced, device)
    # Before adapters rename the teacher's weights: what is stored serves every run with this teacher.
    own = traced.denoiser, conditioning, scale, traced.latent_shape, recipe.train.seed, cache, sampler
    paths, made = (_trajectories(wants if with_data else None, *own) for wants in (needs.paths, needs.made))
    # Adapters and heads start from global random numbers.
    torch.manual_seed(recipe.train.seed)
    precise = None
    if dtype != torch.float32 and "full" in recipe.role_training.values():
        # What is trained in float32 is not to start from weights that were rounded.
        whole = load_pipeline(source.pipeline, source.revision, ip_adapter=source.ip_adapter, variant=source.variant)
        precise = getattr(whole, traced.component)
        _switch(precise, recipe)
        del whole
    home = torch.device("cpu") if shared else device
    method = make_method(recipe, traced, sampler, scale, device, home, precise)
    del precise
    rows = None
    # What they cost belongs to the run, whoever made them.
    method.roles.teacher.evaluations += sum(stored.evaluations for stored in (paths, made) if stored is not None)
    if real is not None:
        rows = _real_rows(*real[:2], traced, conditioning, cache)
    session = Session(recipe, traced, conditioning, method, sampler, rows, device, paths, made)
    if with_data and not shared:
        session.prepare()
    return session


def make_sampler(recipe: Recipe, traced: Trace, grid: Callable[[Any, int], dict[str, Any]] | None = None) -> Sampler:
    """The few-step sampler of the recipe's method on the traced teacher's schedule.

    Args:
        grid: (scheduler, steps) -> what the pipeline gives ``set_timesteps``; None: its own run shows it.

    Raises:
        InputError: no stock scheduler runs it there, or the schedule has no such start or no shift.
    """
    config, student, schedule = recipe.method.config, recipe.student, traced.denoiser.schedule
    shift = getattr(config, "time_shift", 1.0)
    if shift != 1 and schedule.name != "flow":
        raise InputError(f"method.time_shift: expected 1 for a {schedule.name} schedule, found {shift:g}")
    sampler = SAMPLERS[recipe.method.implementation.sampler_of(config)]
    grid = grid or (lambda scheduler, steps: set_up(traced, scheduler, steps)[0])
    return sampler(schedule, traced.pipeline.scheduler, student.steps, grid, student.start)


def _trajectories(
    needs: PathNeeds | None,
    teacher: Denoiser,
    conditioning: Conditioning,
    scale: float,
    shape: tuple[int, ...],
    seed: int,
    cache: Path | None,
    sampler: Sampler,
) -> Paths | None:
    grid = [step.t for step in sampler.grid()]
    return needs and teacher_paths(teacher, conditioning, needs, scale, shape, seed, cache, grid)


def make_method(
    recipe: Recipe,
    traced: Trace,
    sampler: Sampler,
    scale: float,
    device: torch.device,
    home: torch.device | None = None,
    precise: nn.Module | None = None,
) -> DistillMethod:
    """The recipe's method with its roles on the traced teacher's network.

    Args:
        scale: the guidance to distil. device: the teacher's. home: that of networks trained whole; None: the teacher's.
        precise: the teacher's network in float32, where its own is in half precision; None: its own.

    Raises:
        InputError: the network does not allow what the recipe asks of it.
    """
    implementation, config, student = recipe.method.implementation, recipe.method.config, recipe.student
    training = recipe.role_training
    original = traced.denoiser.network if precise is None else precise
    smaller = pruned(original, student.config) if student.config else None
    if smaller is not None:
        _switch(smaller, recipe)
    lora = LoRA(student.rank, student.alpha, student.targets)
    roles = build_roles(traced.denoiser, training, scale, lora, _critic_lora(recipe), smaller, precise, home)
    roles.decode = decoder(traced)
    if student.init is not None:
        _start_from(Path(student.init), roles.student, traced.pipeline, traced.component)
    for name in training:
        role = getattr(roles, name)
        network = implementation.adapt(config, name, role.network, scale)
        if network is not role.network and recipe.teacher.precision != "fp32":
            raise InputError("teacher.precision: expected fp32 for a method that adds to its networks, found bf16")
        setattr(roles, name, role.on(network.to(home or device if training[name] == "full" else device)))
    if roles.target is not None:
        # It starts as the student, with what the method added at random or student.init loaded.
        for slow, fast in zip(roles.target.network.parameters(), roles.student.network.parameters(), strict=True):
            slow.data.copy_(fast.data)
    if recipe.train.gradient_checkpointing is True:
        _save_memory(roles, traced.denoiser.network)
    return implementation(config, roles, sampler)


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
    for role in (role for role in vars(roles).values() if isinstance(role, Denoiser)):
        if isinstance(role.network, Adapted):
            # What it adds by hooks would be missing when a block runs again.
            raise InputError("train.gradient_checkpointing: expected false for a method that adds to its networks")
        if not isinstance(role.network, AdapterView | FrozenView):
            save_memory(role.network)
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
    for network in {innermost(role.network) for role in vars(roles).values() if isinstance(role, Denoiser)}:
        network.compile(mode="reduce-overhead" if graphs else None)


def _switch(network: nn.Module, recipe: Recipe) -> None:
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
        reason = " ".join(str(error).split())
        raise InputError(f"train.attention_backend: {backend!r} does not work here: {reason}") from None


def _real_rows(
    pictures: Tensor, captions: list[str], traced: Trace, conditioning: Conditioning, cache: Path | None
) -> tuple[Tensor, Tensor]:
    """Latents of the pictures, and which condition each has: by its prompt, or by its class's name or number.

    Where conditions come with pictures of their own, each real picture has one.
    """
    known = {str(entry): i for i, entry in enumerate(conditioning.entries)}
    known |= {label: i for i, label in enumerate(conditioning.labels)}
    strangers = sorted(set(captions) - known.keys())
    if strangers:
        raise InputError(
            f"data.images: expected images of the recipe's conditions ({', '.join(list(known)[:4])}, ...), "
            f"found {strangers[0]!r} and {len(strangers) - 1} more"
        )
    latents = encode_images(traced, pictures, cache)
    finite = torch.cat([part.flatten(1).isfinite().all(1) for part in latents.split(256)])
    if not finite.all():
        number = int(finite.logical_not().nonzero()[0])
        raise InputError(
            f"data.images: the autoencoder makes numbers that are not finite of image {number} ({captions[number]!r}), "
            f"and of {int(finite.logical_not().sum()) - 1} more"
        )
    return latents, torch.tensor([i if traced.pictures else known[caption] for i, caption in enumerate(captions)])


def _start_from(path: Path, student: Denoiser, pipeline: Any, component: str) -> None:
    """Copy the weights of an export (or of a run's export) into the student; a LoRA student takes those of a LoRA."""
    folder = next((place for place in (path, path / "export") if is_export(place)), None)
    if folder is None:
        raise InputError(f"student.init: expected an exported pipeline or a run with an export, found {path}")
    if isinstance(student.network, AdapterView):
        if not is_lora(folder):
            raise InputError(f"student.init: expected the export of a LoRA student for a LoRA student, found {path}")
        return load_adapter(pipeline, component, folder, student.network)
    source = getattr(load_pipeline(folder), component)
    try:
        student.network.load_state_dict(source.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"student.init: {path} does not fit the teacher's network: {reason}") from None


def newest_checkpoint(run: Path, report=None) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        InputError: the run has none.
    """
    path = checkpoint.latest(run / "checkpoints", report)
    if path is None:
        raise InputError(f"{run}: expected a run folder with a checkpoint, found no whole one in checkpoints/")
    return path
