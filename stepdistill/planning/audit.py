"""Audit of a run before its first step: each fact that decides whether it can reach its recipe's goal, with a verdict.

The methods' mathematics does not show whether a grid has a step that does nothing, whether the rounding of half
precision hides x_0, or whether a learning rate moves weights as far as in the run that it was taken from. All of that
follows from the recipe, the scheduler's table and the networks' shapes, so it is stated before a GPU is paid for.

    grid        a last time below .05 does nothing: x_0 moves by t of the output there
    rounding    |dx_0/d output| x 2^-9: noise that bf16 outputs put into x_0 (:mod:`half_precision`)
    shares      of the student's updates at each position of the grid
    speed       rms change of the weights by one update, and relative to the weights (:mod:`update_speed`)
    samples     student updates x batch, and passes over the conditions
"""

import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from stepdistill.diffusion.experts import Turn, parts
from stepdistill.diffusion.samplers import Step
from stepdistill.diffusion.schedule import Kind, Schedule
from stepdistill.errors import InputError
from stepdistill.methods.base import DistillMethod
from stepdistill.planning.update_speed import moving, rms_change, speed
from stepdistill.planning.update_time import kinds_of_steps, own_seconds, seconds_alone
from stepdistill.progress import COLUMNS, say
from stepdistill.recipe import Recipe
from stepdistill.recipe.memory import GIB, RESERVE
from stepdistill.recipe.published_runs import RUNS, PublishedPlayer, PublishedRun
from stepdistill.roles.views import AdapterView
from stepdistill.training.half_precision import LIMIT, ROUNDING, latest_start, rounding_noise

if TYPE_CHECKING:
    from stepdistill.planning.plan import Plan

Verdict = Literal["ok", "warning", "error"]
LAST_TIME = 0.05
"""Below it the last step of a grid of few steps does nothing."""
FLOAT32 = 2.0**-24
"""Float32's rounding relative to the number."""
SPREAD = 100.0
"""Ratio of gradients at two positions of a grid from which Adam hardly sees the smaller one."""
SPEEDS = {"student": (1e-6, 5e-3), "critic": (1e-6, 3e-2)}
"""Change by one update relative to the weights: a sane range of each player; published runs are 3e-5 to 1.4e-2."""
OWN_SPEED = ("adafactor", "muon", "prodigy")
"""Optimizers whose updates have another size than their rate, which Adam's, Lion's and schedule-free ones have."""
REACH = 0.01
"""Change of all updates of one sign, relative to the weights, below which nothing can have been learned."""
FACTOR = 4.0
"""Speeds and numbers of samples within this factor of the published run's bring no warning."""
PASSES = 50


@dataclass(frozen=True)
class Check:
    """One line of the audit: a value in words and as ``numbers``, the published run's, a verdict and what helps."""

    name: str
    value: str
    verdict: Verdict = "ok"
    remedy: str = ""
    published: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


def audit(
    recipe: Recipe, method: DistillMethod, kind: Kind, conditions: int, seconds: str | None = None
) -> list[Check]:
    """The checks that need no weights.

    Args:
        method: with its sampler, and roles whose networks may be without data.
        kind: what the denoiser emits.
        conditions: how many prompts or classes there are.
        seconds: of a training step, a number or a run folder that has measured them; None: of the recipe's own run
            folder, where it has.

    Raises:
        InputError: ``seconds`` are not to be had.
    """
    run = RUNS[recipe.published] if recipe.published else None
    grid, schedule = method.sampler.grid(), method.schedule
    checks = [Check("published run", run.title, remedy="; ".join(filter(None, (run.source, run.note))))] if run else []
    checks += [grid_check(schedule, grid, run), rounding_check(schedule, grid, kind, half_keys(recipe))]
    checks += [shares_check(schedule, grid, kind, method.shares(recipe.train.steps - 1))]
    if (student := method.roles.student).takes_turns and len(student.spec.experts) > 1:
        checks.append(experts_check(schedule, grid, student.spec.experts))
    kinds, steps = kinds_of_steps(method, recipe.train.steps), recipe.train.steps
    updates = {
        player: round(steps * sum(share * turns.count(player) for turns, share in kinds.items()))
        for player in method.players
    }
    checks += [one for player in method.players for one in speed_checks(recipe, method, player, updates[player], run)]
    checks += sample_checks(recipe, updates["student"] * recipe.train.batch_size, conditions, run)
    if seconds is not None or (seconds := own_seconds(recipe, kinds)) is not None:
        checks.append(time_check(seconds_alone(str(seconds), kinds, recipe.train.batch_size), steps))
    return checks


