"""Stored trajectories: the guided teacher's DDIM steps, from a seed alone, kept and found again."""

import itertools

import pytest
import torch
from torch import Tensor

from pipeline.tiny import save_dit, tiny_dit
from sampling.resumed import costs_of_resumed
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.samplers import dpm_solver_step
from stepdistill.errors import InputError
from stepdistill.methods import METHODS, DataNeeds, DistillMethod
from stepdistill.methods.base import PathNeeds
from stepdistill.pipeline.conditioning import Conditioning, encode
from stepdistill.pipeline.trace import trace
from stepdistill.recipe import load
from stepdistill.sampling import trajectories
from stepdistill.sampling.trajectories import Solver, teacher_paths
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import SCHEDULES, at, ddim_path, player
from stepdistill.training.session import build, build_without_data
from training.test_host_copies import HostCopies

# Two classes and, as the third row, what the null label stands for.
MEANS, STDS, NULL = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.5, 0.3, 1.5]), 2
CONDITIONING = Conditioning(("a", "b"), {"class_labels": torch.arange(2)}, {"class_labels": torch.tensor([NULL])})


def teacher_of(name: str = "vp", means: Tensor = MEANS):
    schedule = SCHEDULES[name]
    exact = GaussianDenoiser(means, STDS, schedule, "v")
    return player(lambda x, t, labels: exact.posterior_mean(x, t, {"class_labels": labels}), schedule, "v")


def make(teacher=None, scale=2.0, seed=0, cache=None, conditioning=CONDITIONING, **needs):
    needs = {"count": 40, "steps": 5, "keep": "all"} | needs
    return teacher_paths(teacher or teacher_of(), conditioning, PathNeeds(**needs), scale, (1,), seed, cache)


def guided_x0(name: str, labels: Tensor, w: Tensor):
    exact = GaussianDenoiser(MEANS, STDS, SCHEDULES[name], "v")

    def x0(x, t):
        cond = exact.posterior_mean(x, t, {"class_labels": labels})
        null = exact.posterior_mean(x, t, {"class_labels": torch.full_like(labels, NULL)})
        return null + w[:, None] * (cond - null)

    return x0


