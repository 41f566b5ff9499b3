"""What a recipe will need of a device's memory, before any weight is loaded, and what would make it fit.

The recipe's own method runs one step on networks of fake tensors (:mod:`.fake_pipeline`), forward and
backward, for every player; what is alive at any moment is counted. Nothing is estimated from formulas but the
optimizer's moments.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill import assets
from stepdistill.data.batch import Batch, PathRows
from stepdistill.data.buckets import Size, bucket_sizes
from stepdistill.errors import InputError
from stepdistill.files import write_text
from stepdistill.methods.base import DistillMethod
from stepdistill.pipeline.components import patched
from stepdistill.pipeline.sizes import picture_size
from stepdistill.pipeline.variants import with_shift
from stepdistill.planning import audit
from stepdistill.planning.fake_pipeline import Blueprint, blueprint, set_up, without_data
from stepdistill.planning.host import host_memory
from stepdistill.planning.stored import stored
from stepdistill.planning.trajectories import NO_TRAJECTORIES, Trajectories, trajectories
from stepdistill.planning.weights import AUTOENCODER, ENCODERS, weights_of
from stepdistill.recipe import Recipe, load, yaml_lines
from stepdistill.recipe.memory import GIB, RESERVE, LiveBytes, savings
from stepdistill.training.make_method import guidance_scale, make_method, make_sampler
from stepdistill.training.optimizer import only_moving
from stepdistill.training.optimizer_state import state_bytes
from stepdistill.training.recompute import forward_passes

TRAJECTORIES = "trajectories"


@dataclass(frozen=True)
class Line:
    """The bytes of one role, player or store; ``parameters`` is a count."""

    name: str
    parameters: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0


@dataclass(frozen=True)
class Plan:
    """Lines of the table, the expected peak in bytes, and the player in whose turn it comes.

    ``encoders`` are on the device while conditions are encoded (``encoding`` bytes with teacher, autoencoder and a
    chunk of conditions). ``stored`` are bytes on disk, the stores of all conditions and latents of images, of which
    ``host`` are in the host's memory at a time; ``offloaded`` are the frozen weights that rest there, those of an
    autoencoder and of encoders that come for a batch among them. ``trajectories`` are what the teacher makes before
    training. ``phases`` are the peaks in bytes by phase, ``host_phases`` those of the host's memory, and ``checks`` the
    audit of the run (:mod:`stepdistill.planning.audit`).
    """

    lines: list[Line]
    peak: int
    player: str
    encoders: Line = Line("encoders")
    encoding: int = 0
    trajectories: Trajectories = NO_TRAJECTORIES
    phases: dict[str, int] = field(default_factory=dict)
    checks: list[audit.Check] = field(default_factory=list)
    stored: int = 0
    host: int = 0
    offloaded: int = 0
    host_phases: dict[str, int] = field(default_factory=dict)

    def fits(self, gpu: float) -> bool:
        """Whether the peak and what CUDA needs stay within ``gpu`` GiB."""
        return self.peak / GIB + RESERVE <= gpu


@dataclass(frozen=True)
class Change:
    """A key of the recipe, its new value, what that does, and the plan with this and the changes before it."""

    key: str
    value: Any
    effect: str
    plan: Plan


def plan(
    recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), seconds: str | None = None
) -> Plan:
    """The memory that a recipe will need, and the audit of its run.

    Args:
        seconds: of a training step, see :func:`stepdistill.planning.audit.audit`.

    Raises:
        InputError: the recipe is wrong, its pipeline or method cannot be run on shapes alone, or ``seconds`` are not to
            be had.
    """
    recipe = load(recipe, overrides)
    drawn = blueprint_of(recipe)
    method = method_of(recipe, drawn)
    found = weights_of(recipe.teacher, drawn, method)
    weights = dict(found.sizes)
    averaged = _count(method.roles.student.network) * 4 if recipe.student.ema else 0
    optimizer, gradients, activations = {}, {}, {}
    for player in method.players:
        shapes = [p.shape for module in method.checked_modules(player) for p in module.parameters()]
        chosen = recipe.train.optimizer_of(player)
        optimizer[player] = state_bytes(chosen.name, shapes, (chosen.model_extra or {}).get("slice_p", 1))
        gradients[player] = 4 * sum(map(math.prod, shapes))
    known = [t for m in _networks(drawn, method) for t in (*nn.Module.parameters(m), *m.buffers())]
    with _decodings(drawn) as decoding:
        for player, peak in _turns(recipe, drawn, method, known):
            activations[player] = max(activations.get(player, 0), peak - gradients[player])
    store = stored(recipe, drawn)
    encoders = Line(ENCODERS, *weights.pop(ENCODERS))
    resting = found.autoencoder if recipe.teacher.offload is not None and not decoding else 0
    idle = weights["teacher"][1] + weights[AUTOENCODER][1] - resting
    encoding = encoders.weights + idle + store.chunk
    player = max(activations, key=lambda name: activations[name] + gradients[name])
    lines = [
        Line(
            name,
            parameters,
            size - resting if name == AUTOENCODER else size,
            gradients.get(name, 0),
            optimizer.get(name, 0),
            averaged if name == "student" else 0,
            activations.get(name, 0),
        )
        for name, (parameters, size) in weights.items()
    ]
    away, own = found.offloaded + resting, recipe.data.encode
    if own == "live":  # they are there for every batch
        lines.append(encoders)
        encoders = Line(ENCODERS)
    lines.append(Line("data of a batch", weights=store.batch(recipe.train.batch_size)))
    fixed = sum(line.weights + line.optimizer + line.average for line in lines)
    if own == "live-offloaded":  # they come for every batch
        encoding, away = max(encoding, fixed + encoders.weights), away + encoders.weights
    made = trajectories(recipe, drawn, method, known)
    solving = made.activations + idle if made.count else 0
    peaks = {ENCODERS: encoding, TRAJECTORIES: solving, player: fixed + gradients[player] + activations[player]}
    highest = max(peaks, key=peaks.__getitem__)
    checks = audit.audit(recipe, method, drawn.trace.denoiser.kind, store.conditions, seconds)
    held = store.host(recipe.train.batch_size)
    phases = dict(zip(("encoding", TRAJECTORIES, "training"), peaks.values(), strict=True))
    peak, sizes = peaks[highest], (store.disk, held, away)
    host = host_memory(recipe, drawn, method, replace(found, offloaded=away), held, made.stored)
    return Plan(lines, peak, highest, encoders, encoding, made, phases, checks, *sizes, host)


def fit(
    recipe: str | Path, overrides: Sequence[str], gpu: float, seconds: str | None = None
) -> tuple[Plan, list[Change]]:
    """The plan as it is, and the changes, in order of what they cost, that bring it within ``gpu`` GiB.

    A change that the pipeline or the method does not allow, or that saves less than 1 %, is left out. The last plan may
    still not fit.
    """
    first = now = plan(recipe, overrides, seconds)
    changes: list[Change] = []
    for key, value, effect in savings(load(recipe, overrides)):
        if now.fits(gpu):
            break
        taken = [*overrides, *(f"{change.key}={yaml_lines.scalar(change.value)}" for change in changes)]
        try:
            then = plan(recipe, [*taken, f"{key}={yaml_lines.scalar(value)}"])
        except InputError:
            continue
        if then.peak < 0.99 * now.peak:
            changes = [change for change in changes if change.key != key] + [Change(key, value, effect, then)]
            now = then
    return first, changes


def write_fit(recipe: str | Path, changes: Sequence[Change]) -> Path:
    """Put the changes into the recipe's file, comments and order kept; a shipped recipe becomes a file here first.

    Raises:
        InputError: a section is written in a way that a line cannot be put into, or the copy would overwrite a file.
    """
    file = Path(recipe)
    if not file.is_file():
        shipped = assets.recipe(str(recipe))
        file, text = Path(shipped.name), shipped.read_text(encoding="utf-8")
        if file.exists():
            raise InputError(f"{file}: exists; plan it by that path, or move it aside")
    else:
        text = file.read_text(encoding="utf-8")
    for change in changes:
        text = yaml_lines.put(text, tuple(change.key.split(".")), change.value, str(file))
    write_text(file, text)
    return file


def blueprint_of(recipe: Recipe) -> Blueprint:
    """The recipe's pipeline without weights, in the precision that its teacher is to have, at the largest size."""
    dtype = torch.bfloat16 if recipe.teacher.precision == "bf16" else torch.float32
    teacher = recipe.teacher

    def sized(sizes: Sequence[Sequence[int]]) -> Blueprint:
        height, width = max(sizes, key=math.prod)
        arguments = teacher.arguments | {"height": height, "width": width}
        return blueprint(teacher.model_copy(update={"arguments": arguments}), dtype)

    drawn = sized(recipe.sizes) if recipe.sizes else blueprint(teacher, dtype)
    if recipe.data.buckets == "auto":
        with suppress(InputError):  # of a size that it does not take
            drawn = sized(_buckets(drawn))
    return replace(drawn, trace=with_shift(drawn.trace, recipe.student.shift))


