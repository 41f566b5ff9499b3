"""Samples of the teacher in the place of real ones: whose distribution they have, and how a batch gets them."""

import json

import pytest
import torch

from pipeline.tiny import save_dit, tiny_dit
from sampling.resumed import costs_of_resumed
from stepdistill.errors import InputError
from stepdistill.methods import METHODS
from stepdistill.methods.base import PathNeeds
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.planning import plan
from stepdistill.recipe import load
from stepdistill.run import train
from stepdistill.sampling.trajectories import teacher_paths
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import SCHEDULES, player
from stepdistill.training.session import build, build_without_data

OWN_GUIDANCE = {"gft", "model-guidance"}


def ends(name: str, steps: int, solver: str, w: float = 1.0, means=(0.7,), stds=(0.5,)) -> tuple[float, float]:
    """(b, k) of the solver's end b + k z; the last row of the Gaussians is the null condition's."""
    schedule, rows = SCHEDULES[name], len(means)
    exact = GaussianDenoiser(torch.tensor(means), torch.tensor(stds), schedule, "v")
    teacher = player(lambda x, t, labels: exact.posterior_mean(x, t, {"class_labels": labels}), schedule, "v")
    null = {"class_labels": torch.tensor([rows - 1])} if rows > 1 else None
    conditioning = Conditioning(("a",), {"class_labels": torch.zeros(1, dtype=torch.long)}, null)
    found = teacher_paths(teacher, conditioning, PathNeeds(2, steps, solver=solver), w, (1,), 0)
    (z0, y0), (z1, y1) = found.points[:, :, 0].double().tolist()
    slope = (y1 - y0) / (z1 - z0)
    return y0 - slope * z0, slope


@pytest.mark.parametrize(
    "name,steps,solver,k,b",
    [
        ("flow", 12, "dpm", 0.502610, 0.7), ("flow", 20, "dpm", 0.505486, 0.7), ("flow", 25, "ddim", 0.471201, 0.7),
        ("flow", 50, "ddim", 0.485397, 0.7), ("vp", 12, "dpm", 0.427181, 0.679587),
        ("vp", 20, "dpm", 0.459002, 0.678066), ("vp", 25, "ddim", 0.445491, 0.678712),
        ("vp", 50, "ddim", 0.469867, 0.677547),
    ],
)  # fmt: skip
def test_what_heads_call_real_is_the_solvers_distribution(name, steps, solver, k, b):
    """Data N(.7, .5^2); exact are .7 + .5 z on a flow and .676065 + .500876 z on Stable Diffusion's table."""
    assert ends(name, steps, solver) == pytest.approx((b, k), abs=2e-5)


