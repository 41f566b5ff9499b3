"""What happens to runs: each fault ends in one line, nothing that was saved is damaged, and the run goes on."""

# ruff: noqa: F811 - a fixture of another file is an argument here

import ctypes
import errno
import json
import os
import re
import shutil
import subprocess
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import GAN, make_recipe, pictures, weights  # noqa: F401

from pipeline.tiny import save_dit, tiny_dit
from short_samples import bare
from stepdistill import cli
from stepdistill.errors import InputError, RunError
from stepdistill.exporting.export import export
from stepdistill.files import cached
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.recipe import load, yaml_lines
from stepdistill.run import train
from stepdistill.training import checkpoint
from stepdistill.training.faults import explained
from stepdistill.training.finite import NonFiniteError
from stepdistill.training.run_folder import keep_lines_before, prepare_folder
from stepdistill.training.trainer import Trainer
from stepdistill.training.watchdog import Watchdog

SFD = {"name": "sfd", "substeps": 1}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    save_dit(tiny_dit(), folder)
    return folder


@pytest.fixture(scope="module")
def whole(teacher, pictures, tmp_path_factory) -> Path:
    """Runs to which nothing happened, by method."""
    folder = tmp_path_factory.mktemp("whole")
    with bare():
        train(make_recipe(teacher, folder / "sfd", SFD))
        train(make_recipe(teacher, folder / "dmd2", GAN, pictures))
    return folder


def fails(recipe: dict, capsys, code: int = 1, overrides: tuple[str, ...] = ()) -> str:
    """The one line that ends ``stepdistill train``."""
    file = Path(recipe["output"]).with_suffix(".yaml")
    file.write_text(yaml_lines.dump(recipe))
    capsys.readouterr()
    assert cli.run(["train", str(file), *overrides]) == code
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith(("failed: ", "error: "))]
    assert said == lines[-1:] and "Traceback" not in "".join(lines)
    return said[0]


def same(run: Path, other: Path) -> bool:
    return weights(run) == weights(other)


def at_step(monkeypatch, step: int, action) -> None:
    """Call ``action(trainer)`` before a step of the run is made."""
    original = Trainer.step

    def stepping(self, number, log=False):
        if number == step:
            action(self)
        return original(self, number, log)

    monkeypatch.setattr(Trainer, "step", stepping)


def nan_in(role: str):
    def spoil(trainer, _patch):
        method = trainer.method
        network = method.gan.heads if role == "heads" else getattr(method.roles, role).network
        next(network.parameters()).data.view(-1)[0] = float("nan")

    return spoil


def exploding(trainer, patch):
    original = trainer.method.losses
    patch.setattr(trainer.method, "losses", lambda *args: {k: 1e36 * v for k, v in original(*args).items()})


def thrown_away(trainer, patch):
    """The step's own numbers are fine; what the optimizer makes of the weights is not."""
    patch.setattr(trainer.optimizers["student"], "step", lambda: nan_in("student")(trainer, patch))


def full_disk(_trainer, patch):
    original = checkpoint.save_file

    def save_file(tensors, path):
        if path.name == "critic.safetensors":
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(tensors, path)

    patch.setattr(checkpoint, "save_file", save_file)


def no_memory(error: Exception):
    def fail(*_):
        raise error

    return lambda trainer, patch: patch.setattr(trainer.method, "losses", fail)


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)
# (before which step, what happens, what the line says of it)
BAD_DAYS = [
    (1, nan_in("student"), r"student loss term 'dm' is nan at step 2"),
    (1, nan_in("heads"), r"student loss term 'gan' is nan at step 2"),
    (2, nan_in("critic"), r"critic loss term 'denoising' is nan at step 3"),
    (2, exploding, r"critic gradient \(denoising \+ gan\) is inf at step 3"),
    (3, thrown_away, r"student: \S+ holds numbers that are not finite after step 4"),
    (3, full_disk, r"No space left on device: .*/critic.safetensors"),
    (3, no_memory(CUDA), r"out of memory"),
    (3, no_memory(CPU), r"out of memory"),
]


