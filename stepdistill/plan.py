"""What a recipe will need of a device's memory, before any weight is loaded, and what would make it fit.

The recipe's own method runs one step on networks of fake tensors (:mod:`stepdistill.blueprint`), forward and
backward, for every player; what is alive at any moment is counted. Nothing is estimated from formulas but the
optimizer's moments.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill import assets, audit, yaml_lines
from stepdistill.blueprint import Blueprint, blueprint, set_up, without_data
from stepdistill.data.batch import Batch, PathRows
from stepdistill.errors import InputError
from stepdistill.forward import forward_passes
from stepdistill.memory import GIB, RESERVE, LiveBytes, savings
from stepdistill.methods.base import DistillMethod
from stepdistill.optimizer import only_moving
from stepdistill.pipeline.trace import sampled_at
from stepdistill.plan_stored import stored
from stepdistill.plan_trajectories import NO_TRAJECTORIES, Trajectories, trajectories
from stepdistill.recipe import Recipe, load
from stepdistill.session import make_method, make_sampler

ENCODERS, AUTOENCODER, TRAJECTORIES = "encoders", "autoencoder and others", "trajectories"
# Of an 8-bit moment: one byte a value, and a float32 scale for each block of 256.
ADAM_BYTES = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}
# A weight in 4 bits has a float32 scale for each block of 64; in 8 bits the scale of its row is next to nothing.
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}


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
    chunk of conditions), and rest in the host's memory after that, where all conditions and latents of images are kept
    (``stored``). ``trajectories`` are what the teacher makes before training. ``phases`` are the peaks in bytes by
    phase, ``checks`` is the audit of the run (:mod:`stepdistill.audit`).
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
        seconds: of a training step, see :func:`stepdistill.audit.audit`.

    Raises:
        InputError: the recipe is wrong, its pipeline or method cannot be run on shapes alone, or ``seconds`` are not to
            be had.
    """
    recipe = load(recipe, overrides)
    drawn = blueprint_of(recipe)
    method = method_of(recipe, drawn)
    weights = _weights(recipe, drawn, method)
    averaged = _count(method.roles.student.network) * 4 if recipe.student.ema else 0
    optimizer, gradients, activations = {}, {}, {}
    for player in method.players:
        count = sum(_count(module) for module in method.modules(player))
        optimizer[player], gradients[player] = int(count * ADAM_BYTES[recipe.train.optimizer]), 4 * count
    known = [t for m in _networks(drawn, method) for t in (*nn.Module.parameters(m), *m.buffers())]
    for player, peak in _turns(recipe, drawn, method, known):
        activations[player] = max(activations.get(player, 0), peak - gradients[player])
    store = stored(recipe, drawn)
    encoders = Line(ENCODERS, *weights.pop(ENCODERS))
    encoding = encoders.weights + sum(weights[name][1] for name in ("teacher", AUTOENCODER)) + store.chunk
    player = max(activations, key=lambda name: activations[name] + gradients[name])
    lines = [
        Line(
            name,
            parameters,
            size,
            gradients.get(name, 0),
            optimizer.get(name, 0),
            averaged if name == "student" else 0,
            activations.get(name, 0),
        )
        for name, (parameters, size) in weights.items()
    ]
    lines.append(Line("conditions and images of a batch", weights=store.batch(recipe.train.batch_size)))
    fixed = sum(line.weights + line.optimizer + line.average for line in lines)
    made = trajectories(recipe, drawn, method, known)
    solving = made.activations + sum(weights[name][1] for name in ("teacher", AUTOENCODER)) if made.count else 0
    peaks = {ENCODERS: encoding, TRAJECTORIES: solving, player: fixed + gradients[player] + activations[player]}
    highest = max(peaks, key=peaks.__getitem__)
    checks = audit.audit(recipe, method, drawn.trace.denoiser.kind, store.conditions, seconds)
    phases = dict(zip(("encoding", TRAJECTORIES, "training"), peaks.values(), strict=True))
    return Plan(lines, peaks[highest], highest, encoders, encoding, made, phases, checks, store.host)


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
    file.write_text(text, encoding="utf-8")
    return file


