"""Modular pipelines: a folder whose index lists components, a call without a signature, a guider of the blocks' own."""

import json
import shutil

import pytest
import torch
from diffusers import ModularPipeline

from pipeline import zoo
from pipeline.no_preview import NoPreview
from stepdistill.errors import InputError
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.folder import quiet, save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.modular import INDEX, loads_modular
from stepdistill.pipeline.trace import trace
from stepdistill.planning.fake_pipeline import blueprint
from stepdistill.recipe import Teacher
from stepdistill.run import train

pytestmark = pytest.mark.skipif(not loads_modular(), reason="needs diffusers 0.42")


@pytest.fixture(scope="module")
def modular(tmp_path_factory):
    """The folder of a modular pipeline with the components of a zoo's, by name; made once."""
    made = {}

    def folder(name):
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            save_pipeline(zoo.ZOO[name].build(), place / "plain")
            with quiet():
                pipeline = ModularPipeline.from_pretrained(str(place / "plain"))
                pipeline.load_components()
            save_pipeline(pipeline, place / "teacher")
            shutil.rmtree(place / "plain")  # nothing in the index may lead there
            made[name] = place / "teacher"
        return made[name]

    return folder


@pytest.mark.parametrize(
    ("name", "guidance", "arguments"),
    [
        ("sdxl", "two_calls", {}),
        ("flux", "embedded", {}),
        # Its blocks guide only against a stated negative prompt, and make two equal passes without.
        ("sd3", "two_calls", {"negative_prompt": ""}),
    ],
)
def test_it_is_traced_by_the_inputs_of_its_blocks(modular, name, guidance, arguments):
    stated = zoo.ZOO[name].arguments
    traced = trace(load_pipeline(modular(name)), stated)
    assert (traced.entry, traced.guidance.kind, traced.arguments) == ("prompt", guidance, stated | arguments)
    assert traced.self_test_error < 1e-5
    assert decode(traced, torch.zeros(2, *traced.latent_shape)).shape == (2, 3, 16, 16)


def test_blocks_that_need_guidance_are_refused_before_a_student_of_theirs_is_trained(modular):
    with pytest.raises(TraceError, match="its blocks run only with guidance, and a student is called without it"):
        trace(load_pipeline(modular("wan")), zoo.ZOO["wan"].arguments)


def test_a_plan_needs_its_configs_alone(modular, tmp_path):
    folder = tmp_path / "configs"
    shutil.copytree(modular("sdxl"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    drawn = blueprint(Teacher(pipeline=str(folder)), torch.float32)
    assert (drawn.trace.component, drawn.trace.latent_shape) == ("unet", (4, 8, 8))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["diffusers", "AutoencoderKL", {"subfolder": "vae"}], "vae: expected the folder vae beside it, found vae"),
        ([None, None, {"pretrained_model_name_or_path": "a/b", "subfolder": "x"}], "found a/b/x"),
        (["os", "system", {"subfolder": "vae"}], 'vae: cannot be loaded: code of "os"'),
    ],
)
def test_what_does_not_lie_in_its_folder_is_not_loaded(modular, tmp_path, entry, message):
    folder = tmp_path / "teacher"
    shutil.copytree(modular("flux"), folder, ignore=shutil.ignore_patterns("vae"))
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"vae": entry}))
    with pytest.raises(InputError, match=message):
        load_pipeline(folder)


@pytest.mark.parametrize(("name", "fuse"), [("sdxl", True), ("flux", False)])
def test_it_is_distilled_exported_and_loaded_again(modular, tmp_path, monkeypatch, name, fuse):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", 2)
    run = train(
        {
            "teacher": {
                "pipeline": str(modular(name)),
                "guidance": {"scale": zoo.ZOO[name].guidance},
                "arguments": zoo.ZOO[name].arguments,
            },
            "student": {"steps": 2, "train": "lora", "rank": 2},
            "data": {"conditions": ["a red shoe", "two birds on a wire"]},
            "method": {"name": "dmd2", "critic_steps": 1},
            "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
            "export": {"fuse": fuse},
            "report": {"samples": 0},
            "output": str(tmp_path / "run"),
        }
    )
    moved = tmp_path / "elsewhere"
    (run.folder / "export").rename(moved)
    student = load_pipeline(moved)
    config = json.loads((moved / "scheduler" / "scheduler_config.json").read_text())
    assert type(student.scheduler).__name__ == config["_class_name"]
    card = (moved / "README.md").read_text()
    assert "pipe.load_components()" in card and 'output="images")' in card
    if fuse:
        assert student.guider.num_conditions == 1 and student.guider.guidance_scale == 1.0
        index = json.loads((moved / INDEX).read_text())
        places = [entry[2]["pretrained_model_name_or_path"] for entry in index.values() if isinstance(entry, list)]
        assert places and not any(places)
