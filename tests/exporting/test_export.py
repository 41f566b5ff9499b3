"""Export: a stock folder that repeats the training-time sampler, or nothing at all."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file

from pipeline.tiny import save_dit, tiny_dit
from stepdistill.errors import InputError
from stepdistill.exporting.export import ExportError, call_elsewhere, export, round_to_half
from stepdistill.samplers import DDIM
from stepdistill.session import newest_checkpoint
from stepdistill.trainer import train


def make_run(folder: Path, method: dict, steps: int = 4, **student) -> Path:
    save_dit(tiny_dit(), folder / "teacher")
    recipe = {
        "teacher": {"pipeline": str(folder / "teacher"), "guidance": {"scale": 2.0}},
        "student": {"steps": steps} | student,
        "method": method,
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(folder / "run"),
    }
    train(recipe)
    return folder / "run"


@pytest.mark.parametrize(
    ("method", "student"),
    [
        ({"name": "dmd2"}, {}),
        ({"name": "dmd2", "sampler": "ddim"}, {"train": "lora", "rank": 4}),
        ({"name": "sfd", "substeps": 1}, {"ema": 0.9}),
    ],
)
def test_the_export_is_the_training_time_sampler(tmp_path, method, student):
    run = make_run(tmp_path, method, **student)
    result = export(run, tmp_path / "out")
    assert result.max_error <= 1e-5
    facts = json.loads((result.folder / "stepdistill.json").read_text())
    assert (facts["steps"], facts["guidance"], facts["method"]) == (4, 2.0, method["name"])
    card = (result.folder / "README.md").read_text()
    assert "num_inference_steps=4" in card and "license" in card
    assert DiTPipeline.from_pretrained(result.folder).labels["Trouser"] == 1


@pytest.mark.parametrize("student", [{}, {"train": "lora", "rank": 4}])
def test_half_of_the_size_is_proven_like_the_whole(tmp_path, student):
    run = make_run(tmp_path, {"name": "sfd", "substeps": 1}, **student)
    result = export(run, tmp_path / "out", half=True)
    assert result.max_error <= 1e-5
    written = load_file(result.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(weight.dtype == torch.float16 for weight in written.values())
    whole = load_file(run / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, whole[name].half()) for name, weight in written.items())


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path):
    network = torch.nn.Linear(2, 2)
    network.weight.data[0, 0] = 1e6
    with pytest.raises(InputError, match=r"export\.half: weight holds 1e\+06, expected at most 65504"):
        round_to_half(network)


@pytest.mark.own_process
def test_the_export_is_proven_where_stepdistill_cannot_be_imported(tmp_path, monkeypatch):
    """In a process of its own, which finds the standard library and not this package."""
    programs = []

    def run_it(command, **options):
        programs.append(command[2])
        return run_process(command, **options)

    run_process = subprocess.run
    monkeypatch.setattr(subprocess, "run", run_it)
    run = make_run(tmp_path, {"name": "dmd2"})
    assert (run / "export" / "README.md").is_file()
    (program,) = programs
    # The same program, cut off after its first block: the import fails there, and the error is the export's.
    head = program.partition("import diffusers\n")[0] + "import stepdistill\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: head)
    with pytest.raises(ExportError, match=r"cannot run the export: ModuleNotFoundError.*stepdistill"):
        call_elsewhere({})


def test_a_pipeline_that_differs_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    run = make_run(tmp_path, {"name": "sfd", "substeps": 1})

    def crooked(self, prediction, step, noise=None):
        return 1.001 * original(self, prediction, step, noise)

    original = DDIM.advance
    monkeypatch.setattr(DDIM, "advance", crooked)
    with pytest.raises(ExportError, match="differs from the training-time sampler"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_average_is_what_is_exported(tmp_path):
    run = make_run(tmp_path, {"name": "sfd", "substeps": 1}, ema=0.9)
    pipeline = DiTPipeline.from_pretrained(run / "export")
    stored = load_file(newest_checkpoint(run) / "student.average.safetensors")
    found = dict(pipeline.transformer.named_parameters())
    assert all(torch.equal(stored[name], found[name]) for name in stored)


@pytest.mark.parametrize("case", ["no run", "no checkpoint", "foreign folder"])
def test_wrong_input_is_one_line(tmp_path, case):
    run = tmp_path / "run"
    if case == "no run":
        with pytest.raises(InputError, match=r"recipe\.yaml"):
            export(run, tmp_path / "out")
        return
    run = make_run(tmp_path, {"name": "sfd", "substeps": 1})
    if case == "no checkpoint":
        for path in (run / "checkpoints").glob("*/manifest.json"):
            path.write_text("{}")
        with pytest.raises(InputError, match="checkpoint"):
            export(run, tmp_path / "out")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
        with pytest.raises(InputError, match="choose another"):
            export(run, tmp_path / "out")
        assert (tmp_path / "out" / "thesis.txt").exists()