def grid_check(schedule: Schedule, grid: Sequence[Step], run: PublishedRun | None = None) -> Check:
    """The times of the student's steps, and the timesteps that its network gets."""
    times = [step.t for step in grid]
    timesteps = schedule.timestep(torch.tensor(times, dtype=torch.float64)).tolist()
    value = f"t {_some(times)}; timesteps {_some(timesteps)}"
    published = _some(run.timesteps) if run and run.timesteps else ""
    verdict, remedy = "ok", ""
    if any(later >= earlier for earlier, later in itertools.pairwise(times)):
        verdict, remedy = "error", "expected times that fall; fewer student.steps"
    elif len(times) > 1 and times[-1] < min(LAST_TIME, 0.5 / len(times)):
        verdict = "warning"
        remedy = f"the step at t = {times[-1]:.2g} does nothing: a scheduler whose times end higher, or one step less"
    return Check("grid", value, verdict, remedy, published, {"t": times, "timesteps": timesteps})


def experts_check(schedule: Schedule, grid: Sequence[Step], turns: Mapping[str, Turn]) -> Check:
    """Which steps of the student's grid each of its networks answers."""
    steps: dict[str, list[int]] = {name: [] for name in turns}
    for number, step in enumerate(grid, 1):
        ((name, _),) = parts(schedule.timestep(torch.tensor([step.t], dtype=torch.float64)), turns)
        steps[name].append(number)
    value = "; ".join(f"{name}: {', '.join(map(str, own)) or 'none'}" for name, own in steps.items())
    idle = [name for name, own in steps.items() if not own]
    remedy = f"no step is at times of {' and '.join(idle)}: more student.steps, another student.shift" if idle else ""
    return Check("steps by expert", value, "warning" if idle else "ok", remedy, numbers={"steps": steps})


def rounding_check(schedule: Schedule, grid: Sequence[Step], kind: Kind, half: Sequence[str]) -> Check:
    """sigma/alpha at both ends of the grid, and the noise in x_0 that outputs of this precision bring.

    Args:
        kind: what the network emits.
        half: the recipe's keys that put these outputs into bfloat16; empty: they are float32.
    """
    ends = [step.t for step in (grid if len(grid) == 1 else (grid[0], grid[-1]))]
    alpha, sigma = schedule.coefficients(torch.tensor(ends, dtype=torch.float64))
    ratios = [float(s / a) if a else math.inf for a, s in zip(alpha, sigma, strict=True)]
    noises = [rounding_noise(schedule, kind, t) for t in ends]
    noise = max(noises) if half else max(noises) * FLOAT32 / ROUNDING
    value = f"sigma/alpha {_some(ratios)}; noise of {noise:.1g} in x_0 from {'bf16' if half else 'fp32'} outputs"
    numbers = {"sigma_over_alpha": ratios, "amplification": [one / ROUNDING for one in noises], "noise": noise}
    if noise <= LIMIT:
        return Check("rounding", value, numbers=numbers)
    start = latest_start(schedule, kind)
    earlier = f", or student.start: {start}" if start is not None and schedule.name == "vp_discrete" else ""
    wide = " and ".join(f"{key}: fp32" for key in half)
    remedy = f"more than {LIMIT:g}, with which a student does not learn: {wide}{earlier}"
    return Check("rounding", value, "error", remedy, numbers=numbers)


