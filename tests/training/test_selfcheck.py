"""Conventions at start-up: right ones pass, each wrong one is refused by name, an untrained network is not."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from pipeline.tiny import save_dit, tiny_dit, tiny_sd, tiny_sd3
from stepdistill import assets
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.schedule import from_scheduler
from stepdistill.errors import InputError
from stepdistill.recipe import load
from stepdistill.run import train
from stepdistill.sampling.generate import generate
from stepdistill.training import selfcheck
from stepdistill.training.selfcheck import LEVELS, check_conventions
from stepdistill.training.session import build

CPU = torch.device("cpu")
pytestmark = pytest.mark.true_samples


def recipe(pipeline, method="dmd2", output="unused", **sections) -> dict:
    return {
        "teacher": {"pipeline": str(pipeline), "guidance": {"scale": 1.5}},
        "student": {"steps": 2},
        "method": {"name": method},
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-4, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(output),
    } | sections


@pytest.fixture(scope="module")
def built():
    return build(load(recipe("fashion-dit")), CPU)


@pytest.fixture(scope="module")
def latents(built):
    """What the teacher itself draws, for real latents: (latents, classes)."""
    index = torch.arange(40) % len(built.conditioning)
    pipeline = built.trace.pipeline
    drawn = generate(built.trace, pipeline.scheduler, built.conditioning, index, steps=10, guidance=1.0, seed=5)
    return drawn, index


@pytest.fixture
def session(built, monkeypatch):
    """The embedded teacher's session, to be spoilt: what is set on it is undone afterwards."""
    monkeypatch.setattr(built.method, "roles", copy.copy(built.method.roles))
    return replace(built, conditioning=replace(built.conditioning))


def read_as(session, monkeypatch, scheduler) -> None:
    """The same network behind another scheduler."""
    schedule, kind = from_scheduler(scheduler)
    teacher = session.method.roles.teacher
    monkeypatch.setattr(session.trace.pipeline, "scheduler", scheduler)
    session.method.roles.teacher = Denoiser(teacher.network, teacher.spec, schedule, kind)


def with_config(session, **changes) -> DDIMScheduler:
    return DDIMScheduler.from_config(dict(session.trace.pipeline.scheduler.config) | changes)


def shifted(session, factor: float) -> list[float]:
    """Betas of the scheduler's own schedule with sigma/alpha times ``factor`` at every time."""
    abar = session.trace.pipeline.scheduler.alphas_cumprod.double()
    moved = 1 / (1 + factor**2 * (1 - abar) / abar)
    return (1 - moved / torch.cat([torch.ones(1), moved[:-1]])).tolist()


def test_right_conventions_pass_and_the_error_has_its_shape(session):
    state = torch.random.get_rng_state()
    findings = check_conventions(session)
    assert findings.trained and findings.levels == LEVELS
    # Far below the best linear denoiser everywhere; in absolute terms, more noise is more error.
    assert max(findings.error) < 0.4
    linear = [level**2 / (1 + level**2) for level in LEVELS]
    absolute = [error * base for error, base in zip(findings.error, linear, strict=True)]
    assert absolute == sorted(absolute)
    assert torch.equal(torch.random.get_rng_state(), state)
    roles = session.method.roles
    assert roles.teacher.evaluations == roles.student.evaluations == roles.critic.evaluations == 0


def test_right_conventions_pass_on_real_latents(session, latents):
    session.rows = latents
    assert check_conventions(session).trained


# What trained_betas override; the right schedule shall not be among the stock ones that are tried.
OTHER_BETAS = {"beta_start": 0.0001, "beta_end": 0.02}
WRONG = {
    "epsilon": ({"prediction_type": "epsilon"}, "outputs fit v prediction, its scheduler says epsilon prediction"),
    "sample": ({"prediction_type": "sample"}, "outputs fit v prediction, its scheduler says x_0 prediction"),
    "linear": (
        {"beta_schedule": "linear"},
        r"fits the noise schedule scaled_linear \(beta 0.00085 to 0.02\), its scheduler says linear",
    ),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, r"its scheduler says squaredcos_cap_v2 .*check .*beta_schedule"),
    "less noise": ({"shift": 0.5} | OTHER_BETAS, "about twice the noise level"),
    "more noise": ({"shift": 2.0} | OTHER_BETAS, "about half the noise level"),
}


CASES = [(case, "real latents") for case in WRONG] + [(case, "own images") for case in ("epsilon", "cosine", "linear")]


@pytest.mark.parametrize(("case", "data"), CASES)
def test_a_wrong_scheduler_is_refused_by_name(session, latents, monkeypatch, case, data):
    changes, message = WRONG[case]
    changes = dict(changes)
    if factor := changes.pop("shift", None):
        changes["trained_betas"] = shifted(session, factor)
    session.rows = latents if data == "real latents" else None
    read_as(session, monkeypatch, with_config(session, **changes))
    with pytest.raises(InputError, match=message):
        check_conventions(session)


