"""Every prompt with pictures of its own: read from the samples, encoded by the pipeline, trained on."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pipeline import zoo
from pipeline.no_preview import NoPreview
from pipeline.test_given_pictures import recipe_of
from stepdistill.data.images import conditions
from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.trace import trace
from stepdistill.recipe import Data, load
from stepdistill.run import train
from stepdistill.training.session import build

CPU = torch.device("cpu")
PROMPTS = ["a red shoe", "two birds on a wire", "a red shoe"]
CONTROL = "controlnet/controlnet_cond"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """A ControlNet teacher, and three samples, two of the same prompt, each with a picture and an edge map."""
    folder = tmp_path_factory.mktemp("own")
    lines = []
    for number, prompt in enumerate(PROMPTS):
        Image.new("RGB", (16, 16), (80 * number, 255 - 80 * number, 9)).save(folder / f"edges{number}.png")
        Image.new("RGB", (16, 16), (9, 9, 90 * number)).save(folder / f"{number}.png")
        lines.append(json.dumps({"text": prompt, "image": f"{number}.png", "edges": f"edges{number}.png"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    save_pipeline(zoo.controlnet(), folder / "teacher")
    return SimpleNamespace(folder=folder, pairs=str(folder / "pairs.jsonl"), example=str(folder / "edges0.png"))


@pytest.fixture(scope="module")
def traced(made):
    return trace(zoo.controlnet(), {"image": made.example, **zoo.SMALL})


def recipe(made, output, data, **keys) -> dict:
    """A run on the samples; their edges are the argument ``image`` of the teacher's call."""
    whole = recipe_of(made.folder, {"image": made.example}, **keys)
    return whole | {"data": {"arguments": {"image": "edges"}} | data, "output": str(output)}


def test_each_prompt_is_told_its_own_picture(made, traced, tmp_path):
    prompts, pictures = conditions(Data(conditions=made.pairs, arguments={"image": "edges"}))
    assert prompts == PROMPTS
    encoded = encode(traced, prompts, tmp_path, pictures)
    cond, null = encoded.batch(torch.tensor([0, 1, 2]))
    for number, picture in enumerate(cond[CONTROL]):
        colour = torch.tensor([80 * number, 255 - 80 * number, 9]) / 255
        torch.testing.assert_close(picture, colour[:, None, None].expand(3, 16, 16))
    assert torch.equal(null[CONTROL], cond[CONTROL])
    # The texts are as they are without pictures, and the empty one is one row.
    plain = encode(traced, prompts)
    torch.testing.assert_close(encoded.cond["encoder_hidden_states"][:], plain.cond["encoder_hidden_states"])
    assert len(encoded.null["encoder_hidden_states"]) == 1 and len(plain.null[CONTROL]) == 1


def test_they_are_cached_by_their_content(made, traced, tmp_path, monkeypatch):
    prompts, pictures = conditions(Data(conditions=made.pairs, arguments={"image": "edges"}))
    first = encode(traced, prompts, tmp_path, pictures)
    encode(traced, prompts, tmp_path, [*pictures][::-1])
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr("stepdistill.pipeline.trace.Trace.observe", None)
    again = encode(traced, prompts, tmp_path, pictures)
    for side in ("cond", "null"):
        stored, known = getattr(again, side), getattr(first, side)
        assert stored.keys() == known.keys() and all(torch.equal(stored[name][:], known[name][:]) for name in known)


def test_batches_go_to_the_device_and_rows_stay(made, traced):
    prompts, pictures = conditions(Data(conditions=made.pairs, arguments={"image": "edges"}))
    moved = encode(traced, prompts, None, pictures).to("meta")
    cond, null = moved.batch(torch.tensor([1]))
    assert [rows[CONTROL].device.type for rows in (moved.cond, cond, null)] == ["cpu", "meta", "meta"]


def test_a_run_with_pictures_of_its_own(made, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", 2)
    run = train(recipe(made, tmp_path / "run", {"conditions": made.pairs}))
    facts = json.loads((run.folder / "export" / "stepdistill.json").read_text())
    assert facts["recipe"]["data"]["arguments"] == {"image": "edges"}
    assert 'image=load_image("edges0.png")' in (run.folder / "export" / "README.md").read_text()


def test_real_images_go_with_their_own_pictures(made, tmp_path):
    """Two samples of one prompt are two conditions."""
    data = {"conditions": "captions", "images": made.pairs}
    session = build(load(recipe(made, tmp_path, data, method={"name": "tcd"})), CPU)
    latents, index = session.rows
    assert index.tolist() == [0, 1, 2] and session.conditioning.entries == tuple(PROMPTS)
    first, last = session.conditioning.cond[CONTROL][[0, 2]]
    assert not torch.equal(first, last) and not torch.equal(latents[0], latents[2])


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"text": "a"}, r"1 of 1 samples rejected \(1 no picture edges\)"),
        (
            {"text": "a", "edges": "lost.png"},
            r"rejected \(1 unreadable picture\), the first: .*:1 .*lost\.png",
        ),
        ({"text": "a", "edges": ["b"]}, r"1 of 1 samples rejected \(1 unreadable picture\)"),
    ],
)
def test_a_sample_without_its_picture_is_rejected(sample, reason, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(sample))
    with pytest.raises(InputError, match=reason):
        conditions(Data(conditions=str(tmp_path / "a.jsonl"), arguments={"image": "edges"}))


def test_pictures_of_another_size(traced):
    with pytest.raises(InputError, match=r"'rain' give controlnet/controlnet_cond the shape \(3, 32, 32\)"):
        # The size is that of the picture where the call states none.
        loose = trace(zoo.controlnet(), {"image": traced.arguments["image"]})
        encode(loose, ["rain"], None, [{"image": Image.new("RGB", (32, 32))}])


def test_what_the_recipe_cannot_mean(made, tmp_path):
    own, whole = {"conditions": made.pairs}, "expected 'captions'"
    for data, place, problem in (
        ({"conditions": PROMPTS}, "conditions", f"{whole} or a folder"),
        ({"conditions": "classes"}, "conditions", f"{whole} or a folder"),
        (own | {"images": made.pairs}, "conditions", f"{whole} beside data.arguments and data.images"),
        (own | {"arguments": {"mask": "m"}}, "arguments.mask", "expected a picture, an example, as teacher.arguments"),
    ):
        with pytest.raises(InputError, match=rf"data\.{place}: {problem}"):
            load(recipe(made, tmp_path, data))


def test_an_example_must_be_what_the_export_reads(made, tmp_path):
    Image.new("RGBA", (16, 16), (0, 255, 0, 0)).save(tmp_path / "hidden.png")
    whole = recipe(made, tmp_path, {"conditions": made.pairs})
    whole["teacher"]["arguments"]["image"] = str(tmp_path / "hidden.png")
    with pytest.raises(
        InputError, match=r"teacher\.arguments\.image: .*misreads transparent parts, found .*hidden\.png"
    ):
        load(whole)
