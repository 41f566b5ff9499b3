"""Everything a recipe stands for, built and ready: used by training, export and resume alike."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.data import images
from stepdistill.data.ahead import Ahead
from stepdistill.data.batch import Batch
from stepdistill.data.host_rows import pinned, to_device
from stepdistill.data.identity import identity
from stepdistill.data.shards import Share
from stepdistill.data.store import Rows, Store
from stepdistill.diffusion.experts import Experts
from stepdistill.diffusion.samplers import TCD, Sampler
from stepdistill.errors import InputError
from stepdistill.methods.base import DistillMethod
from stepdistill.pipeline.conditioning import Conditioning, encode
from stepdistill.pipeline.encoders import release_encoders
from stepdistill.pipeline.exports import is_lora
from stepdistill.pipeline.groups import own_group
from stepdistill.pipeline.live import live
from stepdistill.pipeline.load import load_network, load_pipeline
from stepdistill.pipeline.open import open_teacher
from stepdistill.pipeline.resting import rest
from stepdistill.pipeline.set_up import set_up
from stepdistill.pipeline.sizes import conditioning_at
from stepdistill.pipeline.trace import Trace
from stepdistill.pipeline.unread import say_what_is_unread
from stepdistill.pipeline.variants import with_shift
from stepdistill.progress import phase, say
from stepdistill.recipe import Recipe
from stepdistill.roles.attach import CONFIG
from stepdistill.roles.build import share_weights
from stepdistill.roles.stored_weights import Frozen
from stepdistill.sampling.trajectories import Paths
from stepdistill.training.half_precision import check_rounding, check_scheduler
from stepdistill.training.make_method import (
    compile_networks,
    guidance_scale,
    make_method,
    make_sampler,
    set_layout_and_attention,
)
from stepdistill.training.real_images import entries_of, preview_conditions, real_images
from stepdistill.training.sizes import AtSize, at_first_size, size_of_step, sizes_and_shares, sizes_of


@dataclass
class Session:
    """A traced teacher, its conditions, the method with its roles, and the data it needs besides.

    The trace's denoiser is the teacher's role.

    ``rows`` are real samples: latents (N, ...), in a store, and the index of each one's condition (N,).
    ``paths`` are the teacher's trajectories, and the clean ends of ``made`` stand for real samples.
    All of these are those of one of the ``sizes``, the first but inside :meth:`at`.
    ``previewed`` are the conditions of ``train.preview_prompts``.
    """

    recipe: Recipe
    trace: Trace
    conditioning: Conditioning
    method: DistillMethod
    sampler: Sampler
    rows: tuple[Rows | Tensor, Tensor] | None
    device: torch.device
    paths: Paths | None = None
    made: Paths | None = None
    sizes: tuple[AtSize, ...] = ()
    size: int = 0
    ahead: Ahead | None = None
    previewed: Conditioning | None = None

    def size_of(self, step: int) -> int:
        """The number of the size of the batch of ``step``."""
        return size_of_step(self.sizes, self.recipe.train.seed, step)

    @contextmanager
    def at(self, size: int) -> Iterator[None]:
        """Inside, the session and its method are those of the size of this number; weights are the same."""
        before = self.size
        self._set(size)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, size: int) -> None:
        if size == self.size:
            return
        now, self.size = self.sizes[size], size
        self.method.at_size(now.sampler, now.trace.denoiser, now.decode)
        self.trace = replace(now.trace, denoiser=self.method.roles.teacher)
        self.sampler, self.conditioning = now.sampler, now.conditioning
        self.rows, self.paths, self.made = now.rows, now.paths, now.made

    def with_conditions(self, conditioning: Conditioning) -> "Session":
        """The same session with other conditions, those of its first size."""
        first, *others = self.sizes
        sizes = [replace(one, conditioning=conditioning_at(one.trace, first.trace, conditioning)) for one in others]
        sizes = (replace(first, conditioning=conditioning), *sizes)
        return replace(self, conditioning=conditioning, sizes=sizes)

    def batch(self, step: int, first: int, size: int) -> Batch:
        """Rows ``first`` .. ``first + size`` of the global batch of ``step``."""
        batch, key = self._without_data(step, first, size), (self.size, step, first, size)
        if self.made is not None:
            made = self.made.rows(batch.rows("made row", len(self.made)), self.conditioning, self.device)
            batch.latents, batch.cond, batch.null = made.points[:, -1], made.cond, made.null
        else:
            latents, conditions = self._host_rows(*key) if self.ahead is None else self.ahead.take(*key)
            batch.latents = latents if latents is None else to_device(latents, self.device)
            batch.cond, batch.null = self.conditioning.on_device(conditions, size)
        if self.paths is not None:
            row = batch.rows("path row", len(self.paths))
            batch.path = self.paths.rows(row, self.conditioning, self.device)
        return batch

    def _host_rows(self, number: int, step: int, first: int, size: int) -> tuple[Tensor | None, Any]:
        """(latents, conditions) of a batch at the size of this number, where a copy to the device can start from."""
        own = self.sizes[number] if len(self.sizes) > 1 else self
        batch, latents = self._without_data(step, first, size), None
        if own.rows is not None:
            row = batch.rows("row", len(own.rows[0]))
            latents, index = pinned(own.rows[0][row], self.device), own.rows[1][row]
        else:
            index = batch.rows("condition", len(own.conditioning))
        return latents, own.conditioning.gathered(index)

    def _without_data(self, step: int, first: int, size: int) -> Batch:
        seed, shape = self.recipe.train.seed, self.trace.latent_shape
        return Batch(seed, step, first, size, shape, cond={}, device=self.device)

    @contextmanager
    def gathering_ahead(self) -> Iterator[None]:
        """Inside, a thread gathers the rows of the batches that :meth:`announce` names."""
        # Encoders run on the device, where the step before does.
        if self.conditioning.encoder is not None or self.made is not None:
            yield
            return
        try:
            with Ahead(self._host_rows) as self.ahead:
                yield
        finally:
            self.ahead = None

    def announce(self, step: int, starts: list[int], size: int) -> None:
        """The batches of ``step`` that will be needed next, by their first rows."""
        for first in starts if self.ahead is not None else ():
            self.ahead.announce(self.size_of(step), step, first, size)

    def prepare(self) -> None:
        """Let the method make what depends on the shapes of a batch; the last thing before training."""
        with self.at(self.size_of(0)):
            self.method.checked_prepare(self.batch(0, 0, 1))
        if self.recipe.train.compile:
            compile_networks(self.method.roles, self.recipe.train.compile == "cuda-graphs")


def build(
    recipe: Recipe,
    device: torch.device,
    cache: Path | None = None,
    shared: bool = False,
    share: Share | None = None,
) -> Session:
    """Open the teacher, encode conditions and images, make trajectories, build roles and method.

    Args:
        cache: folder for the stores of conditions and latents; None: conditions stay in memory, latents in a folder
            that goes with the session.
        shared: copies of the teacher stay in the host's memory or in their files, to be sharded among processes from
            there (:func:`stepdistill.training.shard.share_out`); :meth:`Session.prepare` is to be called after that.
        share: the processes that encode together, each of which calls this; None: this one.

    Raises:
        InputError: whatever the recipe asks for and the pipeline or data cannot give.
    """
    share = share or Share()
    with share.after_the_first():  # which downloads it
        traced, sampler = _teacher(recipe, device)
    conditioning, sizes = encode_data(recipe, traced, sampler, cache, share)
    previewed = preview_conditions(recipe, traced, cache, share)
    scale = _scale(recipe, traced, conditioning)
    check_rounding(recipe, sampler, traced.denoiser.kind)
    _say_where_rounding_hides_the_loss(recipe)
    if device.type != "cpu" and recipe.data.encode == "store":
        release_encoders(traced, device)
    # Before adapters rename the teacher's weights: what is stored serves every run with this teacher.
    needs = recipe.method.implementation.data_needs(recipe.method.config)
    with share.after_the_first():  # which makes them
        sizes = tuple(one.with_paths(needs, scale, recipe.train.seed, cache) for one in sizes)
    phase(f"making the networks of {recipe.method.name}")
    method = _method(recipe, traced, sampler, scale, device, shared)
    # What they cost belongs to the run, whoever made them.
    stored = [each for one in sizes for each in (one.paths, one.made) if each is not None]
    method.roles.teacher.evaluations += sum(each.evaluations for each in stored)
    own = bool(traced.pictures)
    sizes = tuple(replace(one, rows=one.real and one.real.rows(one.conditioning, own)) for one in sizes)
    # Whoever calls the trace from here on gets the teacher, whatever adapters its network carries.
    traced = replace(traced, denoiser=method.roles.teacher)
    rows, paths, made = sizes[0].rows, sizes[0].paths, sizes[0].made
    session = Session(recipe, traced, conditioning, method, sampler, rows, device, paths, made, sizes)
    session.previewed = previewed
    if not shared:
        session.prepare()
    return session


def encode_data(
    recipe: Recipe, traced: Trace, sampler: Sampler, cache: Path | None, share: Share, verify: bool = False
) -> tuple[Conditioning, list[AtSize]]:
    """Conditions, and what is of each size, real images among it: encoded where that is to be done.

    Args:
        traced, sampler: of the teacher.
        cache, share: as in :func:`build`.
        verify: compare the hashes of all files, however many there are.
    """
    buckets = recipe.data.buckets != "off"
    real = None if buckets else real_images(recipe, traced, cache, share, verify)
    stated, pictures = entries_of(recipe, traced, real, cache)
    source = identity(recipe.data.images) if buckets else None
    if recipe.data.encode != "store":
        conditioning = live(traced, stated, stays=recipe.data.encode == "live")
    else:
        conditioning = encode(traced, stated, cache, pictures, share, verify)
    with share.after_the_first():
        say_what_is_unread(traced, conditioning.entries, conditioning.store and conditioning.store.folder)
        conditioning = own_group(recipe.data, traced, conditioning)
        probable = sizes_and_shares(recipe, traced, cache=cache, source=source)
        sizes = sizes_of(recipe, traced, sampler, conditioning, probable, cache, pictures)
    if not buckets:
        return conditioning, [replace(one, real=real) for one in sizes]
    numbers = images.bucket_numbers(recipe.data, [size for size, _ in probable], cache, source)
    log = True  # what cannot be used is the same for each
    for number, one in enumerate(sizes):
        if one.share:
            bucket = replace(one.bucket, numbers=numbers, source=source)
            found = real_images(recipe, one.trace, cache, share, verify, bucket, log)
            sizes[number], log = replace(one, real=found), False
    return conditioning, sizes


def encode_ahead(recipe: Recipe, device: torch.device, cache: Path, share: Share) -> dict[str, Store]:
    """Fill the stores of a run that is to come; all files that are there already are verified.

    Raises:
        InputError: whatever the recipe asks for and the pipeline or data cannot give.
    """
    with share.after_the_first():
        traced, sampler = _teacher(recipe, device)
    conditioning, sizes = encode_data(recipe, traced, sampler, cache, share, verify=True)
    stores = {"conditions": conditioning.store}
    stores |= {f"images {one.name}".strip(): one.real.store for one in sizes if one.real is not None}
    return {name: store for name, store in stores.items() if store is not None}


def build_without_data(
    recipe: Recipe, device: torch.device, cache: Path | None = None, prompts: int | None = None
) -> Session:
    """The same without images, trajectories and most roles, and not prepared for training: what an export needs.

    What is trained whole is in the host's memory.

    Args:
        cache: as in :func:`build`.
        prompts: encode only the first so many; None: all.

    Raises:
        InputError: whatever the recipe asks for and the pipeline cannot give.
    """
    traced, sampler = _teacher(recipe, device)
    asked, pictures = entries_of(recipe, traced, None, cache, log=False)
    if prompts is not None and traced.entry == "prompt":
        asked = asked[:prompts]
    conditioning = encode(traced, asked, cache, pictures) if recipe.data.encode == "store" else live(traced, asked)
    probable = sizes_and_shares(recipe, traced, counted=False)
    sizes = tuple(sizes_of(recipe, traced, sampler, conditioning, probable, cache, pictures))
    scale = _scale(recipe, traced, conditioning)
    check_rounding(recipe, sampler, traced.denoiser.kind)
    exported = ("student", *recipe.method.implementation.exported)
    method = _method(recipe, traced, sampler, scale, device, only=exported)
    traced = replace(traced, denoiser=method.roles.teacher)
    return Session(recipe, traced, conditioning, method, sampler, None, device, sizes=sizes)


def _teacher(recipe: Recipe, device: torch.device) -> tuple[Trace, Sampler]:
    """The traced teacher, and the sampler that the student runs on its schedule."""
    check_scheduler(recipe)
    stated = recipe.teacher
    phase(f"loading and tracing {stated.pipeline}")

    def opened(arguments: dict[str, Any]) -> Trace:
        traced = open_teacher(
            stated,
            arguments=arguments,
            ip_adapter=stated.ip_adapter,
            guidance=stated.guidance,
            device=device,
            dtype=_dtype(recipe),
            frozen=Frozen(stated.quantize, stated.storage, stated.offload),
            resting=True,
        )
        return with_shift(traced, recipe.student.shift)

    traced = at_first_size(recipe, opened)
    sampler = make_sampler(recipe, traced)  # what no stock scheduler runs ends here, before anything is encoded
    set_layout_and_attention(traced.denoiser.network, recipe)
    if isinstance(sampler, TCD):
        # Stable Diffusion's pipelines hand every scheduler an eta of their own, 0 in a plain call.
        sampler.gamma = set_up(traced, sampler.scheduler, recipe.student.steps)[1].get("eta", sampler.gamma)
    rest(traced.pipeline)
    return traced, sampler


def _dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.teacher.precision == "bf16" else torch.float32


def _scale(recipe: Recipe, traced: Trace, conditioning: Conditioning) -> float:
    """:func:`guidance_scale`, which needs an empty condition unless it is 1."""
    scale = guidance_scale(recipe, traced)
    if scale != 1 and conditioning.null is None:
        raise InputError(f"teacher.guidance.scale: expected 1 for a pipeline without guidance, found {scale}")
    return scale


def _say_where_rounding_hides_the_loss(recipe: Recipe) -> None:
    rounded = [key for key in ("train", "teacher") if getattr(recipe, key).precision == "bf16"]
    if recipe.method.implementation.guides_both and rounded:
        # Cosine of VSD's gradient with float32's, critic .3 % from the teacher: .37, with float32 outputs alone .44.
        keys = " and ".join(f"{key}.precision" for key in rounded)
        why = f"{recipe.method.name} compares two guided scores that begin equal; bf16 rounding hides their difference"
        say(f"{keys}: fp32 is better: {why}")


def _method(
    recipe: Recipe,
    traced: Trace,
    sampler: Sampler,
    scale: float,
    device: torch.device,
    shared: bool = False,
    only: Collection[str] | None = None,
) -> DistillMethod:
    """:func:`make_method` with the run's seed; what is trained in float32 does not start from rounded weights.

    Args:
        shared: to be sharded: what is trained whole holds no memory of its own until then, where that is possible.
        only: as in :func:`make_method`; what is trained whole is in the host's memory.
    """
    torch.manual_seed(recipe.train.seed)  # adapters and heads start from global random numbers
    implementation, student, precise = recipe.method.implementation, recipe.student, None
    whole = [name for name, how in recipe.role_training.items() if how == "full"]
    # A copy that starts as anything but the teacher's weights has to be one.
    plain = not student.init and not student.config and student.experts == "each"
    plain = plain and implementation.adapt.__func__ is DistillMethod.adapt.__func__
    if whole and (_dtype(recipe) != torch.float32 or recipe.teacher.storage is not None or (shared and plain)):
        precise = exact_network(recipe, traced)
        set_layout_and_attention(precise, recipe)
    home = torch.device("meta" if shared and plain else "cpu") if shared or only is not None else device
    method = make_method(recipe, traced, sampler, scale, device, home, precise, only)
    for name in whole if shared and plain else ():
        share_weights(getattr(method.roles, name).network, precise)
    return method


def exact_network(recipe: Recipe, traced: Trace) -> torch.nn.Module:
    """The teacher's network with the weights of its files, in their own precision, in the host's memory."""
    stated, (folder, variant) = recipe.teacher, traced.pipeline.loaded_from
    fused = is_lora(Path(stated.pipeline)) and not stated.composed
    if fused or (folder / CONFIG).is_file() or "ip_adapter_scale" in dict(traced.network.named_buffers()):
        return traced.denoiser_in(load_pipeline(stated, ip_adapter=stated.ip_adapter))
    kind = type(traced.network)
    networks = {name: load_network(kind, folder / name, variant) for name in traced.components}
    return Experts(networks) if len(networks) > 1 else networks[traced.component]
