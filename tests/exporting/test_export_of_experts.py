"""Students of a pipeline whose networks take turns: trained in each way, exported, and loaded by diffusers alone."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from pipeline.tiny import tiny_dit
from pipeline.zoo import SMALLER, wan
from stepdistill.errors import InputError
from stepdistill.exporting.check import ExportError
from stepdistill.exporting.export import export
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.planning import plan
from stepdistill.planning.audit import audit
from stepdistill.planning.weights import weights_of
from stepdistill.recipe import load
from stepdistill.run import train
from stepdistill.training.session import build

CALL = SMALLER | {"num_frames": 5, "max_sequence_length": 16}
BOTH = ("transformer", "transformer_2")
FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.transformer_2.safetensors")
SFD = {"name": "sfd", "substeps": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    save_pipeline(wan(boundary_ratio=0.875), folder / "teacher")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("stepdistill.run.check_conventions", lambda _session: None)


def recipe_of(place: Path, name: str, method: dict | None = None, **student) -> dict:
    return {
        "teacher": {"pipeline": str(place / "teacher"), "arguments": CALL, "guidance": {"scale": 3.0}},
        "student": {"steps": 2} | student,
        "data": {"conditions": ["a red shoe", "rain"]},
        "method": method or SFD,
        "train": {"steps": 4, "batch_size": 2, "lr": 1e-2, "preview_every": 100, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(place / name),
    }


def weights(folder: Path, component: str) -> dict[str, torch.Tensor]:
    return load_file(folder / component / "diffusion_pytorch_model.safetensors")


def moved(folder: Path, place: Path, component: str) -> float:
    """How far a component of an export is from the teacher's."""
    before, after = weights(place / "teacher", component), weights(folder, component)
    return max(float((after[name] - value).abs().max()) for name, value in before.items())


@pytest.fixture(scope="module")
def lora(place) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepdistill.run.check_conventions", lambda _session: None)
        return train(recipe_of(place, "lora", train="lora", rank=2)).folder / "export"


def test_an_adapter_for_each_as_stock_diffusers_loads_them(lora, place, monkeypatch):
    assert all(torch.cat([v.flatten() for v in load_file(lora / file).values()]).std() > 0 for file in FILES)
    card = (lora / "README.md").read_text()
    line = next(line for line in card.splitlines() if "transformer_2" in line)
    pipe = WanPipeline.from_pretrained(place / "teacher")
    pipe.load_lora_weights(lora)
    exec(line.replace("PATH_OF_THIS_FOLDER", str(lora)), {"pipe": pipe})
    pipe.fuse_lora(components=[*BOTH])
    pipe.unload_lora_weights()
    ours = load_pipeline(lora)
    for name in BOTH:
        stock = getattr(pipe, name).state_dict()
        for key, value in getattr(ours, name).state_dict().items():
            assert torch.equal(stock[key], value)
    # Without the second file the stock call is not the student's.
    monkeypatch.setattr("stepdistill.exporting.check.further_loras", lambda _folder: {})
    with pytest.raises(ExportError, match="differs from the training-time sampler"):
        export(place / "lora", place / "again")


def test_a_run_begins_with_the_adapters_of_an_export(lora, place):
    recipe = load(recipe_of(place, "second", train="lora", rank=2, init=str(lora)))
    student = build(recipe, torch.device("cpu")).method.roles.student.network
    mine = {name: value for name, value in student.named_parameters() if "lora_B" in name}
    stored = {file: load_file(lora / file) for file in FILES}
    for name, value in mine.items():
        key = name.removeprefix("backbone.").replace(".student", "")
        file = FILES[key.startswith("transformer_2.")]
        torch.testing.assert_close(value.data, stored[file]["transformer." + key.partition(".")[2]])
    assert len(mine) == sum(len(one) for one in stored.values()) / 2


def test_all_weights_of_each(place):
    folder = train(recipe_of(place, "full", {"name": "dmd2", "critic_steps": 1})).folder / "export"
    assert all(moved(folder, place, name) > 1e-3 for name in BOTH)
    assert WanPipeline.from_pretrained(folder).config.boundary_ratio == 0.875
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        place / "teacher" / "vae" / "diffusion_pytorch_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(("end", "how"), [("high", "full"), ("low", "lora")])
def test_one_network_for_all_times(end, how, place):
    """It is all that the pipeline calls, and near the expert that it began as."""
    student = {"train": how, "experts": end} | ({"rank": 2} if how == "lora" else {})
    folder = train(recipe_of(place, f"one-{end}", **student)).folder / "export"
    first, second = (weights(folder, name) for name in BOTH)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    near, far = (moved(folder, place, name) for name in (BOTH if end == "high" else BOTH[::-1]))
    assert 0 < near < 0.2 * far


@pytest.mark.parametrize(
    ("student", "method", "said"),
    [
        ({"config": {"num_layers": 1}}, SFD, "student.config: expected none beside student.experts 'each'"),
        (
            {},
            {"name": "w-embed", "real": "teacher", "real_rows": 2},
            "student.experts: expected 'high' or 'low' for w-",
        ),
        ({"experts": "both"}, SFD, "student.experts: expected one of 'each', 'high', 'low', found 'both'"),
    ],
)
def test_what_no_experts_can_be(student, method, said, place):
    with pytest.raises(InputError, match=said):
        build(load(recipe_of(place, "refused", method, **student)), torch.device("cpu"))


def test_one_denoiser_has_no_experts(tmp_path):
    save_pipeline(tiny_dit(), tmp_path / "teacher")
    recipe = recipe_of(tmp_path, "run", experts="low") | {"data": {}}
    recipe["teacher"]["arguments"] = {}
    with pytest.raises(InputError, match=r"student\.experts: expected 'each' for DiTPipeline, which has one"):
        build(load(recipe), torch.device("cpu"))


@pytest.mark.parametrize(
    ("steps", "said", "verdict"), [(2, "transformer_2: 2", "ok"), (1, "transformer_2: none", "warning")]
)
def test_steps_of_the_grid_by_expert(steps, said, verdict, place):
    recipe = load(recipe_of(place, "audited", {"name": "dmd2", "sampler": "ddim"}, steps=steps))
    session = build(recipe, torch.device("cpu"))
    (check,) = [one for one in audit(recipe, session.method, "flow", 2) if one.name == "steps by expert"]
    assert check.value == f"transformer: 1; {said}" and check.verdict == verdict


def test_a_plan_counts_each(place):
    recipes = {end: load(recipe_of(place, "planned", {"name": "dmd2"}, experts=end)) for end in ("each", "high")}
    drawn = plan.blueprint_of(recipes["each"])
    counts = {}
    for end, recipe in recipes.items():
        sizes = weights_of(recipe.teacher, drawn, plan.method_of(recipe, drawn)).sizes
        counts[end] = [sizes[name][0] for name in ("teacher", "student", "critic")]
    one = sum(value.numel() for value in weights(place / "teacher", "transformer").values())
    assert counts == {"each": [2 * one] * 3, "high": [2 * one, one, 2 * one]}
