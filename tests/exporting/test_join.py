"""Several students in one folder: each condition is drawn by its own, from a stock export."""

import json

import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image

from pipeline.no_preview import NoPreview
from pipeline.tiny import CLASSES, save_dit, tiny_dit, tiny_sd
from stepdistill import sample
from stepdistill.errors import InputError
from stepdistill.exporting.join import join
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.open import open_teacher
from stepdistill.pipeline.sizes import at_size
from stepdistill.recipe import load
from stepdistill.run import train
from stepdistill.training.session import build

PROMPTS = ["a red shoe", "a red boot", "rain", "rain, rain", "a red hat"]


@pytest.fixture(autouse=True)
def _no_preview(monkeypatch):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)


def recipe_of(folder, number, data=None, student=None, **method) -> dict:
    return {
        "teacher": {"pipeline": str(folder / "teacher"), "guidance": {"scale": 2.0}},
        "student": {"steps": 2} | (student or {}),
        "data": {"groups": 2, "group": number} | (data or {}),
        "method": {"name": "dmd2"} | method,
        "train": {"steps": 2, "batch_size": 2, "lr": 3e-2, "seed": number, "tracker": "none"},
        "output": str(folder / f"run{number}"),
    }


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    """A folder with two runs of a class-conditional teacher, a group of classes each, and both joined."""
    folder = tmp_path_factory.mktemp("classes")
    save_dit(tiny_dit(), folder / "teacher")
    runs = [train(recipe_of(folder, number)).folder for number in (0, 1)]
    join(runs[::-1], folder / "joined")
    return folder


def test_a_group_is_half_of_the_classes(of_classes):
    facts = json.loads((of_classes / "run1" / "router.json").read_text())
    assert facts["classes"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] and facts["argument"] == "class_labels"
    assert not (of_classes / "run1" / "report").exists()


def test_each_class_is_drawn_by_its_own_student(of_classes):
    mixed = ["Coat", "Bag", "Sandal", "Trouser"]
    both = sample(of_classes / "joined", steps=2, conditions=mixed, count=8)
    assert both.labels == (*mixed, *mixed) and both.nfe == 2
    alone = [sample(of_classes / f"run{number}", steps=2, conditions=mixed, count=8).images for number in (0, 1)]
    for i, name in enumerate(both.labels):
        own = CLASSES.index(name) // 5
        difference = (both.images[i].int() - alone[own][i].int()).abs()
        assert difference.max() <= 1
        assert (both.images[i].int() - alone[1 - own][i].int()).abs().max() > 3


def test_every_student_is_a_stock_pipeline_and_all_of_them_a_call(of_classes):
    pipeline = DiTPipeline.from_pretrained(of_classes / "joined" / "students" / "1")
    assert isinstance(pipeline(class_labels=[8], num_inference_steps=2, guidance_scale=1).images[0], Image.Image)
    traced = open_teacher(of_classes / "joined")
    assert traced.components == ("transformer",)
    x, t = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5)
    rows = {"class_labels": torch.tensor([7, 0, 9, 4])}
    traced.denoiser(x, t, rows).x0[[0, 2]].square().sum().backward()
    slopes = {name: [p.grad for p in one.parameters()] for name, one in traced.denoiser.network.items()}
    moved = {name: any(one is not None and one.any() for one in each) for name, each in slopes.items()}
    assert moved == {"0": False, "1": True}
    assert traced.denoiser.features(x, t, rows)[0].shape[0] == 4
    with pytest.raises(InputError, match="guidance: expected 1 for several students"):
        sample(of_classes / "joined", steps=2, guidance=2.0, conditions=["Coat"], count=1)


def test_students_that_do_not_belong_together_are_refused(of_classes, tmp_path):
    run = of_classes / "run0"
    with pytest.raises(InputError, match="expected a run for each of 2 groups, found none for 1"):
        join([run], tmp_path / "out")
    with pytest.raises(InputError, match=r"expected another group than .*run0, found 0 twice"):
        join([run, run], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="choose another folder"):
        join([run, of_classes / "run1"], of_classes / "teacher")
    with pytest.raises(InputError, match="expected a folder beside the runs, found one inside or around"):
        join([run, of_classes / "run1"], run / "export")


def test_loras_of_prompts_share_one_network(tmp_path):
    save_pipeline(tiny_sd(), tmp_path / "teacher")
    settings = {"data": {"conditions": PROMPTS}, "student": {"train": "lora", "rank": 2}}
    runs = [train(recipe_of(tmp_path, number, **settings)).folder for number in (0, 1)]
    joined = join(runs, tmp_path / "joined")
    router = json.loads((joined / "router.json").read_text())
    assert len(router["centres"]) == 2 and router["argument"] == "encoder_hidden_states"
    metrics = [(run / "metrics.jsonl").read_text() for run in runs]
    assert all(metrics)
    traced = open_teacher(joined)
    backbones = {id(one.backbone) for one in traced.denoiser.network.values()}
    assert backbones == {id(traced.pipeline.unet)}
    both = sample(joined, steps=2, conditions=PROMPTS, count=5).images.int()
    alone = [sample(run, steps=2, conditions=PROMPTS, count=5).images.int() for run in runs]
    away = torch.stack([(both - one).abs().flatten(1).amax(1) for one in alone])
    assert (away.amin(0) <= 1).all() and (away.amax(0) > 3).all()
    assert away.argmin(0)[0] == away.argmin(0)[1] == away.argmin(0)[4] != away.argmin(0)[2] == away.argmin(0)[3]
    wider = at_size(traced, (16, 32))
    assert wider.denoiser.spec.router is not None and wider.latent_shape[-1] == 2 * traced.latent_shape[-1]


def test_a_run_trains_on_the_images_of_its_group(tmp_path):
    save_dit(tiny_dit(), tmp_path / "teacher")
    for number, name in enumerate(("Trouser", "Bag", "Dress", "Sandal")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (32, 32), 40 * number + i).save(tmp_path / "images" / name / f"{i}.png")
    recipe = recipe_of(tmp_path, 1, {"images": str(tmp_path / "images")}, gan_weight=0.1)
    session = build(load(recipe), torch.device("cpu"), tmp_path / "cache")
    latents, index = session.rows
    assert len(latents) == len(index) == 4
    labels = {session.conditioning.labels[i] for i in index.tolist()}
    assert labels == {"Bag", "Sandal"} and list(session.conditioning.entries) == [5, 6, 7, 8, 9]
    seen = {int(c) for step in range(20) for c in session.batch(step, 0, 2).cond["class_labels"]}
    assert seen == {5, 8}
    assert session.batch(0, 0, 2).latents.shape == (2, 4, 8, 8)
