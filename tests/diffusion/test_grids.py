"""Time grids of students at the schedulers of published pipelines: where each step is, what the stock call repeats."""

import itertools

import diffusers
import pytest
import torch

from published import MODELS
from stepdistill.diffusion.samplers import DDIM, SAMPLERS, Renoise, solver_grid
from stepdistill.diffusion.schedule import from_scheduler, shifted
from stepdistill.errors import InputError
from stepdistill.methods import METHODS, Roles
from stepdistill.methods.base import PathNeeds
from stepdistill.methods.pcm import segment_points
from stepdistill.methods.progressive import halved
from stepdistill.sampling.trajectories import path_times
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import G1, Spy, batch

FLOW = [name for name, facts in MODELS.items() if "flow_shift" in facts.scheduler_config or "Flow" in facts.scheduler]


def set_up_of(facts):
    """What the published pipeline's call gives any scheduler's set_timesteps in n steps."""

    def set_up(scheduler, steps):
        if not facts.sigmas:
            return {"num_inference_steps": steps}
        given = {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()}
        return given if facts.mu is None else given | {"mu": facts.mu}

    return set_up


def sampler_of(name, kind, steps, **options):
    facts = MODELS[name]
    source = getattr(diffusers, facts.scheduler)(**facts.scheduler_config)
    schedule, _ = from_scheduler(source, facts.mu)
    return kind(schedule, source, steps, set_up_of(facts), **options)


def times(sampler, steps=None):
    return [step.t for step in sampler.grid(steps)]


def stock_times(sampler, name, steps):
    """Of a plain call in ``steps`` steps with the exported scheduler, whatever it was trained for."""
    scheduler = type(sampler.scheduler).from_config(sampler.scheduler.config)
    scheduler.set_timesteps(**set_up_of(MODELS[name])(scheduler, steps))
    return (scheduler.timesteps.double() / 1000).tolist()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", [Renoise, DDIM])
@pytest.mark.parametrize("name", FLOW)
def test_every_step_of_a_flow_student_is_of_use(name, kind, steps):
    sampler = sampler_of(name, kind, steps)
    found = times(sampler)
    assert found[0] == 1 and found[-1] >= 0.05 and all(a - b > 0.02 for a, b in itertools.pairwise(found))
    assert found == pytest.approx(stock_times(sampler, name, steps))
    # The last step starts at the shifted 1/n, as where the pipeline hands its scheduler sigmas down to 1/n.
    shift = sampler.schedule.shift
    assert found[-1] == pytest.approx(shift / (steps + shift - 1), abs=1e-4)