def _buckets(drawn: Blueprint) -> list[Size]:
    """The buckets that the pipeline would have, if it takes multiples of 16 pixels, as most do, or of two latents."""
    with drawn.mode:
        own = picture_size(drawn.trace)
    return bucket_sizes(own, 2 * max(8, getattr(drawn.trace.pipeline, "vae_scale_factor", 8)))


def method_of(recipe: Recipe, drawn: Blueprint) -> DistillMethod:
    """The recipe's method, prepared, on the networks of a blueprint."""
    recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"init": None})})
    traced, device = drawn.trace, torch.device("cpu")
    sampler = make_sampler(recipe, traced, partial(set_up, traced))
    sampler.grid()  # outside the mode, where numbers have values
    with without_data(drawn.mode):
        method = make_method(recipe, traced, sampler, guidance_scale(recipe, drawn.trace), device)
        method.checked_prepare(batch_of(recipe, drawn, method, 0))
    return method


class FirstBatch(Batch):
    """A batch whose samples are the student's first step: the steps that led to a later one need no memory by then."""

    def integer(self, name: str, high: int) -> int:
        return 0

    def pick(self, name: str, shares: Sequence[float]) -> int:
        return 0


def batch_of(recipe: Recipe, drawn: Blueprint, method: DistillMethod, step: int) -> Batch:
    """The first micro-batch of ``step``, of shapes alone."""
    train, shape = recipe.train, drawn.trace.latent_shape
    size = train.batch_size // train.accumulation
    rows = {name: row.expand(size, *row.shape[1:]).clone() for name, row in drawn.condition.items()}
    batch = FirstBatch(train.seed, step, 0, size, shape, rows)
    if (scale := guidance_scale(recipe, drawn.trace)) != 1:
        batch.null = {name: row.clone() for name, row in rows.items()}
    needs = method.data_needs(recipe.method.config)
    if needs.images or needs.made is not None:
        batch.latents = torch.zeros(size, *shape)
    if needs.paths is not None:
        count = needs.paths.steps + 1 if needs.paths.keep == "all" else 2
        points, times = torch.zeros(size, count, *shape), torch.linspace(1, 0, count)
        batch.path = PathRows(points, times, batch.cond, batch.null, torch.full((size,), scale))
    return batch