def blueprint_of(recipe: Recipe) -> Blueprint:
    """The recipe's pipeline without weights, in the precision that its teacher is to have."""
    dtype = torch.bfloat16 if recipe.teacher.precision == "bf16" else torch.float32
    drawn = blueprint(recipe.teacher, dtype)
    return replace(drawn, trace=sampled_at(drawn.trace, recipe.student.shift))


def method_of(recipe: Recipe, drawn: Blueprint) -> DistillMethod:
    """The recipe's method, prepared, on the networks of a blueprint."""
    recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"init": None})})
    traced, device = drawn.trace, torch.device("cpu")
    sampler = make_sampler(recipe, traced, partial(set_up, traced))
    sampler.grid()  # outside the mode, where numbers have values
    with without_data(drawn.mode):
        method = make_method(recipe, traced, sampler, recipe.teacher.guidance.scale, device)
        method.prepare(batch_of(recipe, drawn, method, 0, 0))
    return method


class FirstBatch(Batch):
    """A batch whose samples are the student's first step: the steps that led to a later one need no memory by then."""

    def integer(self, name: str, high: int) -> int:
        return 0

    def pick(self, name: str, shares: Sequence[float]) -> int:
        return 0


def batch_of(
    recipe: Recipe,
    drawn: Blueprint,
    method: DistillMethod,
    step: int,
    first: int,
    kind: type[Batch] = FirstBatch,
) -> Batch:
    """One micro-batch of shapes, from row ``first`` of the batch of ``step``."""
    train, shape = recipe.train, drawn.trace.latent_shape
    size = train.batch_size // train.accumulation
    rows = {name: row.expand(size, *row.shape[1:]).clone() for name, row in drawn.condition.items()}
    batch = kind(train.seed, step, first, size, train.batch_size, shape, rows)
    if recipe.teacher.guidance.scale != 1:
        batch.null = {name: row.clone() for name, row in rows.items()}
    needs = method.data_needs(recipe.method.config)
    if needs.images or needs.made is not None:
        batch.latents = torch.zeros(size, *shape)
    if needs.paths is not None:
        count = needs.paths.steps + 1 if needs.paths.keep == "all" else 2
        points, times = torch.zeros(size, count, *shape), torch.linspace(1, 0, count)
        batch.path = PathRows(points, times, batch.cond, batch.null, torch.full((size,), recipe.teacher.guidance.scale))
    return batch


def _turns(
    recipe: Recipe, drawn: Blueprint, method: DistillMethod, known: list[torch.Tensor]
) -> Iterator[tuple[str, int]]:
    """(player, most bytes that its turn makes), for a step in which all players move, or as many as ever do."""
    train = recipe.train
    step = max(range(min(train.steps, 5000)), key=lambda step: (len(set(method.turns(step))), -step))
    batch, done = batch_of(recipe, drawn, method, step, 0), set()
    for turn, player in enumerate(method.turns(step)):
        if player in done:
            continue
        done.add(player)
        parameters = [p for module in method.modules(player) for p in module.parameters()]
        with only_moving(parameters), LiveBytes(known) as live:
            if train.accumulation > 1:  # a later micro-batch runs while the first one's gradients are there
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
            batch.turn = turn
            with forward_passes(train, "cpu"):
                losses = method.losses(player, batch)
            if len(losses) > 1:
                # Steps that are logged measure each term's gradient first.
                for loss in losses.values():
                    torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            sum(losses.values()).backward()
            del losses
            for parameter in parameters:
                parameter.grad = None
        yield player, live.peak