@pytest.mark.parametrize("kind", [Renoise, DDIM])
@pytest.mark.parametrize(
    "name,steps,expected",
    [
        ("sd35-medium", 4, [1, 0.928, 0.799, 0.5]),
        ("sd35-medium", 2, [1, 0.75]),
        ("sd35-medium", 8, [1, 0.963, 0.917, 0.859, 0.784, 0.681, 0.532, 0.3]),
        ("sd35-medium", 1, [1]),
        ("sana-1600m", 2, [1, 0.75]),
        ("wan21-1.3b", 4, [1, 0.928, 0.799, 0.5]),
        ("auraflow", 2, [1, 0.634]),
        ("z-image", 4, [1, 0.947, 0.857, 0.667]),
        # exp(mu) = 3.158 at 1024 pixels; Qwen-Image's is 2.001, and its shift_terminal .02 is not for few steps.
        ("flux-dev", 4, [1, 0.905, 0.759, 0.513]),
        ("qwen-image", 4, [1, 0.857, 0.667, 0.400]),
    ],
)
def test_the_grids_of_published_flow_pipelines(name, steps, expected, kind):
    assert times(sampler_of(name, kind, steps)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", FLOW)
def test_another_number_of_steps_than_trained_is_a_sensible_run(name):
    """Where the pipeline hands over sigmas, one step too, and each run ends at its own shifted 1/n."""
    for trained in (1, 2, 4):
        sampler, sigmas = sampler_of(name, Renoise, trained), MODELS[name].sigmas
        for steps in (2, 3, 6, 12) + ((1,) if sigmas else ()):
            found, shift = stock_times(sampler, name, steps), sampler.schedule.shift
            assert found[0] == 1 and all(a > b > 0 for a, b in itertools.pairwise(found))
            assert not sigmas or found[-1] == pytest.approx(shift / (steps + shift - 1), abs=1e-4)


@pytest.mark.parametrize("trained", [1, 3, 4])
@pytest.mark.parametrize("kind", SAMPLERS.values())
@pytest.mark.parametrize("name", ["sd15", "sd21-v", "sdxl", "pixart-sigma", "dit-xl-256"])
def test_a_vp_students_scheduler_runs_any_number_of_steps(name, kind, trained):
    sampler = sampler_of(name, kind, trained)
    for steps in (1, 2, 4, 8, 16):
        scheduler = type(sampler.scheduler).from_config(sampler.scheduler.config)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[0] == 999 and len(scheduler.timesteps) == steps


@pytest.mark.parametrize("name", FLOW)
def test_the_teachers_solver_grid_is_shifted_as_its_own(name):
    """At shift 3 a quarter of the points lie below t = .5, as of the teacher's own steps."""
    facts = MODELS[name]
    source = getattr(diffusers, facts.scheduler)(**facts.scheduler_config)
    schedule, _ = from_scheduler(source, facts.mu)
    grid, u = solver_grid(schedule, 50), torch.arange(51).double() / 50
    torch.testing.assert_close(grid, schedule.shift * u / (1 + (schedule.shift - 1) * u))
    if facts.sigmas and facts.mu is None:
        source.set_timesteps(sigmas=u[1:].flip(0).tolist())
        torch.testing.assert_close(grid[1:].flip(0), source.timesteps.double() / 1000, rtol=1e-5, atol=1e-6)


def sfd_times(sampler):
    """Times at which SFD asks the teacher inside the steps, (4, 4) with each step's end."""
    teacher = Spy(GaussianDenoiser(*G1, sampler.schedule, "flow"))
    method = METHODS["sfd"](METHODS["sfd"].Config(substeps=3), Roles(teacher=teacher, student=teacher), sampler)
    method.teacher_points(batch(1))
    inside = torch.stack([t[0] for _, t in teacher.calls]).reshape(4, 3)
    return torch.cat([inside, torch.tensor([*times(sampler)[1:], 0.0])[:, None]], 1)


WITHIN = {
    "pcm": lambda sampler: segment_points(sampler, 4, 12).flip(1),
    "pd": lambda sampler: torch.tensor([(s.t, s.r or 0.0) for s in halved(sampler.grid(), sampler.schedule)]),
    "sfd": sfd_times,
    "stored paths": lambda sampler: path_times(
        sampler.schedule, PathNeeds(1, 12, through_grid=True), times(sampler)
    ).unfold(0, 4, 3),
}


@pytest.mark.parametrize("name", WITHIN)
def test_what_lies_within_a_students_steps_is_shifted_too(name):
    """Of SD 3.5's shift 3: t/(3 - 2 t), the time before its shift, is evenly spaced inside each step."""
    sampler = sampler_of("sd35-medium", DDIM, 4)
    rows = WITHIN[name](sampler).double()
    if name == "pd":  # two halves of each step
        rows = torch.cat([rows[::2], rows[1::2, 1:]], 1)
    assert rows[:, 0].tolist() == pytest.approx(times(sampler), abs=1e-6)
    even = shifted(rows, 1 / 3).diff(dim=1)
    torch.testing.assert_close(even, even[:, :1].expand_as(even), rtol=1e-4, atol=1e-5)


def test_a_stated_shift_is_exported_as_it_is():
    facts = MODELS["qwen-image"]
    source = diffusers.FlowMatchEulerDiscreteScheduler(**facts.scheduler_config)
    schedule = type(from_scheduler(source)[0])(3.0)
    sampler = Renoise(schedule, source, 4, set_up_of(facts))
    assert times(sampler) == pytest.approx([1, 0.9, 0.75, 0.5]) == stock_times(sampler, "qwen-image", 4)
    assert not sampler.scheduler.config.use_dynamic_shifting and sampler.scheduler.config.shift == 3.0


@pytest.mark.parametrize("kind", [Renoise, DDIM])
def test_flow_has_no_other_start(kind):
    with pytest.raises(InputError, match=r"student.start: expected null for a flow schedule.*found 399"):
        sampler_of("flux-dev", kind, 1, start=399)