def test_a_run_with_many_bad_days_ends_where_one_without_does(
    teacher,
    pictures,
    whole,
    tmp_path,
    monkeypatch,
    capsys,
):
    run = tmp_path / "run"
    recipe = make_recipe(teacher, run, GAN, pictures)
    with bare():
        for step, happens, said in BAD_DAYS:
            with monkeypatch.context() as patch:
                at_step(patch, step, lambda trainer, h=happens, p=patch: h(trainer, p))
                line = fails(recipe, capsys)
            assert re.match(f"failed: ({said}); ", line), line
            resumes = f"stepdistill train {run / 'recipe.yaml'} resumes from step-{step:06d}"
            assert resumes in line
            if "memory" in said:
                assert f"stepdistill plan {run / 'recipe.yaml'} --gpu GIB --fit" in line
                for change in ("gradient_checkpointing=elementwise", "gradient_checkpointing=true", "accumulation=4"):
                    assert f"train.{change} (" in line
            else:
                assert line.endswith(resumes)
            assert {path.name for path in (run / "checkpoints").iterdir()} <= {f"step-{n:06d}" for n in range(1, 4)}
        assert train(recipe).step == 4
    assert same(run, whole / "dmd2")


def test_a_run_goes_on_with_what_takes_less_memory_for_the_same_numbers(teacher, whole, tmp_path):
    recipe = make_recipe(teacher, tmp_path / "run", SFD)
    shutil.copytree(whole / "sfd", tmp_path / "run")
    changed = load(recipe, ["train.accumulation=4", "train.gradient_checkpointing=true"])
    assert prepare_folder(tmp_path / "run", changed, safe=False).name == "step-000004"