@pytest.mark.parametrize("data", ["own images", "real latents"])
def test_a_scheduler_of_another_family_is_refused(session, latents, monkeypatch, data):
    session.rows = latents if data == "real latents" else None
    read_as(session, monkeypatch, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(InputError, match=r"noise schedule .* and v prediction, its scheduler says flow matching"):
        check_conventions(session)


def test_an_empty_condition_that_is_not_empty_is_refused(session):
    own = session.conditioning
    session.conditioning = replace(own, null={name: rows[3:4] for name, rows in own.cond.items()})
    with pytest.raises(InputError, match="the empty condition is the same as that of 'Dress'"):
        check_conventions(session)
    lost = {name: row.expand(len(own), *row.shape[1:]) for name, row in own.null.items()}
    session.conditioning = replace(own, cond=lost)
    with pytest.raises(InputError, match=r"same input for 'T-shirt/top', 'Trouser'"):
        check_conventions(session)


def test_guidance_that_changes_nothing_is_refused(session, monkeypatch):
    teacher = session.method.roles.teacher

    class Deaf(torch.nn.Module):
        def forward(self, hidden_states, class_labels, **others):
            return teacher.network(hidden_states, class_labels=torch.zeros_like(class_labels) + 10, **others)

    session.method.roles.teacher = teacher.on(Deaf())
    with pytest.raises(InputError, match=r"guidance\.scale: 1\.5 changes nothing"):
        check_conventions(session)


def test_images_with_the_wrong_labels_are_refused(session, latents):
    session.rows = latents[0], (latents[1] + 5) % 10
    with pytest.raises(InputError, match=r"empty condition explains the images better .* labelled wrongly"):
        check_conventions(session)


def test_a_scale_in_another_convention_is_said(session, monkeypatch):
    said = []
    monkeypatch.setattr(selfcheck, "say", said.append)
    session.recipe = load(session.recipe, ["teacher.guidance.scale=0.5"])
    check_conventions(session)
    assert len(said) == 1 and "what papers with (1 + w) call 0.5 is 1.5" in said[0]


@pytest.mark.parametrize("role", ["critic", "target"])
def test_roles_that_do_not_start_as_they_should_are_refused(tmp_path, role):
    save_dit(tiny_dit(), tmp_path / "tiny")
    made = {"real": "teacher", "real_rows": 12, "real_steps": 3, "solver_steps": 6}
    method, settings = {"critic": ("dmd2", {}), "target": ("lcm", made)}[role]
    session = build(load(recipe(tmp_path / "tiny", method) | {"method": {"name": method} | settings}), CPU)
    check_conventions(session)
    with torch.no_grad():
        for parameter in getattr(session.method.roles, role).network.parameters():
            parameter.mul_(1.01)
    with pytest.raises(InputError, match=f"method {method}: its {role} differs from the"):
        check_conventions(session)


def test_a_whole_critic_may_differ_from_a_rounded_teacher_by_the_rounding(tmp_path):
    save_dit(tiny_dit(), tmp_path / "tiny")
    stated = recipe(tmp_path / "tiny", "dmd2")
    stated["teacher"] = stated["teacher"] | {"precision": "bf16"}
    session = build(load(stated, ["train.precision=bf16"]), CPU)
    check_conventions(session)
    with torch.no_grad():
        for parameter in session.method.roles.critic.network.parameters():
            parameter.mul_(1.1)
    with pytest.raises(InputError, match="its critic differs from the teacher"):
        check_conventions(session)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_untrained_network_is_not_refused(tmp_path, kind):
    save_dit(tiny_dit(prediction_type=kind), tmp_path / "tiny")
    assert not check_conventions(build(load(recipe(tmp_path / "tiny")), CPU)).trained


@pytest.mark.parametrize("maker", [tiny_sd, tiny_sd3])
def test_untrained_text_pipelines_are_not_refused(tmp_path, maker):
    maker().save_pretrained(tmp_path / "tiny")
    stated = recipe(tmp_path / "tiny", "sfd", data={"conditions": ["a cat", "a dog", ""]})
    assert not check_conventions(build(load(stated), CPU)).trained


def test_training_asks_first_and_goes_on_once_the_convention_is_right(tmp_path):
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(assets.find("teachers/fashion-dit"), teacher)
    config = teacher / "scheduler" / "scheduler_config.json"
    right = config.read_text()
    config.write_text(json.dumps(json.loads(right) | {"prediction_type": "epsilon"}))
    stated = recipe(teacher, "sfd", run)
    with pytest.raises(InputError, match="outputs fit v prediction, its scheduler says epsilon prediction"):
        train(stated)
    assert not (run / "checkpoints").exists()
    config.write_text(right)
    stated["train"] |= {"preview_every": 100, "log_every": 100}
    assert train(stated, ["student.steps=1", "resume=never"]).step == 2
