"""A first frame that is kept inside what the network is given, at time 0 among times for each token."""

import pytest
import torch
from PIL import Image

from pipeline import zoo
from pipeline.no_preview import NoPreview
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.sizes import at_size
from stepdistill.pipeline.trace import TraceError, trace
from stepdistill.roles.added import GuidanceEmbedded
from stepdistill.run import train

PROMPTS = ["a red shoe", "two birds on a wire"]
# The pipeline: one sample without the first frame, the tokens of a frame, and how much the scheduler has before it.
KEPT = {
    "wan_from_a_frame": ((4, 2, 4, 4), 4, 1),
    "ltx_from_a_frame": ((4, 2, 8, 8), 64, 0),
    "ltx_with_conditions": ((128, 4), 64, 64),
}


def traced_of(name, call):
    return trace(getattr(zoo, name)(), call | own(name))


def own(name):
    """The arguments of a pipeline's call beside those of all."""
    return {"image_cond_noise_scale": 0.0} if name == "ltx_with_conditions" else {}


@pytest.fixture(scope="module")
def call(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("pictures") / "first.png"
    Image.new("RGB", (32, 32), (200, 80, 40)).save(file)
    return {"image": str(file), "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_sampled_is_the_rest(name, call):
    traced, (shape, tokens, before) = traced_of(name, call), KEPT[name]
    spec = traced.denoiser.spec
    assert spec.output == "identity"  # of the network's, whatever the scheduler is given
    assert traced.latent_shape == shape and traced.self_test_error <= 1e-5
    assert (traced.free.before if traced.free else 0) == before
    assert spec.timestep_mask.flatten().tolist() == [0.0] * tokens + [1.0] * 2 * tokens
    (beside,) = spec.beside
    cond, _ = encode(traced, PROMPTS).batch(torch.tensor([0, 1]))
    x, t = torch.randn(2, *shape), torch.tensor([0.9, 0.4], dtype=torch.float64)
    given = spec.window.argument(x, [cond[beside]])
    times = traced.denoiser.schedule.timestep(t)[:, None] * spec.timestep_mask
    told = {"hidden_states": given, "timestep": times.float(), "encoder_hidden_states": cond["encoder_hidden_states"]}
    told |= {other: cond[other] for other in cond.keys() - told.keys() - {beside}}
    told |= {other: value for other, value in spec.constants.items() if other != "return_dict"}
    with torch.no_grad():
        expected = traced.network(**told, return_dict=False)[0]
        torch.testing.assert_close(traced.denoiser(x, t, cond).raw, spec.window.prediction(expected))
    # Both rows of a batch hold the frame that is kept: each sees only its own noise.
    other = spec.window.argument(torch.randn_like(x), [cond[beside]])
    assert (given == other).flatten(1).float().mean(1).tolist() == pytest.approx([1 / 3] * 2)


def test_noise_that_is_added_to_what_is_kept_can_be_left_out(call):
    with pytest.raises(TraceError, match=r"changes from step to step; teacher\.arguments\.image_cond_noise_scale=0"):
        trace(zoo.ltx_with_conditions(), call)


@pytest.mark.parametrize(
    ("name", "student", "method"),
    [
        ("wan_from_a_frame", "lora", {"name": "dmd2", "critic_steps": 1}),
        ("ltx_from_a_frame", "full", {"name": "dmd2", "critic_steps": 1}),
        ("ltx_with_conditions", "lora", {"name": "sfd"}),
    ],
)
def test_it_is_distilled_and_exported(name, student, method, call, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", 2)
    save_pipeline(getattr(zoo, name)(), tmp_path / "teacher")
    recipe = {
        "teacher": {"pipeline": str(tmp_path / "teacher"), "guidance": {"scale": 2.0}, "arguments": call | own(name)},
        "student": {"steps": 2, "train": student} | ({"rank": 2} if student == "lora" else {}),
        "data": {"conditions": PROMPTS},
        "method": method,
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(tmp_path / "run"),
    }
    assert (train(recipe).folder / "export" / "stepdistill.json").is_file()


@pytest.mark.parametrize("name", KEPT)
def test_at_another_size_its_place_is_another(name, call):
    traced, (shape, tokens, _) = at_size(traced_of(name, call), (32, 64)), KEPT[name]
    assert torch.Size(traced.latent_shape).numel() == 2 * torch.Size(shape).numel()
    assert traced.denoiser.spec.timestep_mask.flatten().tolist() == [0.0] * 2 * tokens + [1.0] * 4 * tokens


@pytest.mark.parametrize("name", KEPT)
def test_a_number_beside_times_per_token_is_each_rows_own(name, call):
    traced = traced_of(name, call)
    network = GuidanceEmbedded(traced.network, 1.0, width=8)
    for leaf in network.leaves:
        torch.nn.init.normal_(leaf.weight)
    cond, _ = encode(traced, PROMPTS).batch(torch.tensor([0, 1]))
    x, t = torch.randn(2, *traced.latent_shape), torch.tensor([0.9, 0.4], dtype=torch.float64)
    scales = torch.tensor([2.0, 5.0])

    def output(rows: slice) -> torch.Tensor:
        some = {name: value[rows] for name, value in cond.items()}
        told = traced.denoiser.arguments(x[rows], t[rows], some)
        return network(**told, guidance_scale=scales[rows])[0]

    with torch.no_grad():
        torch.testing.assert_close(output(slice(2)), torch.cat([output(slice(1)), output(slice(1, 2))]))