@pytest.mark.parametrize("scales", [None, (1.0, 4.0)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_point_is_the_guided_teachers_ddim_step(name, scales):
    found = make(teacher_of(name), scales=scales)
    times = found.times.tolist()
    assert found.points.shape == (40, 6, 1) and times[0] == 1 and times[-1] == 0 and len(times) == 6
    x0 = guided_x0(name, found.index, found.scales)
    start = found.points[:, 0].double()
    for k in range(1, 5):
        expected = ddim_path(x0, start, times[: k + 1], SCHEDULES[name])
        torch.testing.assert_close(found.points[:, k].double(), expected, rtol=1e-5, atol=1e-5)
    end = x0(ddim_path(x0, start, times[:-1], SCHEDULES[name]), at(times[-2], 40))
    torch.testing.assert_close(found.points[:, 5].double(), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_multistep_solver_is_closer_to_the_flow(name):
    """Compared on a Gaussian alone, where the flow is known."""
    teacher, schedule = teacher_of(name), SCHEDULES[name]
    exact = GaussianDenoiser(MEANS, STDS, schedule, "v")
    errors = []
    for solver in ("ddim", "dpm"):
        found = make(teacher, scale=1.0, steps=20, solver=solver)
        start, cond = found.points[:, 0].double(), {"class_labels": found.index}
        # Where the solvers differ: the last step is the same for both.
        end = exact.flow_map(start, at(1.0, 40), at(found.times[-2], 40), cond)
        errors.append((found.points[:, -2] - end).abs().max().item())
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_tables_are_the_solvers_steps(name, solver):
    """Guidance and step as one sum give what the guided prediction and the solver give one after the other."""
    teacher, steps = teacher_of(name), 6
    found = make(teacher, scales=(1.0, 4.0), steps=steps, solver=solver)
    cond, null = CONDITIONING.batch(found.index)
    x, previous = found.points[:, 0].double(), None
    for k, (t, r) in enumerate(itertools.pairwise(found.times), 1):
        now = guided(teacher, x, t.expand(40), cond, null, found.scales)
        x = dpm_solver_step(now, previous, None if k == steps else r.expand(40))
        previous = now if solver == "dpm" else None
        torch.testing.assert_close(found.points[:, k].double(), x, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_no_step_copies_anything_between_host_and_device(solver):
    """A path's noise goes to the device and the grid once; the points are copied back together."""
    traced = trace(tiny_dit())
    cond, null = encode(traced, [3, 0]).to("meta").batch(torch.arange(2))
    traced.denoiser.network.to("meta")
    path = Solver(traced.denoiser, torch.linspace(1, 0, 6).double(), solver).path
    noise = torch.randn(2, *traced.latent_shape)
    with torch.no_grad():
        list(path(noise, cond, null, 2.0))
        with HostCopies() as mode:
            points = list(path(noise, cond, null, 2.0))
    assert len(points) == 6 and mode.found == ["(2, 4, 8, 8) cpu -> meta"]


def test_the_grid_holds_that_of_every_student_whose_steps_divide_it():
    timesteps = SCHEDULES["vp"].timestep(make(steps=20).times)
    assert timesteps[[0, 5, 10, 15]].tolist() == [999, 749, 499, 249]


def test_noise_conditions_and_scales_cover_what_they_should():
    found = make(count=3000, steps=1, scales=(1.0, 4.0))
    assert abs(found.points[:, 0].mean()) < 0.06 and abs(found.points[:, 0].std() - 1) < 0.05
    assert found.index.bincount().min() > 1350
    assert 1 <= found.scales.min() < 1.01 and 3.99 < found.scales.max() < 4 and abs(found.scales.mean() - 2.5) < 0.06
    assert make(scale=1.5).scales.unique().tolist() == [1.5]
    # One chunk does not repeat another.
    assert len(found.points[:, 0].unique()) == 3000


def test_the_cost_is_two_rows_a_step_with_guidance_and_one_without():
    assert make(scale=2.0).evaluations == 2 * 40 * 5
    assert make(scale=1.0).evaluations == 40 * 5


def test_the_ends_are_those_of_the_whole():
    whole, ends = make(), make(keep="ends")
    assert torch.equal(ends.points, whole.points[:, [0, -1]]) and ends.times.tolist() == [1.0, 0.0]


def test_what_is_stored_is_found_again_and_what_is_lost_is_made_again(tmp_path):
    first = make(cache=tmp_path)
    (file,) = tmp_path.iterdir()
    teacher = teacher_of()
    again = make(teacher, cache=tmp_path)
    assert teacher.evaluations == 0 and again.evaluations == first.evaluations
    file.unlink()
    anew = make(cache=tmp_path)
    for other in (again, anew):
        assert torch.equal(first.points, other.points) and torch.equal(first.index, other.index)
        assert torch.equal(first.scales, other.scales) and torch.equal(first.times, other.times)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_anything_they_depend_on_makes_others(tmp_path):
    base = make(cache=tmp_path)
    moved = teacher_of()
    moved.network.shift.data += 0.1
    other_null = Conditioning(("a", "b"), CONDITIONING.cond, {"class_labels": torch.tensor([1])})
    others = [
        make(moved, cache=tmp_path),
        make(teacher_of("flow"), cache=tmp_path),
        make(conditioning=other_null, cache=tmp_path),
        make(scale=3.0, cache=tmp_path),
        make(seed=1, cache=tmp_path),
        make(steps=6, cache=tmp_path),
    ]
    assert all(not torch.equal(base.points[:, -1], other.points[:, -1]) for other in others)
    assert len(list(tmp_path.iterdir())) == 7


def test_large_ones_take_half_the_room(tmp_path, monkeypatch):
    whole = make()
    monkeypatch.setattr(trajectories, "HALF_ABOVE", 100)
    small = make(cache=tmp_path)
    assert small.points.dtype == torch.float16
    torch.testing.assert_close(small.points.float(), whole.points, rtol=1e-3, atol=1e-3)
    assert torch.equal(make(cache=tmp_path).points, small.points)
    assert small.rows(torch.tensor([3]), CONDITIONING, "cpu").points.dtype == torch.float32


def test_scales_need_a_teacher_with_guidance():
    alone = Conditioning(("a", "b"), CONDITIONING.cond, None)
    with pytest.raises(InputError, match="guidance scales from 1 to 4"):
        make(conditioning=alone, scales=(1.0, 4.0))


class OnPaths(DistillMethod):
    """Regresses the clean end; the simplest method that trains on trajectories."""

    summary = "test"
    sampler_name = "ddim"

    @classmethod
    def data_needs(cls, config):
        return DataNeeds(paths=PathNeeds(count=30, steps=3, scales=(1.0, 2.0)))

    def losses(self, player, batch):
        path = batch.path
        x0 = self.roles.student(path.points[:, 0], self.times(1.0, batch), path.cond).x0
        return {"mse": (x0 - path.points[:, -1]).square().mean()}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A tiny run of that method, and a cache of its own."""
    monkeypatch.setitem(METHODS, "on-paths", OnPaths)
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    save_dit(tiny_dit(), tmp_path / "teacher")
    numbers = {"batch_size": 4, "lr": 1e-3, "log_every": 1, "preview_every": 100, "checkpoint_every": 1}
    return {
        "teacher": {"pipeline": str(tmp_path / "teacher"), "guidance": {"scale": 1.5}},
        "student": {"steps": 1, "ema": 0.9},
        "method": {"name": "on-paths"},
        "train": {"steps": 3, "tracker": "none"} | numbers,
        "report": {"samples": 0},
    }


def test_a_batch_gets_rows_of_its_own(recipe):
    session = build(load(recipe), torch.device("cpu"))
    assert session.method.roles.teacher.evaluations == session.paths.evaluations == 2 * 3 * 30
    whole = session.batch(7, 0, 4)
    path = whole.path
    assert path.points.shape == (4, 2, 4, 8, 8) and path.times.tolist() == [1.0, 0.0] and path.scales.shape == (4,)
    assert path.null["class_labels"].tolist() == whole.null["class_labels"].tolist()
    for i in range(4):
        (row,) = (session.paths.points == path.points[i]).flatten(1).all(1).nonzero().flatten().tolist()
        assert path.cond["class_labels"][i] == session.conditioning.cond["class_labels"][session.paths.index[row]]
        assert path.scales[i] == session.paths.scales[row]
    parts = torch.cat([session.batch(7, 0, 1).path.points, session.batch(7, 1, 3).path.points])
    assert torch.equal(parts, path.points)
    assert not torch.equal(session.batch(8, 0, 4).path.points, path.points)
    assert not torch.equal(whole.cond["class_labels"], path.cond["class_labels"])
    assert build_without_data(load(recipe), torch.device("cpu")).paths is None


@pytest.mark.parametrize("lost", [False, True])
def test_resume_is_bit_exact_and_counts_the_cost_once(recipe, tmp_path, monkeypatch, lost):
    costs = costs_of_resumed(recipe, tmp_path, monkeypatch, lost)
    # The trajectories and the steps; previews do not count.
    assert costs[0] == costs[1] == [2 * 3 * 30 + 4 * step for step in (1, 2, 3)]
