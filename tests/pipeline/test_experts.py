"""Networks that take turns: when each is called is read off the calls, and a batch is split by time."""

import copy

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image

from pipeline.tiny import INSPECT_KEYS, redraw
from pipeline.toy import ToyPipeline, toy
from pipeline.zoo import SMALLER, wan
from stepdistill.diffusion.experts import Turn, in_words
from stepdistill.diffusion.guidance import guided
from stepdistill.pipeline.trace import Trace, TraceError, trace

BOTH = ("transformer", "transformer_2")
CALL = SMALLER | {"num_frames": 5, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def traced() -> Trace:
    return trace(wan(boundary_ratio=0.875), CALL)


@pytest.mark.parametrize("boundary", [0.9, 0.3])
def test_the_boundary_is_found_to_the_last_digit(boundary):
    """At 0.3 the second expert has no turn in the three steps that are watched first."""
    found = trace(wan(boundary_ratio=boundary), CALL)
    edge = float(torch.tensor(boundary * 1000))
    assert found.denoiser.spec.experts == {"transformer": Turn(edge), "transformer_2": Turn(0.0)}
    assert found.self_test_error <= 1e-5 and found.components == BOTH


def test_image_to_video(tmp_path):
    """Behind the sample's channels its network takes those of a mask and of the first frame's latents."""
    Image.new("RGB", (32, 32), (200, 80, 40)).save(tmp_path / "first.png")
    parts = wan(boundary_ratio=0.9).components
    config = dict(parts["transformer"].config) | {"in_channels": 12}
    networks = {name: redraw(WanTransformer3DModel.from_config(config), seed) for seed, name in enumerate(BOTH, 5)}
    pipeline = WanImageToVideoPipeline(**parts | networks, image_encoder=None, image_processor=None, boundary_ratio=0.9)
    pipeline.set_progress_bar_config(disable=True)
    found = trace(pipeline, CALL | {"image": str(tmp_path / "first.png")})
    assert [turn.lowest for turn in found.denoiser.spec.experts.values()] == [900.0, 0.0]
    assert found.denoiser.spec.window.spans == ((1, 0, 4, 8),) and found.self_test_error <= 1e-5


def test_what_is_said_of_them(traced):
    summary = traced.summary()
    assert summary.keys() == INSPECT_KEYS | {"experts"}
    assert summary["experts"]["transformer_2"] == {"lowest": 0.0, "scale": None}
    assert summary["denoiser"] == "WanTransformer3DModel"
    turns = traced.denoiser.spec.experts | {"transformer_2": Turn(0.0, 3.0)}
    sentence = "transformer from timestep 875 up; transformer_2 below 875, guided with its own scale 3"
    assert in_words(turns) == sentence


@pytest.mark.parametrize("scale", [3.0, 5.0])  # the latter is the scale that the pipeline would be watched at
def test_an_expert_with_a_scale_of_its_own(scale):
    found = trace(wan(boundary_ratio=0.875), CALL | {"guidance_scale_2": scale})
    assert [turn.scale for turn in found.denoiser.spec.experts.values()] == [None, scale]
    x, t = torch.randn(2, *found.latent_shape), torch.tensor([0.95, 0.5], dtype=torch.float64)
    cond, null = ({"encoder_hidden_states": torch.randn(2, 16, 16)} for _ in range(2))
    rows = guided(found.denoiser, x, t, cond, null, 7.0).raw
    on, off = found.denoiser(x, t, cond).raw, found.denoiser(x, t, null).raw
    expected = off + torch.tensor([7.0, scale]).reshape(2, 1, 1, 1, 1) * (on - off)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


def test_a_network_of_the_same_class_that_is_never_called():
    pipeline = wan(boundary_ratio=0.875)
    pipeline.register_to_config(boundary_ratio=None)
    found = trace(pipeline, CALL)
    assert found.components == ("transformer",) and found.denoiser.network is pipeline.transformer


class Changing(ToyPipeline):
    """Has two networks, and calls the ``other`` where ``second`` says so of the step's number and timestep."""

    def __init__(self, network, other, scheduler):
        super().__init__(network, scheduler)
        self.register_modules(other=other)

    def _network(self, x, t, labels, step):
        network = self.other if self.second(step, t) else self.network
        return network(x, self.level(t).expand(len(x)), extra={"what": labels, "bias": 0.25})[0]


def changing(second) -> Changing:
    plain = toy()
    pipeline = Changing(plain.network, redraw(copy.deepcopy(plain.network), 3), plain.scheduler)
    pipeline.second = second
    return pipeline


def test_a_pipeline_that_changes_just_below_its_boundary():
    turns = trace(changing(lambda _step, t: t <= 600)).denoiser.spec.experts
    assert turns == {
        "network": Turn(float(torch.nextafter(torch.tensor(600.0), torch.tensor(601.0)))),
        "other": Turn(0.0),
    }


TWICE, OTHERWISE = "network and other take turns more than once", "network and other is called does not depend on the"


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (lambda step, _t: step % 2, TWICE),
        (lambda step, _t: step > 1, OTHERWISE),
        (lambda _step, t: 300 < t < 600, TWICE),
    ],
)
def test_turns_by_anything_but_a_boundary_are_refused(second, said):
    with pytest.raises(TraceError, match=f"check 'denoiser' failed: .*{said}"):
        trace(changing(second))


def test_a_batch_with_times_of_both(traced):
    denoiser, count = traced.denoiser, 5
    x, t = torch.randn(count, *traced.latent_shape), torch.tensor([0.875, 0.2, 1.0, 0.8749, 0.0], dtype=torch.float64)
    cond = {"encoder_hidden_states": torch.randn(count, 16, 16)}
    before, network = denoiser.evaluations, traced.pipeline
    rows, features = denoiser(x, t, cond).raw, denoiser.features(x, t, cond)
    assert denoiser.evaluations == before + 2 * count
    for i, own in enumerate([network.transformer, network.transformer_2] * 2 + [network.transformer_2]):
        one = {name: value[i : i + 1] for name, value in cond.items()}
        alone = own(hidden_states=x[i : i + 1], timestep=(1000 * t[i : i + 1]).float(), **one, return_dict=False)[0]
        torch.testing.assert_close(rows[i : i + 1], alone, rtol=1e-5, atol=1e-5)
        for deep, single in zip(features, denoiser.features(x[i : i + 1], t[i : i + 1], one), strict=True):
            torch.testing.assert_close(deep[i : i + 1], single, rtol=1e-5, atol=1e-5)
