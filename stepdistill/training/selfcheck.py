"""Before the first step: does the teacher's network mean what its scheduler and its conditions say?

A wrong convention (prediction type, noise schedule, empty condition) breaks no shape and raises no error; the run just
learns nonsense. This check noises images to a few levels and compares the error of the network's one-step x_0 with that
of the best linear denoiser, which knows only the images' variance. A trained network under the right reading is far
better than that at every level; an untrained one is not better under any reading, and passes. The check refuses a
reading that another one beats by far, and the message names that other one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from stepdistill.diffusion.denoiser import Conditions, Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.schedule import FlowSchedule, Kind, Prediction, Schedule, VPSchedule
from stepdistill.errors import InputError
from stepdistill.kernels import Rule
from stepdistill.methods.parts.times import time_of_ratio
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.progress import say
from stepdistill.training.session import Session

ROWS = 16
LEVELS = (0.2, 0.5, 1.0, 2.0, 5.0)  # sigma/alpha
TRAJECTORY_STEPS = 8
ENTRIES = 1024  # conditions that are compared
FEW = 4  # rows where each of them shows it
# Relative error below which a network was trained under a reading; untrained ones have 1 and more.
TRAINED = 0.6
# What "far" is: so many times better where the configured reading fails altogether; where it does not, so much lower
# mean log errors, by so many standard errors over the same images.
FACTOR, MARGIN, DEVIATIONS = 2.0, 0.05, 4.0
SAME = 1e-4
ROUNDED = 0.05  # between float32 and bfloat16

_CONFIG = "scheduler/scheduler_config.json of the pipeline"
_KINDS = {
    "epsilon": "epsilon prediction",
    "v": "v prediction",
    "edm": "EDM's output",
    "flow": "flow prediction",
    "inverted flow": "flow prediction with inverted sigmas",
    "sample": "x_0 prediction",
}


@dataclass(frozen=True)
class Reading:
    """One way to read the network; its time is that of ``noise_ratio`` times the noise in the input."""

    schedule: Schedule
    kind: Kind
    name: str
    noise_ratio: float = 1.0


@dataclass(frozen=True)
class Findings:
    """The teacher's one-step x_0 error at each noise level sigma/alpha, relative to the best linear denoiser's."""

    levels: tuple[float, ...]
    error: tuple[float, ...]
    trained: bool


def check_conventions(session: Session) -> Findings:
    """Check the teacher, and the roles that should start as it does.

    Raises:
        InputError: another prediction type or schedule explains the images far better, the empty condition is not
            empty, guidance changes nothing, or the critic or target differs from what it should start as.
    """
    with torch.no_grad():
        probe = _Probe(session)
        own = Reading(probe.teacher.schedule, probe.teacher.kind, _described(session.trace.pipeline.scheduler))
        _check_conditions(session.conditioning, session.recipe.teacher.guidance.scale)
        x0 = probe.images(own)
        error = probe.error(own, x0)
        trained = _mean(error) < TRAINED
        if trained:
            _check_margin(probe, own, x0)
        else:
            _check_others(probe, own, _mean(error))
        _check_guidance(probe, own, x0, trained)
        _check_starts(probe, own, x0)
    return Findings(LEVELS, tuple(error.mean(1).tolist()), trained)


class _Probe:
    """The teacher under any reading, on a few rows of the run's data."""

    def __init__(self, session: Session):
        self.session, self.roles = session, session.method.roles
        self.teacher, self.real = self.roles.teacher, None
        count = len(session.conditioning) if session.rows is None else len(session.rows[0])
        index = torch.arange(ROWS) * count // ROWS if count > ROWS else torch.arange(ROWS) % count
        if session.rows is not None:
            latents, conditions = session.rows
            self.real, index = latents[index].float().to(session.device), conditions[index]
        self.cond, self.null = session.conditioning.batch(index)
        # Small samples go through the network all at once, large ones in the micro-batches of training.
        train, size = session.recipe.train, torch.Size(session.trace.latent_shape).numel()
        self.chunk = max(train.batch_size // train.accumulation, 32_768 // size)

    def noise(self, seed: int, rows: int) -> Tensor:
        """Standard normal noise that leaves the run's own random numbers alone."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, *self.session.trace.latent_shape, generator=generator).to(self.session.device)

    def images(self, reading: Reading, rows: int | None = None) -> Tensor:
        """Real latents where the run has them, else the ends of a short trajectory under ``reading``; (rows, ...)."""
        rows = rows or ROWS
        if self.real is not None:
            return self.real[:rows]
        schedule, x = reading.schedule, self.noise(1, rows)
        cond = {name: value[:rows] for name, value in self.cond.items()}
        # Short of zero SNR, where an epsilon has no x_0.
        top = time_of_ratio(schedule, torch.tensor([50.0], dtype=torch.float64)).item()
        grid = schedule.snap(torch.linspace(top, 0, TRAJECTORY_STEPS + 1, dtype=torch.float64)).to(x.device)
        for t, r in zip(grid[:-1].split(1), grid[1:].split(1), strict=True):
            prediction = self.predict(reading, x, t.expand(rows), cond)
            x = prediction.x0 if r == 0 else schedule.add_noise(prediction.x0, prediction.eps, r.expand(rows))
        return x

    def predict(
        self, reading: Reading, x_t: Tensor, t: Tensor, cond: Conditions, role: Denoiser | None = None
    ) -> Prediction:
        """The prediction of ``role`` (default: the teacher) without guidance at ``x_t`` (B, ...), ``t`` (B,)."""
        role, network_t = role or self.teacher, t
        if reading.noise_ratio != 1:
            alpha, sigma = reading.schedule.coefficients(t)
            network_t = time_of_ratio(reading.schedule, reading.noise_ratio * sigma / alpha)
        # Another Denoiser, so that the run's count of evaluations stays its own.
        network = Denoiser(role.network, role.spec, reading.schedule, reading.kind)
        parts = []
        for first in range(0, len(x_t), self.chunk):
            rows = slice(first, first + self.chunk)
            parts.append(network(x_t[rows], network_t[rows], {name: value[rows] for name, value in cond.items()}).raw)
        return Prediction(torch.cat(parts), x_t, t, reading.schedule, reading.kind)

    def noised(self, reading: Reading, x0: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """(x_t, t) of every image at every level, level by level."""
        ratios = torch.tensor(levels, dtype=torch.float64, device=x0.device).repeat_interleave(len(x0))
        t, clean = time_of_ratio(reading.schedule, ratios), _repeated(x0, len(levels))
        return reading.schedule.add_noise(clean, self.noise(2, len(clean)), t), t

    def error(self, reading: Reading, x0: Tensor, cond: Conditions | None = None, levels=LEVELS) -> Tensor:
        """Squared one-step x_0 error on ``x0`` (B, ...) relative to the best linear denoiser's, (levels, B)."""
        x_t, t = self.noised(reading, x0, levels)
        cond = {name: _repeated(rows[: len(x0)], len(levels)) for name, rows in (cond or self.cond).items()}
        difference = self.predict(reading, x_t, t, cond).x0 - _repeated(x0, len(levels))
        variance, (alpha, sigma) = x0.double().var(), reading.schedule.coefficients(t)
        linear = variance * sigma**2 / (alpha**2 * variance + sigma**2)
        error = difference.double().square().flatten(1).mean(1) / linear
        # A reading that overflows fits worst of all.
        return error.nan_to_num(nan=torch.inf).reshape(len(levels), len(x0))


def other_readings(own: Reading, config: Mapping[str, Any]) -> list[Reading]:
    """What the network might be instead: other prediction types, stock schedules, the own schedule shifted."""
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    stock = {
        ("linear", start, end), ("scaled_linear", start, end), ("squaredcos_cap_v2", 0.0001, 0.02),
        ("linear", 0.0001, 0.02), ("scaled_linear", 0.00085, 0.012),
    }  # fmt: skip
    if isinstance(own.schedule, FlowSchedule):
        readings = [_stock(kind, *betas) for betas in sorted(stock) for kind in ("epsilon", "v")]
    else:
        readings = [Reading(own.schedule, kind, own.name) for kind in ("epsilon", "v", "sample") if kind != own.kind]
        readings += [_stock(own.kind, *betas) for betas in sorted(stock)]
        readings = [one for one in readings if one.kind != own.kind or not _equal(one.schedule, own.schedule)]
        readings.append(Reading(FlowSchedule(), "flow", "flow matching"))
    return readings + [Reading(own.schedule, own.kind, own.name, ratio) for ratio in (0.5, 2.0)]


def _stock(kind: Kind, name: str, start: float, end: float) -> Reading:
    scheduler = DDIMScheduler(beta_schedule=name, beta_start=start, beta_end=end)
    return Reading(VPSchedule(scheduler.alphas_cumprod), kind, _described(scheduler))


def _equal(a: VPSchedule, b: Schedule) -> bool:
    if not isinstance(b, VPSchedule):
        return False
    return a.alphas_cumprod.shape == b.alphas_cumprod.shape and torch.allclose(a.alphas_cumprod, b.alphas_cumprod)


def _described(scheduler: Any) -> str:
    config = scheduler.config
    if config.get("trained_betas") is not None:
        return "trained_betas"
    if "sigma_data" in config or config.get("timestep_type") == "continuous":
        return "EDM"
    if "beta_schedule" not in config or config.get("use_flow_sigmas"):
        return "flow matching"
    if config["beta_schedule"] == "squaredcos_cap_v2":
        return "squaredcos_cap_v2"
    return f"{config['beta_schedule']} (beta {config['beta_start']:g} to {config['beta_end']:g})"


def _check_others(probe: _Probe, own: Reading, error: float) -> None:
    """The network does not fit its configuration: refuse it if it fits another one."""
    others = [one for one in other_readings(own, probe.session.trace.pipeline.scheduler.config) if one.noise_ratio == 1]
    errors = [_mean(probe.error(one, probe.images(one, FEW))) for one in others]
    best = min(range(len(others)), key=errors.__getitem__)
    if errors[best] < TRAINED and errors[best] < error / FACTOR:
        raise _refusal(own, others[best], error, errors[best])


def _check_margin(probe: _Probe, own: Reading, x0: Tensor) -> None:
    """The network fits its configuration: no other schedule may fit better."""
    # Another prediction type cannot: where one makes sense, the others do not.
    config = probe.session.trace.pipeline.scheduler.config
    others = [one for one in other_readings(own, config) if one.schedule is not own.schedule or one.noise_ratio != 1]
    best = None
    for _ in range(3):
        logs = [probe.error(one, x0).log().mean(0) for one in (own, *others)]
        wins = [index for index in range(1, len(logs)) if _lower(logs[index], logs[0])]
        if not wins:
            return
        previous, best = best, min(wins, key=lambda index: logs[index].mean().item())
        if best == previous or probe.real is not None:
            break
        # Images of a wrong reading favor it, and blur which other one is right; the better one's own images tell.
        x0 = probe.images(others[best - 1])
    raise _refusal(own, others[best - 1], logs[0].mean().exp().item(), logs[best].mean().exp().item())


def _lower(a: Tensor, b: Tensor) -> bool:
    """Whether ``a`` is far lower than ``b``, row by row: log errors (B,)."""
    difference = a - b
    return bool(difference.mean() < -max(MARGIN, DEVIATIONS * difference.std().item() / len(a) ** 0.5))


def _refusal(own: Reading, better: Reading, error: float, lower: float) -> InputError:
    numbers = f"x_0 error relative to the best linear denoiser's: {lower:.2g} so, {error:.2g} as configured"
    if better.noise_ratio != 1:
        much = "half" if better.noise_ratio > 1 else "twice"
        return InputError(
            f"teacher.pipeline: at every timestep the network behaves as if trained at about {much} the noise level "
            f"(sigma/alpha) that its scheduler, {own.name}, states ({numbers}); check the schedule in {_CONFIG} for a "
            "shift"
        )
    if better.schedule is own.schedule:
        return InputError(
            f"teacher.pipeline: the network's outputs fit {_KINDS[better.kind]}, its scheduler says "
            f"{_KINDS[own.kind]} ({numbers}); check prediction_type in {_CONFIG}"
        )
    kind = f" and {_KINDS[better.kind]}" if better.kind != own.kind else ""
    return InputError(
        f"teacher.pipeline: the network fits the noise schedule {better.name}{kind}, its scheduler says {own.name} "
        f"({numbers}); check the scheduler's class, beta_schedule, beta_start and beta_end in {_CONFIG}"
    )


def _check_conditions(conditioning: Conditioning, scale: float) -> None:
    """Entries differ from each other, and from the empty condition where that is used; a few of very many."""
    count = len(conditioning)
    index = torch.arange(min(count, ENTRIES)) * count // min(count, ENTRIES)
    first, _ = conditioning.gathered(index[:1])
    if not first:
        return
    labels = [conditioning.labels[i] for i in index.tolist()]
    if len(set(labels)) > 1 and all(
        _identical(cond, first).all() for cond, _ in map(conditioning.gathered, index.split(32))
    ):
        a, b = list(dict.fromkeys(labels))[:2]
        raise InputError(
            f"data.conditions: the network gets the same input for {a!r}, {b!r} and all others; check how the pipeline "
            "passes its prompts or classes to its network"
        )
    if scale == 1 or conditioning.null is None:
        return
    if 0 < scale < 1:
        say(
            f"teacher.guidance.scale {scale:g} weakens the condition: here the rule is uncond + w (cond - uncond), and "
            f"what papers with (1 + w) call {scale:g} is {1 + scale:g}"
        )
    empty = [_identical(*conditioning.gathered(part)) for part in index.split(32)]
    for label, same in zip(labels, torch.cat(empty).tolist(), strict=True):
        if same and label.strip():
            raise InputError(
                f"teacher.guidance: the empty condition is the same as that of {label!r}, so guidance {scale:g} would "
                "lead away from it; check the pipeline's null class or its empty and negative prompt"
            )


def _identical(cond: Conditions, row: Conditions) -> Tensor:
    """Which rows (N,) of ``cond`` are the ``row`` or rows of the same name in every tensor."""
    pairs = [(rows, row[name].to(rows.device)) for name, rows in cond.items()]
    return torch.stack([(rows == other).reshape(len(rows), -1).all(1) for rows, other in pairs]).all(0)


def _check_guidance(probe: _Probe, own: Reading, x0: Tensor, trained: bool) -> None:
    """Guidance changes the prediction, and leads from the worse explanation to the better one."""
    scale, null = probe.session.recipe.teacher.guidance.scale, probe.null
    if scale == 1 or null is None or not trained:
        return
    x_t, t = (rows[:FEW] for rows in probe.noised(own, x0, (2.0,)))
    cond, empty = ({name: rows[:FEW] for name, rows in given.items()} for given in (probe.cond, null))
    with_guidance = guided(probe.teacher.on(probe.teacher.network), x_t, t, cond, empty, scale, Rule()).raw
    without = probe.predict(own, x_t, t, cond).raw
    if _difference(with_guidance, without) < SAME:
        raise InputError(
            f"teacher.guidance.scale: {scale:g} changes nothing: the network says the same with the condition and with "
            "the empty one; check the pipeline's null class or its empty and negative prompt, or set the scale to 1"
        )
    levels = (1.0, 2.0, 5.0)
    logs = [probe.error(own, x0, cond, levels).log().mean(0) for cond in (null, probe.cond)]
    if _lower(*logs):
        raise InputError(
            "teacher.guidance: the empty condition explains the images better than their own conditions do "
            f"({logs[0].mean().exp():.2g} against {logs[1].mean().exp():.2g} of the best linear denoiser's error): "
            "are the two swapped, or are the images labelled wrongly?"
        )


def _check_starts(probe: _Probe, own: Reading, x0: Tensor) -> None:
    """The critic starts as the teacher, and the target as the student."""
    roles, method = probe.roles, probe.session.recipe.method.name
    x_t, t = probe.noised(own, x0, (1.0,))
    for name, model in (("critic", "teacher"), ("target", "student")):
        if name not in roles:
            continue
        role = getattr(roles, name)
        raws = [probe.predict(own, x_t, t, probe.cond, one).raw for one in (role, getattr(roles, model))]
        dtypes = {next(one.network.parameters()).dtype for one in (role, getattr(roles, model))}
        # A network that is trained whole is float32 beside a teacher that may be rounded to bfloat16.
        if (difference := _difference(*raws)) > (SAME if len(dtypes) == 1 else ROUNDED):
            raise InputError(
                f"method {method}: its {name} differs from the {model} by {difference:.2g} before the first step; "
                "what its adapt() adds to a network must leave the outputs as they were"
            )


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def _mean(error: Tensor) -> float:
    """Geometric mean over levels of the mean over images."""
    return error.mean(1).log().mean().exp().item()


def _repeated(rows: Tensor, times: int) -> Tensor:
    return rows.repeat(times, *[1] * (rows.ndim - 1))