def _weights(recipe: Recipe, drawn: Blueprint, method: DistillMethod) -> dict[str, tuple[int, int]]:
    """(parameters, bytes) by name; what several share counts for the first of them."""
    roles, pipeline = method.roles, drawn.trace.pipeline
    backbone = getattr(roles.teacher.network, "backbone", roles.teacher.network)
    adapters = {id(p) for name in _role_names(method) for p in getattr(roles, name).network.parameters()}
    groups: dict[str, list[torch.Tensor]] = {
        "teacher": [t for t in (*nn.Module.parameters(backbone), *backbone.buffers()) if id(t) not in adapters]
    }
    for name in _role_names(method):
        network = getattr(roles, name).network
        groups[name] = [*network.parameters(), *network.buffers()]
    for player in method.players:
        groups.setdefault(player, []).extend(p for module in method.modules(player) for p in module.parameters())
    for name in (ENCODERS, AUTOENCODER):
        groups[name] = []
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name != drawn.trace.component:
            group = groups[ENCODERS if name in drawn.trace.encoders else AUTOENCODER]
            group += [*component.parameters(), *component.buffers()]
    seen: set[int] = set()
    found = {}
    for name, tensors in groups.items():
        storages = {id(t.untyped_storage()): t for t in tensors if id(t.untyped_storage()) not in seen}
        seen |= storages.keys()
        count = sum(t.numel() for t in storages.values() if isinstance(t, nn.Parameter))
        found[name] = count, sum(t.untyped_storage().nbytes() for t in storages.values())
    if recipe.teacher.quantize is not None:
        linear = [module.weight for module in backbone.modules() if isinstance(module, nn.Linear)]
        saves = [w.numel() * (w.element_size() - QUANTIZED_BYTES[recipe.teacher.quantize]) for w in linear]
        saved = sum(size for weight, size in zip(linear, saves, strict=True) if id(weight) not in adapters)
        found["teacher"] = found["teacher"][0], found["teacher"][1] - int(saved)
    return found


def _role_names(method: DistillMethod) -> list[str]:
    return ["student", *method.extra_roles]


def _networks(drawn: Blueprint, method: DistillMethod) -> list[nn.Module]:
    roles = [getattr(method.roles, name).network for name in ("teacher", *_role_names(method))]
    others = [c for c in drawn.trace.pipeline.components.values() if isinstance(c, nn.Module)]
    return [*roles, *others, *(module for player in method.players for module in method.modules(player))]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def checks_of(first: Plan, gpu: float | None) -> list[audit.Check]:
    """The audit of the run, memory included."""
    return [*first.checks, *audit.memory_checks(first, gpu)]


def audit_text(first: Plan, gpu: float | None) -> str:
    """The audit as a table for people."""
    return audit.as_text(checks_of(first, gpu))


def as_text(first: Plan, changes: Sequence[Change], gpu: float | None) -> str:
    """The memory by role, the peak, and the proposals, for people; GiB."""
    columns = ("weights", "gradients", "optimizer", "average", "activations")
    width = max(len(line.name) for line in first.lines)
    rows = [f"{'GiB':{width}} {'parameters':>12} " + " ".join(f"{name:>11}" for name in columns)]
    for line in first.lines:
        sizes = " ".join(f"{getattr(line, name) / GIB:11.3f}" for name in columns)
        rows.append(f"{line.name:{width}} {line.parameters / 1e6:10.2f} M {sizes}")
    last = changes[-1].plan if changes else first
    phases = {ENCODERS: "while conditions are encoded", TRAJECTORIES: "while the teacher makes its trajectories"}
    when = phases.get(first.player, f"in the turn of the {first.player}")
    if first.encoders.weights:
        size = f"{first.encoders.parameters / 1e6:.2f} M parameters, {first.encoders.weights / GIB:.3f} GiB"
        rows.append(f"encoders: {size}, in the host's memory once the conditions are encoded")
    rows.append(f"stored conditions and images: {first.stored / GIB:.3f} GiB in the host's memory")
    if first.trajectories.count:
        rows.append(first.trajectories.as_text())
    rows += ["", f"peak {first.peak / GIB:.2f} GiB, {when}"]
    if gpu is not None:
        rows[-1] += f"; {_verdict(first, gpu)}"
        rows += [
            f"  {change.key}={yaml_lines.scalar(change.value)}: {change.plan.peak / GIB:.2f} GiB; {change.effect}"
            for change in changes
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
    facts |= {"trajectories": asdict(first.trajectories), "stored": first.stored}
    facts["audit"] = audit.as_dict(checks_of(first, gpu))
    if gpu is None:
        return facts
    proposals = [{"key": c.key, "value": c.value, "peak": c.plan.peak, "effect": c.effect} for c in changes]
    return facts | {"gpu": gpu, "fits": (changes[-1].plan if changes else first).fits(gpu), "proposals": proposals}