def _turns(
    recipe: Recipe, drawn: Blueprint, method: DistillMethod, known: list[torch.Tensor]
) -> Iterator[tuple[str, int]]:
    """(player, most bytes that its turn makes), for a step in which all players move, or as many as ever do."""
    train = recipe.train
    step = max(range(min(train.steps, 5000)), key=lambda step: (len(set(method.checked_turns(step))), -step))
    batch, done = batch_of(recipe, drawn, method, step), set()
    for turn, player in enumerate(method.checked_turns(step)):
        if player in done:
            continue
        done.add(player)
        parameters = [p for module in method.checked_modules(player) for p in module.parameters()]
        with only_moving(parameters), LiveBytes(known) as live:
            # A later micro-batch runs while the first one's gradients are there, and so are those of other experts.
            if train.accumulation > 1 or any(role.takes_turns for _, role in method.roles.items()):
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
            batch.turn = turn
            with forward_passes(train, "cpu"):
                losses = method.checked_losses(player, batch)
            if len(losses) > 1:
                # Steps that are logged measure each term's gradient first.
                for loss in losses.values():
                    torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            sum(losses.values()).backward()
            del losses
            for parameter in parameters:
                parameter.grad = None
        yield player, live.peak


@contextmanager
def _decodings(drawn: Blueprint) -> Iterator[list[str]]:
    """A list that gets an entry for each call of the autoencoder's decoder inside."""
    calls: list[str] = []
    vae = getattr(drawn.trace.pipeline, "vae", None)
    if vae is None or not hasattr(vae, "decode"):
        yield calls
        return
    own = vae.decode
    with patched(vae, "decode", lambda *given, **named: calls.append("decode") or own(*given, **named)):
        yield calls