def test_a_resume_reads_every_byte_of_its_checkpoint(teacher, whole, tmp_path):
    run = shutil.copytree(whole / "sfd", tmp_path / "run")
    file = run / "checkpoints" / "step-000004" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    assert checkpoint.latest(run / "checkpoints").name == "step-000004"
    assert prepare_folder(run, load(make_recipe(teacher, run, SFD)), safe=False).name == "step-000003"
    assert not file.exists()  # the damaged one has another name now


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_the_first_step(teacher, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 10_000))
    with bare():
        line = fails(make_recipe(teacher, tmp_path / "run", SFD), capsys, 2)
    assert line.startswith("error: output: 3 checkpoints (train.keep_checkpoints + 1) of ")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["grid.json", "heartbeat.json", "recipe.yaml"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MiB; making one takes rights that a user may lack."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_real_disk_that_fills_up_and_one_that_turns_read_only(teacher, whole, small_disk, monkeypatch, capsys):
    # A file that the watchdog holds open would keep the disk from being turned read-only.
    recipe, filler = make_recipe(teacher, small_disk / "run", SFD, watchdog_minutes=None), small_disk / "filler"

    def fill(_trainer):
        with open(filler, "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(small_disk)], check=True)

    with bare():
        with monkeypatch.context() as patch:
            at_step(patch, 2, fill)
            line = fails(recipe, capsys)
        assert "No space left on device" in line and line.endswith("resumes from step-000002")
        filler.unlink()
        with monkeypatch.context() as patch:
            at_step(patch, 2, lambda _: remount("ro"))
            line = fails(recipe, capsys)
        assert "Read-only file system" in line and line.endswith("resumes from step-000002")
        remount("rw")
        assert train(recipe).step == 4
    assert same(small_disk / "run", whole / "sfd")


def test_an_output_that_cannot_be_written_is_wrong_input(teacher, capsys, tmp_path):
    recipe = make_recipe(teacher, tmp_path / "run", SFD)
    line = fails(recipe, capsys, 2, ("output=/sys/stepdistill",))
    assert line.startswith("error: output: /sys/stepdistill cannot be written: ")


def test_data_lost_during_a_run_harm_no_export_at_its_end_and_are_named_by_a_later_one(
    teacher, pictures, whole, tmp_path, monkeypatch
):
    here, away, run = tmp_path / "pictures", tmp_path / "away", tmp_path / "run"
    shutil.copytree(pictures, here)
    at_step(monkeypatch, 1, lambda _: here.rename(away))
    with bare("export_trained"):
        assert train(make_recipe(teacher, run, SFD, here)).step == 4
    assert (run / "export" / "model_index.json").is_file() and same(run, whole / "sfd")
    with pytest.raises(InputError, match=rf"data\.images: expected .*found nothing at {here}"):
        export(run, tmp_path / "out")
    away.rename(here)
    weights = [
        load_file(place / "transformer" / WEIGHTS) for place in (run / "export", export(run, tmp_path / "out").folder)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_file_that_goes_while_it_is_needed_is_named(tmp_path):
    recipe = load("quickstart")
    said = r"No such file or directory: .*gone; no checkpoint was saved"
    with pytest.raises(RunError, match=said), explained(tmp_path, recipe):
        (tmp_path / "gone").read_bytes()


def test_an_unreadable_image_is_named(teacher, pictures, tmp_path, capsys):
    here = tmp_path / "pictures"
    shutil.copytree(pictures, here)
    (here / "3.png").write_bytes((here / "3.png").read_bytes()[:60])
    line = fails(make_recipe(teacher, tmp_path / "run", GAN, here), capsys, 2)
    assert f"1 of 6 samples rejected (1 unreadable image), the first: {here / '3.png'} (" in line


def test_images_that_become_nan_are_wrong_input(teacher, pictures, tmp_path, capsys):
    pipeline = load_pipeline(teacher)
    pipeline.vae.encoder.conv_in.bias.data[0] = float("nan")
    save_pipeline(pipeline, tmp_path / "broken")
    line = fails(make_recipe(tmp_path / "broken", tmp_path / "run", GAN, pictures), capsys, 2)
    assert f"numbers that are not finite of {pictures / '0.png'} ('Trouser')" in line


def test_errors_that_are_no_faults_pass_as_they_are(tmp_path):
    recipe = load("quickstart")
    for error in (
        KeyError("x"),
        RuntimeError("shapes"),
        OSError("no number"),
        BrokenPipeError(32, "x"),
        RunError("known"),
    ):
        with pytest.raises(type(error)) as raised, explained(tmp_path, recipe):
            raise error
        assert raised.value is error
    with pytest.raises(NonFiniteError, match="is nan; no checkpoint was saved"), explained(tmp_path, recipe):
        raise NonFiniteError("loss is nan")


def test_metrics_of_a_damaged_file_are_kept_as_far_as_they_go(tmp_path):
    lines = tmp_path / "metrics.jsonl"
    lines.write_bytes(
        b'{"step": 1, "evaluations": 5}\n[1]\n"step"\n\xff\n{"step": "x"}\n{"step": 2}\n{"step": 3}\n{"st'
    )
    assert keep_lines_before(lines, 2) == 5
    assert lines.read_text() == '{"step": 1, "evaluations": 5}\n{"step": 2}\n'


def test_a_damaged_cache_is_made_again(tmp_path):
    file = tmp_path / "cache" / "rows.safetensors"
    made = []

    def make():
        made.append(1)
        return {"rows": torch.arange(3)}

    for damage in (False, True, False):
        if damage:
            file.write_bytes(file.read_bytes()[:-1])
        assert torch.equal(cached(file, make)["rows"], torch.arange(3))
    assert len(made) == 2 and [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_run_shows_signs_of_life(whole):
    beat = json.loads((whole / "sfd" / "heartbeat.json").read_text())
    assert beat["step"] == 4 and beat["phase"] == "done" and 0 <= time.time() - beat["time"] < 600
    assert not list((whole / "sfd").glob("stacks*"))


def test_a_hang_leaves_the_stacks_of_all_threads_and_one_line_when_it_ends(teacher, tmp_path, monkeypatch, capsys):
    recipe = make_recipe(teacher, tmp_path / "run", SFD, watchdog_minutes=0.01)
    file = tmp_path / "run" / "stacks-0.txt"

    def hang_here(_trainer):
        deadline = time.monotonic() + 60
        while "hang_here" not in file.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)

    at_step(monkeypatch, 2, hang_here)
    with bare():
        train(recipe)
    said = [line for line in capsys.readouterr().err.splitlines() if "minutes" in line]
    assert f"no step for 0.01 minutes; what every thread did: {file}" in said
    assert "hang_here" in file.read_text()


def test_stacks_are_written_under_a_held_lock(tmp_path):
    hold = ctypes.PyDLL(None).usleep  # a PyDLL keeps the interpreter's lock
    with Watchdog(tmp_path, 0.002):
        hold(500_000)
    assert "test_stacks_are_written_under_a_held_lock" in (tmp_path / "stacks-0.txt").read_text()


def test_a_watchdog_makes_its_folder_and_does_not_miss_its_file(tmp_path):
    with Watchdog(tmp_path / "node" / "run", 5) as watchdog:
        watchdog.stacks.unlink()
        watchdog.step()


def test_a_watchdog_is_quiet_while_there_are_steps_and_when_it_is_off(tmp_path):
    with Watchdog(tmp_path, 0.02) as watchdog:
        for _ in range(15):
            time.sleep(0.1)
            watchdog.step()
    with Watchdog(tmp_path, None):
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []
