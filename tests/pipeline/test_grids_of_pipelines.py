"""Flow grids as whole pipelines set them up: what is trained on, what is planned with, what the plain call repeats."""

import pytest
import torch

from pipeline.zoo import ZOO
from stepdistill.errors import InputError
from stepdistill.exporting.export import export
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.set_up import can_run, ready_scheduler
from stepdistill.pipeline.trace import trace
from stepdistill.planning import plan
from stepdistill.recipe import load
from stepdistill.run import train
from stepdistill.training.session import build

CPU = torch.device("cpu")
STATIC = ["sd3", "sana", "wan", "auraflow"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folders = {}

    def saved(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "teacher"
            save_pipeline(ZOO[name].build(), folders[name])
        return folders[name]

    return saved


def recipe_of(folder, name, method, steps=4, **student):
    exhibit = ZOO[name]
    return {
        "teacher": {
            "pipeline": str(folder),
            "guidance": {"scale": exhibit.guidance},
            "arguments": exhibit.arguments,
        },
        "student": {"steps": steps, "rank": 2, "train": "lora"} | student,
        "data": {"conditions": ["a red shoe", "two birds on a wire"]},
        "method": method,
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "preview_every": 100, "tracker": "none"},
        "report": {"samples": 0},
    }


@pytest.mark.parametrize("name", [*STATIC, "flux", "qwen-image", "z-image"])
def test_stored_trajectories_stop_where_the_student_does(name, teachers):
    recipe = load(recipe_of(teachers(name), name, {"name": "sfd", "paths": 2, "path_steps": 12}))
    session = build(recipe, CPU)
    grid = [step.t for step in session.sampler.grid()]
    assert session.paths.times[::3].tolist() == pytest.approx([*grid, 0.0])
    batch = session.batch(0, 0, 2)
    for turn, player in enumerate(session.method.turns(0)):
        batch.turn = turn
        assert session.method.losses(player, batch)["regression"].isfinite()
    assert grid[0] == 1 and grid[-1] > 0.2


@pytest.mark.parametrize("name,shift", [("sd3", None), ("flux", None), ("wan", 7.0)])
def test_a_plan_has_the_grid_of_the_run(name, shift, teachers):
    recipe = load(recipe_of(teachers(name), name, {"name": "sfd"}, steps=3, shift=shift))
    planned, run = plan.method_of(recipe, plan.blueprint_of(recipe)).sampler, build(recipe, CPU).sampler
    assert planned.grid() == run.grid() and planned.schedule.shift == run.schedule.shift


def test_the_stated_shift_is_what_a_plain_call_runs(teachers, tmp_path, monkeypatch):
    """The export at the end of each run proves it: it is compared with the training-time sampler on this grid."""
    monkeypatch.setattr("stepdistill.run.check_conventions", lambda _session: None)
    for name, shift in (("qwen-image", 3.0), ("sd3", 5.0)):
        how = recipe_of(teachers(name), name, {"name": "dmd2", "critic_steps": 1}, shift=shift)
        run = train(how | {"output": str(tmp_path / name)})
        session = build(load(how), CPU)
        assert session.sampler.scheduler.config.shift == shift and session.trace.denoiser.schedule.shift == shift
        assert [step.t for step in session.sampler.grid()][-1] == pytest.approx(shift / (3 + shift))
    assert export(run.folder, tmp_path / "again").max_error <= 1e-5


def test_a_shift_or_a_start_where_there_is_none_ends_before_training(teachers):
    with pytest.raises(InputError, match=r"student.shift: expected null for a vp_discrete schedule, found 3"):
        build(load(recipe_of(teachers("sd"), "sd", {"name": "sfd"}, shift=3.0)), CPU)
    with pytest.raises(InputError, match=r"student.start: expected null for a flow schedule.*found 399"):
        build(load(recipe_of(teachers("sd3"), "sd3", {"name": "dmd2"}, steps=1, start=399)), CPU)


def test_a_student_of_several_steps_is_not_run_in_one(teachers, tmp_path, monkeypatch):
    """Its scheduler's grid would be not a number; what measures it at other numbers of steps leaves that one out."""
    monkeypatch.setattr("stepdistill.run.check_conventions", lambda _session: None)
    run = train(recipe_of(teachers("sd3"), "sd3", {"name": "sfd"}, steps=2) | {"output": str(tmp_path / "run")})
    exported = trace(load_pipeline(run.folder / "export"), ZOO["sd3"].arguments)
    assert [can_run(exported, steps) for steps in (1, 2, 4)] == [False, True, True]
    with pytest.raises(InputError, match=r"steps: expected at least 2 under .* with shift_terminal 0.75, found 1"):
        ready_scheduler(exported, exported.pipeline.scheduler, 1, CPU)