def _networks(drawn: Blueprint, method: DistillMethod) -> list[nn.Module]:
    roles = [role.network for _, role in method.roles.items()]
    others = [c for c in drawn.trace.pipeline.components.values() if isinstance(c, nn.Module)]
    return [*roles, *others, *(module for player in method.players for module in method.checked_modules(player))]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def checks_of(first: Plan, gpu: float | None) -> list[audit.Check]:
    """The audit of the run, memory included."""
    return [*first.checks, *audit.memory_checks(first, gpu)]


def audit_text(first: Plan, gpu: float | None) -> str:
    """The audit as a table for people."""
    return audit.as_text(checks_of(first, gpu))


def as_text(first: Plan, changes: Sequence[Change], gpu: float | None) -> str:
    """The memory by role, the peak, and the proposals, for people; GiB, and millions of parameters."""
    columns = ("weights", "gradients", "optimizer", "average", "activations")
    width = max(len(line.name) for line in first.lines)
    rows = [f"{'GiB':{width}} {'millions':>8} " + " ".join(f"{name:>7}" for name in columns)]
    for line in first.lines:
        sizes = " ".join(f"{getattr(line, name) / GIB:{max(7, len(name))}.3f}" for name in columns)
        rows.append(f"{line.name:{width}} {line.parameters / 1e6:8.2f} {sizes}")
    last = changes[-1].plan if changes else first
    phases = {ENCODERS: "while conditions are encoded", TRAJECTORIES: "while the teacher makes its trajectories"}
    when = phases.get(first.player, f"in the turn of the {first.player}")
    if first.encoders.weights:
        size = f"{first.encoders.parameters / 1e6:.2f} M parameters, {first.encoders.weights / GIB:.3f} GiB"
        rows.append(f"encoders: {size}, there while conditions are encoded")
    held = f"{first.host / GIB:.3f} GiB in the host's memory at a time"
    rows.append(f"stored data: {first.stored / GIB:.3f} GiB on disk, {held}")
    if first.offloaded:
        rows.append(f"{first.offloaded / GIB:.3f} GiB of frozen weights in the host's memory")
    if first.trajectories.count:
        rows.append(first.trajectories.as_text())
    rows += ["", f"peak {first.peak / GIB:.2f} GiB, {when}"]
    if gpu is not None:
        rows += [
            _verdict(first, gpu),
            *(
                f"  {change.key}={yaml_lines.scalar(change.value)}: {change.plan.peak / GIB:.2f} GiB; {change.effect}"
                for change in changes
            ),
        ]
        if changes:
            rows.append(f"with these {_verdict(last, gpu)}")
    return "\n".join(rows)


def _verdict(plan: Plan, gpu: float) -> str:
    return f"{'fits' if plan.fits(gpu) else 'does not fit'} {gpu:g} GiB, of which {RESERVE:g} is left to the driver"


def as_dict(first: Plan, changes: Sequence[Change], gpu: float | None) -> dict[str, Any]:
    """The same for scripts; bytes."""
    facts = {"schema": 1, "peak": first.peak, "player": first.player, "lines": [asdict(line) for line in first.lines]}
    facts |= {"encoders": asdict(first.encoders), "encoding": first.encoding}
    facts |= {"trajectories": asdict(first.trajectories), "stored": first.stored, "host": first.host}
    facts |= {"offloaded": first.offloaded, "host_phases": first.host_phases}
    facts["audit"] = audit.as_dict(checks_of(first, gpu))
    if gpu is None:
        return facts
    proposals = [{"key": c.key, "value": c.value, "peak": c.plan.peak, "effect": c.effect} for c in changes]
    return facts | {"gpu": gpu, "fits": (changes[-1].plan if changes else first).fits(gpu), "proposals": proposals}
