"""Inversion and editing: the loop against exact trajectories, and a trained iCD student from file to picture."""

import json

import pytest
import torch
from PIL import Image

from pipeline.tiny import tiny_dit, tiny_sd
from stepdistill import cli, train
from stepdistill.diffusion.guidance import guided
from stepdistill.errors import InputError
from stepdistill.roles.added import GuidanceEmbedded
from stepdistill.roles.guidance_embedding import read_embedding, write_embedding
from stepdistill.sampling.editing import Editor, dynamic_guidance, edit, invert, load_editor, redraw
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import SCHEDULES, at

FLOW = SCHEDULES["flow"]
# Rows: N(-1, .5^2) is what the picture shows, N(1, .4^2) what it should show, N(0, 1.2^2) is without condition.
TEACHER = GaussianDenoiser(torch.tensor([-1.0, 1.0, 0.0]), torch.tensor([0.5, 0.4, 1.2]), FLOW, "flow")


def labels(row: int) -> dict:
    return {"class_labels": torch.tensor([row])}


class GuidedNetwork:
    """The guided teacher as a network with w as an input."""

    schedule, kind = FLOW, "flow"

    def __call__(self, x_t, t, cond):
        w = cond["guidance_scale"].item()
        return guided(TEACHER, x_t, t, {"class_labels": cond["class_labels"]}, labels(2), w)


@pytest.fixture(scope="module")
def exact():
    """An editor of so many steps that it follows the exact trajectories."""
    times = (torch.arange(2000, -1, -1, dtype=torch.float64) / 2000).clamp_min(1e-6).tolist()
    return Editor(None, GuidedNetwork(), TEACHER, tuple(times), embedded=True, scale=4.0)


def test_inversion_and_edits_follow_the_exact_trajectories(exact):
    x_0 = torch.tensor([[-0.8]], dtype=torch.float64)
    z = invert(exact, x_0, labels(0), torch.zeros_like(x_0))
    assert z.item() == pytest.approx(0.4, abs=1e-3)
    drawn = lambda row, guidance: redraw(exact, z, labels(row), guidance).item()  # noqa: E731
    assert drawn(0, lambda t: 1.0) == pytest.approx(-0.8, abs=2e-3)
    assert drawn(1, lambda t: 1.0) == pytest.approx(1.16, abs=1e-3)
    assert drawn(1, lambda t: 4.0) == pytest.approx(1.207216, abs=1e-3)
    assert drawn(1, dynamic_guidance(4.0, 0.7)) == pytest.approx(1.189892, abs=1e-3)
    assert drawn(1, dynamic_guidance(4.0, 0.5)) == pytest.approx(1.171440, abs=1e-3)


def test_guidance_by_time():
    step, ramp = dynamic_guidance(5.0, 0.6), dynamic_guidance(5.0, 0.4, 0.8)
    assert [step(t) for t in (0.0, 0.6, 0.61, 1.0)] == [5.0, 5.0, 1.0, 1.0]
    assert [ramp(t) for t in (0.4, 0.6, 0.8, 1.0)] == pytest.approx([5.0, 3.0, 1.0, 1.0])
    with pytest.raises(InputError, match=r"ascending order, found 0\.8 and 0\.4"):
        dynamic_guidance(5.0, 0.8, 0.4)


def test_an_export_gets_its_input_for_guidance_back(tmp_path):
    torch.manual_seed(0)
    network = tiny_dit().transformer
    embedded = GuidanceEmbedded(network, 3.0)
    for leaf in embedded.leaves:
        torch.nn.init.normal_(leaf.weight, std=0.1)
    call = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([10, 900])}
    call |= {"class_labels": torch.tensor([1, 2]), "return_dict": False}
    w = torch.tensor([1.0, 5.0])
    with torch.no_grad():
        expected, plain = embedded(**call, guidance_scale=w)[0], embedded(**call)[0]
        stock = embedded.plain()
        write_embedding(embedded, tmp_path)
        again = read_embedding(stock, tmp_path)
        torch.testing.assert_close(again(**call, guidance_scale=w)[0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again(**call)[0], plain, rtol=1e-4, atol=1e-5)
    assert read_embedding(network, tmp_path / "none") is network
    with pytest.raises(InputError, match="does not fit this UNet2DConditionModel"):
        read_embedding(tiny_sd().unet, tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An iCD student of a tiny Stable Diffusion, trained for two steps."""
    root = tmp_path_factory.mktemp("icd")
    tiny_sd().save_pretrained(root / "teacher")
    (root / "images").mkdir()
    for number, word in enumerate(("cat", "dog")):
        Image.effect_noise((40, 30), 60 + number).save(root / "images" / f"{number}.png")
        (root / "images" / f"{number}.txt").write_text(word)
    recipe = {
        "teacher": {"pipeline": str(root / "teacher"), "guidance": {"scale": 3.0}},
        "student": {"steps": 2, "train": "lora", "rank": 2},
        "data": {"images": str(root / "images"), "conditions": "captions"},
        "method": {"name": "icd", "solver_steps": 4, "w_min": 1.0, "w_max": 4.0},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(root / "run"),
    }
    train(recipe)
    return root


def test_a_picture_goes_through_encoder_and_student(run, capsys):
    editor = load_editor(run / "run")
    assert editor.embedded and editor.scale == 3.0 and len(editor.times) == 3 and editor.times[-1] == 0.0
    out = run / "edit.png"
    picture = str(run / "images" / "0.png")
    command = [
        "edit",
        str(run / "run"),
        "--image",
        picture,
        "--from",
        "cat",
        "--to",
        "dog",
        "--out",
        str(out),
        "--json",
    ]
    assert cli.run(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["picture"] == str(out) and 0 < facts["reconstruction_error"] < 1 and facts["z_std"] > 0
    side = edit(run / "run", picture, "cat").image.shape[-1]
    with Image.open(out) as shown:
        assert shown.width > 2 * side
    plain, strong = (edit(run / "run", picture, "cat", "dog", guidance=w, tau=1.0) for w in (1.0, 4.0))
    assert torch.equal(plain.reconstruction, strong.reconstruction)
    assert not torch.equal(plain.edited, strong.edited)
    late = edit(run / "run", picture, "cat", "dog", guidance=4.0, tau=0.0)
    assert torch.equal(late.edited, plain.edited), "no step is below tau = 0"


def test_what_cannot_be_edited(run, tmp_path):
    with pytest.raises(InputError, match="expected a run or an export of method icd, found no folder encoder"):
        edit(run / "teacher", run / "images" / "0.png", "cat")
    with pytest.raises(InputError, match="expected a picture that can be read"):
        edit(run / "run", run / "images" / "0.txt", "cat")


def test_the_first_time_of_an_inversion_has_noise():
    from stepdistill.sampling.editing import lowest_time

    assert all(schedule.sigma(at(lowest_time(schedule))) > 0 for schedule in SCHEDULES.values())