def half_keys(recipe: Recipe) -> list[str]:
    """The recipe's keys that put the outputs of the student's network into bfloat16."""
    rounded = {
        "train.precision": recipe.train.precision == "bf16",
        "teacher.precision": recipe.teacher.precision == "bf16" and recipe.role_training["student"] != "full",
    }
    return [key for key, half in rounded.items() if half]


def shares_check(schedule: Schedule, grid: Sequence[Step], kind: Kind, shares: Sequence[float] | None) -> Check:
    """The share of the student's updates at each position of its grid."""
    if shares is None:
        return Check("updates by position", "times of the method's own, not the grid's")
    value = ", ".join(f"{share:.0%}" for share in shares)
    factors = [rounding_noise(schedule, kind, step.t) for step, share in zip(grid, shares, strict=True) if share]
    spread = max(factors) / max(min(factors), 1e-12)
    numbers = {"shares": list(shares), "spread": spread}
    if spread <= SPREAD:
        return Check("updates by position", value, numbers=numbers)
    remedy = f"gradients differ by a factor of {spread:.0f} between positions: a student.start below the noise end"
    return Check("updates by position", value, "warning", remedy, numbers=numbers)


def speed_checks(
    recipe: Recipe, method: DistillMethod, player: str, updates: int, run: PublishedRun | None
) -> Iterator[Check]:
    """How far one update moves the weights of a player, beside the published run's on the same layers."""
    key, lr = ("train.lr", recipe.train.lr) if player == "student" else ("train.critic_lr", recipe.train.critic_lr)
    name, other = f"{player} speed", run.players.get(player) if run else None
    network = next((module for module in method.checked_modules(player) if module is not None), None)
    if (optimizer := recipe.train.optimizer_of(player).name) in OWN_SPEED:
        yield Check(name, f"rate {lr:g} of {optimizer}, whose updates are not of Adam's size", numbers={"lr": lr})
        return
    if recipe.role_training.get(player) == "frozen":
        yield Check(name, f"layers of its own at rate {lr:g}, no weights of the teacher's", numbers={"lr": lr})
        return
    adapter = network.adapter if isinstance(network, AdapterView) else None
    layers = [] if network is None else [(weight.numel(), fan_in) for weight, fan_in, _ in moving(network, adapter)]
    if not layers:  # heads, which are built on the first batch
        yield Check(name, f"all weights at rate {lr:g}", numbers={"lr": lr})
        return
    rate = speed(network, lr, adapter)
    relative = rate.change / _size(layers) if rate.relative is None else rate.relative
    value = f"{rate.change:.1e} an update, {relative:.1e} of |W|, {updates} updates"
    numbers = {"change": rate.change, "relative": relative, "updates": updates}
    low, high = SPEEDS["student" if player == "student" else "critic"]
    problems, published = [], ""
    if relative > high:
        problems.append(f"{key} is high for these layers: above {high:g} of |W| an update training breaks")
    elif relative < low or relative * updates < REACH:
        problems.append(f"all updates together move {relative * updates:.1e} of |W|: a higher {key}, or more steps")
    if other is not None:
        numbers["published"] = change = _published(other, layers)
        published = f"{change:.1e}"
        numbers["ratio"] = ratio = rate.change / change
        if not 1 / FACTOR <= ratio <= FACTOR:
            times = f"{ratio:.1f} times" if ratio > 1 else f"1/{1 / ratio:.1f} of"
            problems.append(f"{times} the published run's: {key}={lr / ratio:.1g} is as fast")
    yield Check(name, value, "warning" if problems else "ok", "; ".join(problems), published, numbers)


