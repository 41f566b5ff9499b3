"""The sweep of diffusers' tests finds them, states inputs as a user does, and writes lines that the page takes."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import sweep_table
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts" / "sweep"


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The scripts, found beside each other as when one is run."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import diffusers_tests
        import sweep
        import whole

        yield SimpleNamespace(diffusers_tests=diffusers_tests, sweep=sweep, whole=whole)
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in ("diffusers_tests", "sweep", "shim", "whole"):
            sys.modules.pop(name, None)


def test_a_test_class_is_one_that_makes_components(scripts, tmp_path):
    file = tmp_path / "tests" / "pipelines" / "flux" / "test_flux.py"
    file.parent.mkdir(parents=True)
    makes = "    def get_dummy_components{0}(self): ...\n"
    classes = {"One": makes.format(""), "Two": makes.format("_tiny"), "Dummies": makes.format(""), "Slow": "    ...\n"}
    file.write_text("import no_such_module\n" + "".join(f"class {name}:\n{body}" for name, body in classes.items()))
    found = scripts.diffusers_tests.listed(tmp_path)
    assert found == [("tests.pipelines.flux.test_flux", name) for name in ("One", "Two")]


def test_inputs_are_stated_as_a_user_does(scripts, tmp_path):
    tensors = torch.zeros(1, 7)
    inputs = {"prompt": "a", "generator": torch.Generator(), "num_inference_steps": 2, "negative_prompt": None}
    inputs |= {"image": torch.full((1, 3, 4, 6), -1.0), "mask_image": [np.ones((8, 8, 1), dtype=np.float32)]}
    inputs |= {"height": 32, "sizes": (1, 2), "eta": None, "prompt_embeds": tensors}
    stated = scripts.diffusers_tests.arguments_of(inputs, tmp_path)
    files = {name: str(tmp_path / f"{name}.png") for name in ("image", "mask_image")}
    assert stated == files | {"height": 32, "sizes": [1, 2], "eta": None, "prompt_embeds": tensors}
    assert [scripts.diffusers_tests.plain(value) for value in stated.values()] == [True] * 5 + [False]
    with PIL.Image.open(files["image"]) as image, PIL.Image.open(files["mask_image"]) as mask:
        assert (image.size, image.getpixel((0, 0)), mask.size, mask.getpixel((0, 0))) == (
            (6, 4),
            (0, 0, 0),
            (8, 8),
            255,
        )
    assert (
        scripts.diffusers_tests.arguments_of({"image": [inputs["image"]]}, tmp_path, lists=True)["image"][0]
        is inputs["image"]
    )


def test_lists_of_pictures_and_tensors_are_files_in_a_recipe(scripts, tmp_path):
    tensors, frames = torch.zeros(1, 7), [PIL.Image.new("RGB", (4, 4)), PIL.Image.new("RGB", (4, 4), "white")]
    arguments = {"video": frames, "mask_image": np.ones((4, 4)), "sizes": (1, 2), "image_embeds": tensors}
    stated = scripts.diffusers_tests.as_files(arguments, tmp_path)
    assert stated["sizes"] == [1, 2]
    assert np.array_equal(np.load(stated["image_embeds"]), tensors.numpy())
    pixels = []
    for file in (*stated["video"], stated["mask_image"]):
        with PIL.Image.open(file) as picture:
            pixels.append(picture.getpixel((0, 0)))
    assert pixels == [(0, 0, 0), (255, 255, 255), 255]


def test_the_whole_way_takes_each_way_out_once(scripts, tmp_path):
    pipeline = SimpleNamespace(__call__=lambda prompt, guidance_scale=3.0: None, components={})
    recipe = scripts.whole.recipe_of(tmp_path, {}, pipeline)
    assert scripts.whole.changed(
        recipe, "teacher.guidance.scale: expected 1 for a pipeline without guidance, found 2.0"
    )
    assert recipe["teacher"]["guidance"] == {"scale": 1.0}
    assert not scripts.whole.changed(recipe, "teacher.guidance.scale: expected 1")
    assert scripts.whole.changed(recipe, "differs from sampler renoise by 1.0e-01")
    assert recipe["method"]["sampler"] == "ddim"
    assert not scripts.whole.changed(recipe, "out of memory")


def test_the_kind_follows_from_folder_and_inputs(scripts):
    kinds = [("flux", {"prompt": "a"}), ("dit", {"class_labels": [1]}), ("wan", {"prompt": "a"})]
    kinds += [("flux", {"image": torch.zeros(1, 3, 4, 4)}), ("wan", {"image": PIL.Image.new("RGB", (4, 4))})]
    assert [scripts.diffusers_tests.kind_of(folder, "Pipeline", inputs) for folder, inputs in kinds] == [
        "text-to-image",
        "classes or none",
        "text-to-video",
        "image-conditioned",
        "image-to-video",
    ]


def refuses_cut_steps(error, advice):
    def trace(pipeline, arguments):
        if arguments.get("strength") != 1:
            raise error("schedule", f"steps are cut; {advice}")

    return trace


def refuses_files(error):
    def trace(pipeline, arguments):
        if isinstance(arguments["image"], str):
            raise error("call", "a picture has no batch")

    return trace


def test_lines_are_those_that_the_page_takes(scripts, tmp_path, monkeypatch):
    sweep, error, module = scripts.sweep, scripts.sweep.TraceError, "tests.pipelines.flux.test_flux"
    made = SimpleNamespace(pipeline_class=type("TinyPipelineWrapper", (), {}))
    made.get_dummy_inputs = lambda: {"prompt": "a", "image": torch.zeros(1, 3, 4, 4)}
    pipelines = []
    monkeypatch.setattr(scripts.diffusers_tests, "instance", lambda module, name: made)
    monkeypatch.setattr(sweep, "build", lambda test, fresh: pipelines.append(fresh))
    lines = []
    for name, trace in (
        ("A", refuses_cut_steps(error, "set teacher.arguments.strength=1.0")),
        ("B", refuses_cut_steps(error, "nothing helps")),
        ("C", refuses_files(error)),
    ):
        monkeypatch.setattr(sweep, "trace", trace)
        lines.append(sweep.result(module, name, tmp_path))
    # Each is built once before it is traced; then A anew after the hint, B with the test's own weights, C with tensors.
    assert pipelines == [True, True, True, True, True, False, True, True, True]
    lines.append(sweep.row_of(module, "D", "no answer in 1 s"))
    lines.append(lines[2] | {"whole": {"passed": False, "reason": "a tensor"}})
    tiny = {"name": "TinyPipeline", "kind": "image-conditioned", "built": True}
    rows = sweep_table.rows_of(map(json.dumps, lines))
    assert sorted(rows, key=lambda row: row["test"]) == [
        {"test": f"{module}.A", **tiny, "traced": True, "arguments": {"strength": 1.0}},
        {"test": f"{module}.B", **tiny, "traced": False, "reason": "schedule: steps are cut; nothing helps"},
        {
            "test": f"{module}.C",
            **tiny,
            "traced": True,
            "objects": True,
            "whole": {"passed": False, "reason": "a tensor"},
        },
        {"test": f"{module}.D", "name": "D", "kind": "other", "traced": False, "reason": "no answer in 1 s"},
    ]
