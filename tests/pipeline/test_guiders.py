"""Pipelines whose guidance is a component: it is watched as plain guidance, and exports hold it switched off."""

import json

import pytest
from diffusers import AdaptiveProjectedGuidance

from pipeline import zoo
from pipeline.no_preview import NoPreview
from stepdistill.exporting.copied import save_student
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.trace import trace
from stepdistill.run import train

ARGUMENTS = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motif") / "teacher"
    save_pipeline(zoo.motif(), folder)
    return folder


def test_any_guider_is_watched_as_plain_guidance(teacher):
    pipeline = load_pipeline(teacher)
    own = pipeline.guider
    traced = trace(pipeline, ARGUMENTS)
    assert (traced.guidance.kind, traced.guidance.shift, traced.denoiser.spec.norm_axis) == ("two_calls", 0.0, None)
    assert pipeline.guider is own and isinstance(own, AdaptiveProjectedGuidance)


def test_a_whole_pipeline_is_written_with_its_guider_off(teacher, tmp_path):
    for number, pipeline in enumerate((load_pipeline(teacher), zoo.motif())):
        save_student(pipeline, ["transformer"], tmp_path / str(number))
        config = json.loads((tmp_path / str(number) / "guider" / "guider_config.json").read_text())
        assert config["enabled"] is False and config["_class_name"] == "AdaptiveProjectedGuidance"
        assert pipeline.guider.num_conditions == 2


def test_it_is_distilled_and_exported(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", 2)
    run = train(
        {
            "teacher": {"pipeline": str(teacher), "guidance": {"scale": 2.0}, "arguments": ARGUMENTS},
            "student": {"steps": 2, "train": "lora", "rank": 2},
            "data": {"conditions": ["a red shoe", "two birds on a wire"]},
            "method": {"name": "dmd2", "critic_steps": 1},
            "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
            "report": {"samples": 0},
            "output": str(tmp_path / "run"),
        }
    )
    config = json.loads((run.folder / "export" / "guider" / "guider_config.json").read_text())
    assert config["enabled"] is False
