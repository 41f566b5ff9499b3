"""Export: a stock folder that repeats the training-time sampler, or nothing at all."""

import gc
import json
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline
from safetensors.torch import load_file
from torch import nn

from pipeline.tiny import save_dit, tiny_dit, tiny_sd
from stepdistill.diffusion.samplers import DDIM
from stepdistill.errors import InputError
from stepdistill.exporting.check import ExportError, call_elsewhere
from stepdistill.exporting.export import export, round_to
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.run import train
from stepdistill.training.run_folder import newest_checkpoint
from stock_here import call_here


def make_run(folder: Path, method: dict, steps: int = 4, more: dict | None = None, **student) -> Path:
    save_dit(tiny_dit(), folder / "teacher")
    recipe = {
        "teacher": {"pipeline": str(folder / "teacher"), "guidance": {"scale": 2.0}} | (more or {}).get("teacher", {}),
        "data": (more or {}).get("data", {}),
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


@pytest.mark.parametrize(
    ("student", "wish", "dtype"),
    [
        ({}, {"dtype": "bf16"}, torch.bfloat16),
        ({"train": "lora", "rank": 4}, {"half": True}, torch.float16),
    ],
)
def test_half_of_the_size_is_proven_like_the_whole(tmp_path, student, wish, dtype):
    run = make_run(tmp_path, {"name": "sfd", "substeps": 1}, **student)
    result = export(run, tmp_path / "out", **wish)
    assert result.max_error <= 1e-5
    written = load_file(result.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(weight.dtype == dtype for weight in written.values())
    whole = load_file(run / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, whole[name].to(dtype)) for name, weight in written.items())


def test_weights_that_float16_cannot_hold_are_counted_and_the_largest_is_named():
    network = torch.nn.Linear(2, 2)
    network.weight.data[0] = torch.tensor([1e6, -7e4])
    before = network.weight.clone()
    with pytest.raises(InputError, match=r"export\.dtype: 2 of 6 values are beyond 65504.*weight holds 1e\+06"):
        round_to(network, torch.float16)
    assert torch.equal(network.weight, before)
    round_to(network, torch.bfloat16)
    assert torch.equal(network.weight, before.bfloat16().float())


def test_a_stored_table_is_rounded_with_the_weights_and_a_computed_one_is_not():
    network = torch.nn.Module()
    network.register_buffer("stored", torch.tensor([1 / 3]))
    network.register_buffer("computed", torch.tensor([1 / 3]), persistent=False)
    round_to(network, torch.float16)
    assert network.stored == torch.tensor(1 / 3).half() and network.computed == 1 / 3


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


def test_an_autoencoder_that_decodes_one_at_a_time(tmp_path, monkeypatch):
    """That of HunyuanVideo 1.5 makes an attention mask for one video."""
    together = AutoencoderKL.decode

    def alone(self, z, *arguments, **keywords):
        if len(z) > 1:
            raise RuntimeError("output with shape [2, 1, 80, 80] doesn't match the broadcast shape [2, 2, 80, 80]")
        return together(self, z, *arguments, **keywords)

    monkeypatch.setattr(AutoencoderKL, "decode", alone)
    save_pipeline(tiny_sd(), tmp_path / "sd")
    teacher = {"teacher": {"pipeline": str(tmp_path / "sd")}, "data": {"conditions": ["a red shoe", "rain"]}}
    assert (make_run(tmp_path, {"name": "sfd", "substeps": 1}, more=teacher) / "export" / "README.md").is_file()


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


@pytest.fixture(scope="module")
def half_run(tmp_path_factory) -> Path:
    """A LoRA on a backbone in bfloat16 with few bits, ended before its export."""
    place = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepdistill.run.export_trained", lambda *_: None)
        keys = {"teacher": {"precision": "bf16", "storage": "fp8", "offload": "group"}}
        return make_run(place, {"name": "dmd2", "critic_steps": 1}, steps=2, more=keys, train="lora", rank=4)


def test_the_check_can_be_in_the_teachers_precision(half_run, tmp_path):
    """On the device, of which there is none but the CPU here: in bfloat16, and what is written stays exact."""
    result = export(half_run, tmp_path / "out", check="device")
    assert 0 < result.max_error <= 0.0625
    card = (result.folder / "README.md").read_text()
    assert "with plain diffusers in bfloat16, differs from the training-time sampler by" in card
    exact = export(half_run, tmp_path / "exact", check="cpu")
    assert exact.max_error <= 1e-5
    files = [folder / "transformer" / "diffusion_pytorch_model.safetensors" for folder in (result.folder, exact.folder)]
    ours, theirs = map(load_file, files)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def test_an_export_without_a_check_says_so(half_run, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.exporting.check.check", None)
    result = export(half_run, tmp_path / "out", check="off")
    assert result.max_error is None
    assert "| checked | not checked (`export.check: off`)" in (result.folder / "README.md").read_text()


def test_one_pipeline_is_gone_before_the_other_is_loaded(tmp_path, monkeypatch):
    """Of the networks that the training-time sampler ran on no weight is left in memory."""
    seen = []

    def call(request):
        gc.collect()
        seen.append([one for one in gc.get_objects() if isinstance(one, nn.Parameter) and one.device.type != "meta"])
        return call_here(request)

    run = make_run(tmp_path, {"name": "dmd2"})
    known = {id(one) for one in gc.get_objects() if isinstance(one, nn.Parameter)}
    monkeypatch.setattr("stepdistill.exporting.check.call_elsewhere", call)
    export(run, tmp_path / "out")
    assert not [one for one in seen[0] if id(one) not in known and one.numel() > 0]