@pytest.mark.parametrize("steps,solver,k,b", [(20, "dpm", 0.175558, 1.209065), (50, "ddim", 0.155889, 1.206782)])
def test_guidance_narrows_and_moves_it(steps, solver, k, b):
    """N(1, .5^2) against N(0, 1.5^2) under w = 2; exact 1.207742 + .166667 z."""
    assert ends("flow", steps, solver, 2.0, (1.0, 0.0), (0.5, 1.5)) == pytest.approx((b, k), abs=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_wants_images_takes_the_teachers_samples_instead(name):
    method, config = METHODS[name], METHODS[name].Config
    keys = {"gan_weight": 0.1} if "gan_weight" in config.model_fields else {}
    if "real" not in config.model_fields:
        assert not method.data_needs(config(**keys)).images
        return
    assert method.data_needs(config(**keys)).images and method.data_needs(config(**keys)).made is None
    needs = method.data_needs(config(**keys, real="teacher", real_rows=7, real_steps=3))
    # What learns guidance from data has to see data without it.
    scales = (1.0, 1.0) if name in OWN_GUIDANCE else None
    assert not needs.images and needs.made == PathNeeds(7, 3, "ends", scales, "dpm")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A tiny run on samples of its teacher, and a cache of its own."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    save_dit(tiny_dit(), tmp_path / "teacher")
    numbers = {"batch_size": 4, "lr": 1e-3, "log_every": 1, "preview_every": 100, "checkpoint_every": 1}
    return {
        "teacher": {"pipeline": str(tmp_path / "teacher"), "guidance": {"scale": 1.5}},
        "student": {"steps": 2, "ema": 0.9},
        "method": {"name": "ladd", "real": "teacher", "real_rows": 12, "real_steps": 3},
        "train": {"steps": 3, "tracker": "none"} | numbers,
        "report": {"samples": 0},
    }


def test_a_batchs_latents_are_ends_with_their_own_conditions(recipe):
    session = build(load(recipe), torch.device("cpu"))
    assert session.method.roles.teacher.evaluations >= session.made.evaluations == 2 * 3 * 12
    whole = session.batch(7, 0, 4)
    assert vars(whole)["path"] is None and whole.latents.shape == (4, 4, 8, 8) and whole.latents.dtype == torch.float32
    for i in range(4):
        (row,) = (session.made.points[:, -1] == whole.latents[i]).flatten(1).all(1).nonzero().flatten().tolist()
        assert whole.cond["class_labels"][i] == session.conditioning.cond["class_labels"][session.made.index[row]]
    assert whole.null["class_labels"].tolist() == session.conditioning.null["class_labels"].tolist() * 4
    # A row depends on its global index alone.
    parts = [session.batch(7, 0, 1), session.batch(7, 1, 3)]
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
    assert torch.equal(torch.cat([part.cond["class_labels"] for part in parts]), whole.cond["class_labels"])
    assert not torch.equal(session.batch(8, 0, 4).latents, whole.latents)
    assert build_without_data(load(recipe), torch.device("cpu")).made is None


def test_images_beside_them_and_samples_for_nothing_are_refused(recipe, tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"data\.images: expected null beside method\.real: teacher, found .*images"):
        load(recipe, [f"data.images={tmp_path / 'images'}"])
    with pytest.raises(InputError, match=r"method\.real: expected data, as dmd2 trains on no real samples with these"):
        load(recipe | {"method": {"name": "dmd2", "real": "teacher"}})
    with pytest.raises(InputError, match=r"ladd trains on real images .*, or method\.real: teacher, found null"):
        load(recipe | {"method": {"name": "ladd"}})


@pytest.mark.parametrize("name", ["lcm", "dmd2", "gft", "icd"])
def test_other_methods_train_on_them(recipe, name, tmp_path):
    settings = {"name": name, "real": "teacher", "real_rows": 12, "real_steps": 3}
    settings |= {"dmd2": {"gan_weight": 0.1}, "gft": {}}.get(name, {"solver_steps": 6})
    train(recipe | {"method": settings, "output": str(tmp_path / "run")})
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("student/grad_norm", 0) for line in logged) > 0


@pytest.mark.parametrize("lost", [False, True])
def test_resume_is_bit_exact_and_counts_the_cost_once(recipe, tmp_path, monkeypatch, lost):
    costs = costs_of_resumed(recipe, tmp_path, monkeypatch, lost)
    assert costs[0] == costs[1] and costs[0][0] > 2 * 3 * 12


def test_a_plan_counts_them(recipe):
    found = plan.plan(recipe)
    assert (found.trajectories.count, found.trajectories.evaluations) == (12, 2 * 3 * 12)
    assert found.trajectories.stored == 12 * 2 * 4 * 8 * 8 * 4 and found.trajectories.activations > 0
    text = plan.as_text(found, [], None)
    assert "trajectories: 12 of the teacher before training, 72 evaluations, 0.000 GiB in the host's memory" in text
    many = plan.plan(recipe, ["method.real_rows=250", "train.batch_size=1"])
    assert many.player == plan.TRAJECTORIES and many.peak > found.peak / 2
    assert "while the teacher makes its trajectories" in plan.as_text(many, [], None)
    assert plan.plan(recipe | {"method": {"name": "dmd2"}}).trajectories.count == 0