def sample_checks(recipe: Recipe, samples: int, conditions: int, run: PublishedRun | None) -> Iterator[Check]:
    """What the student gets to see."""
    batch, seen, passes = recipe.train.batch_size, run and run.samples, samples / max(conditions, 1)
    numbers: dict[str, Any] = {"samples": samples, "batch": batch}
    verdict, remedy, published = "ok", "", ""
    if run and run.batch:
        published = f"{_count(seen)} in batches of {run.batch}" if seen else f"batches of {run.batch}"
    if seen:
        numbers["ratio"] = samples / seen
        if samples < seen / FACTOR:
            verdict = "warning"
            remedy = f"1/{seen / samples:.0f} of the published run's: more train.steps or train.batch_size"
    yield Check("samples", f"{_count(samples)} in batches of {batch}", verdict, remedy, published, numbers)
    value = f"{conditions}, each seen {passes:.3g} times"
    numbers = {"conditions": conditions, "passes": passes}
    if recipe.data.conditions == "classes" or passes <= PASSES:
        yield Check("conditions", value, numbers=numbers)
        return
    remedy = "few prompts, often: data.conditions with a list of your own, thousands of lines"
    yield Check("conditions", value, "warning", remedy, numbers=numbers)


def memory_checks(plan: "Plan", gpu: float | None) -> Iterator[Check]:
    """GiB by phase, on the device and in the host's memory."""
    for phase, size in plan.phases.items():
        if not size or (phase == "encoding" and not plan.encoders.weights):
            continue
        numbers, fits = {"gib": size / GIB}, gpu is None or size / GIB + RESERVE <= gpu
        remedy = "" if fits else f"does not fit {gpu:g} GiB with {RESERVE:g} for the driver: see what follows"
        value = f"{size / GIB:.1f} GiB"
        yield Check(f"memory: {phase}", value, "ok" if fits else "error", remedy, numbers=numbers)
    for phase, size in plan.host_phases.items():
        yield Check(f"memory: {phase} (host)", f"{size / GIB:.1f} GiB", numbers={"gib": size / GIB})


def time_check(seconds: float, steps: int) -> Check:
    """The run's hours at so many seconds a training step."""
    hours = seconds * steps / 3600
    return Check("time", f"{hours:.3g} h of {seconds:.3g} s a step", numbers={"hours": hours, "seconds": seconds})


def rehearse(recipe: Recipe, method: DistillMethod, kind: Kind, conditions: int) -> None:
    """Print the audit at the start of a run; arguments as for :func:`audit`.

    Raises:
        InputError: the run cannot work.
    """
    checks = audit(recipe, method, kind, conditions)
    say(as_text(checks))
    for check in checks:
        if check.verdict == "error":
            raise InputError(f"{check.name}: {check.value}; {check.remedy}")


def as_text(checks: Sequence[Check]) -> str:
    """The table for people, in 80 columns; what the published run has and a remedy stand below their line."""
    wide, verdict = max(len(check.name) for check in checks), len("verdict")
    lines, left = [f"{'check':{wide}}  verdict  this run"], wide + verdict + 4
    for check in checks:
        start = f"{check.name:{wide}}  {check.verdict:{verdict}}  "
        below = (f"published: {check.published}" if check.published else "", check.remedy and f"-> {check.remedy}")
        for number, text in enumerate((check.value, *filter(None, below))):
            first = start if not number else " " * left
            lines.append(
                textwrap.fill(
                    text,
                    COLUMNS,
                    initial_indent=first,
                    subsequent_indent=" " * (left + 3 * (number > 0)),
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
    return "\n".join(lines)


def as_dict(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The same for scripts."""
    return [asdict(check) for check in checks]


def _size(layers: Sequence[tuple[int, int]]) -> float:
    """The rms of weights that torch gives to new layers: where the real ones are not there yet."""
    return math.sqrt(sum(count / (3 * fan_in) for count, fan_in in layers) / sum(count for count, _ in layers))


def _published(player: PublishedPlayer, layers: Sequence[tuple[int, int]]) -> float:
    """The rms change that the published run's rate and adapter make on these layers."""
    squares = (count * rms_change(player.lr, fan_in, player.rank, player.alpha) ** 2 for count, fan_in in layers)
    return math.sqrt(sum(squares) / sum(count for count, _ in layers))


def _some(numbers: Sequence[float]) -> str:
    """The numbers, or the first and last of many."""
    words = [f"{number:.3g}" if number < 1000 else f"{number:.0f}" for number in numbers]
    return ", ".join(words if len(words) <= 8 else [*words[:3], "...", *words[-2:]])


def _count(number: int) -> str:
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
