"""Every pipeline of the zoo goes all the way: traced, distilled with all weights and as LoRA, exported, sampled."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from pipeline.zoo import ZOO, Exhibit
from stepdistill.pipeline import stock_call
from stepdistill.pipeline.load import save_pipeline
from stepdistill.pipeline.observe import entry_argument
from stepdistill.sampling import inspect
from stepdistill.trainer import train

PROMPTS = ["a red shoe", "two birds on a wire"]
STEPS = 2


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short previews and checks; the export's proof in this process, for a new one takes longer than all the rest."""

    def call_here(request: dict[str, Any]) -> dict[str, torch.Tensor]:
        asked, answered = tmp_path / "request.json", tmp_path / "result.safetensors"
        asked.write_text(json.dumps(request), encoding="utf-8")
        stock_call.main(str(asked), str(answered))
        return load_file(answered)

    monkeypatch.setattr("stepdistill.pipeline.export.call_elsewhere", call_here)
    monkeypatch.setattr("stepdistill.preview.TEACHER_STEPS", 2)
    monkeypatch.setattr("stepdistill.preview.COUNT", 2)
    monkeypatch.setattr("stepdistill.selfcheck.TRAJECTORY_STEPS", 2)


def recipe(exhibit: Exhibit, entry: str, teacher: Path, output: Path, how: str) -> dict[str, Any]:
    return {
        "teacher": {
            "pipeline": str(teacher),
            "guidance": {"scale": exhibit.guidance},
            "arguments": exhibit.arguments,
        },
        "student": {"steps": STEPS, "train": how, "rank": 2},
        "data": {"conditions": PROMPTS if entry == "prompt" else "classes"},
        "method": {"name": "dmd2"},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "preview_every": 100, "log_every": 1, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(output),
    }


@pytest.mark.parametrize("name", ZOO)
def test_from_pipeline_to_pipeline(name, tmp_path, monkeypatch):
    exhibit = ZOO[name]
    pipeline = exhibit.build()
    entry = entry_argument(pipeline)
    save_pipeline(pipeline, tmp_path / "teacher")
    traced = inspect(tmp_path / "teacher", arguments=exhibit.arguments)
    assert traced.self_test_error <= 1e-5
    for how in ("full", "lora"):
        if how == "lora":  # once is enough for the teacher to be asked
            monkeypatch.setattr("stepdistill.trainer.check_conventions", lambda _session: None)
        run = train(recipe(exhibit, entry, tmp_path / "teacher", tmp_path / how, how))
        assert run.step == 2
        facts = json.loads((run.folder / "export" / "stepdistill.json").read_text())
        student = reloaded(run.folder / "export", tmp_path / "teacher", facts)
        assert type(student) is type(pipeline)
        asked = {"prompt": PROMPTS, "class_labels": [0, 1], "batch_size": 2}[entry]
        call = {entry: asked, "num_inference_steps": STEPS, "output_type": "np", **exhibit.arguments}
        images = student(**call, return_dict=False)[0]
        assert len(images) == 2 and torch.isfinite(torch.as_tensor(images)).all()


def reloaded(export: Path, teacher: Path, facts: dict[str, Any]) -> DiffusionPipeline:
    """The export in plain diffusers, as its card says."""
    if facts["form"] == "pipeline":
        pipeline = DiffusionPipeline.from_pretrained(export)
    else:
        pipeline = DiffusionPipeline.from_pretrained(teacher)
        pipeline.load_lora_weights(export)
        scheduler = getattr(
            diffusers, json.loads((export / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
        )
        pipeline.scheduler = scheduler.from_pretrained(export, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
