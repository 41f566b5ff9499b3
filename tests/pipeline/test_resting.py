"""Networks that rest in the host's memory are on the device for their calls alone. "meta" stands for an accelerator."""

from types import SimpleNamespace

import pytest
import torch

from pipeline import tiny
from stepdistill.pipeline import open as open_module
from stepdistill.pipeline.components import modules
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.live import live
from stepdistill.pipeline.open import open_teacher
from stepdistill.pipeline.resting import place, rest, stay
from stepdistill.pipeline.trace import TraceError
from stepdistill.roles.stored_weights import Frozen

META = torch.device("meta")


def places(pipeline) -> dict[str, str]:
    return {name: network.device.type for name, network in modules(pipeline).items()}


def test_a_network_at_rest_comes_when_it_is_called_and_goes_when_told(monkeypatch):
    pipeline = tiny.tiny_sd()
    place(pipeline, META, ["text_encoder", "vae"])
    assert places(pipeline) == {"vae": "cpu", "text_encoder": "cpu", "unet": "meta"}
    assert pipeline._execution_device == META
    assert pipeline.text_encoder(torch.tensor([[0, 5]]))[0].device == META
    pipeline.vae.encode(torch.zeros(1, 3, 8, 8, device=META))
    assert places(pipeline) == {"vae": "meta", "text_encoder": "meta", "unet": "meta"}
    sent = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda network, place: sent.append((type(network).__name__, place)))
    rest(pipeline)
    assert sorted(sent) == [("AutoencoderKL", "cpu"), ("CLIPTextModel", "cpu")]
    stay(pipeline.vae)
    rest(pipeline)
    assert [name for name, _ in sent[2:]] == ["AutoencoderKL", "CLIPTextModel"] and sent[2][1] == META


@pytest.mark.parametrize(
    ("frozen", "resting", "fails", "at_rest"),
    [
        (Frozen(), True, 0, {"text_encoder", "text_encoder_2", "text_encoder_3"}),
        (Frozen(offload="group"), True, 0, {"text_encoder", "text_encoder_2", "text_encoder_3", "vae"}),
        (Frozen(), True, 1, set()),
        (Frozen(), False, 0, set()),
    ],
)
def test_a_teacher_is_on_the_device_but_for_what_makes_its_conditions(
    frozen, resting, fails, at_rest, tmp_path, monkeypatch
):
    """A pipeline that cannot be traced so is traced once more, wholly on the device."""
    save_pipeline(tiny.tiny_sd3(), tmp_path)
    seen = []

    def traced(pipeline, _):
        seen.append(places(pipeline))
        if len(seen) <= fails:
            raise TraceError("call", "weights are on cpu")
        names = tuple(name for name in modules(pipeline) if name.startswith("text"))
        return SimpleNamespace(pipeline=pipeline, encoders=names)

    monkeypatch.setattr(open_module, "kept_trace", traced)
    monkeypatch.setattr(open_module, "with_guidance", lambda trace, _: trace)
    for name in ("with_rule", "with_guider"):
        monkeypatch.setattr(open_module, name, lambda trace, _: trace)
    pipeline = open_teacher(tmp_path, arguments={}, device=META, frozen=frozen, resting=resting).pipeline
    assert {name for name, where in places(pipeline).items() if where == "cpu"} == at_rest
    assert len(seen) == 1 + fails and (set(seen[0].values()) == {"cpu", "meta"}) == resting


@pytest.mark.gpu
def test_a_teacher_at_rest_gives_what_it_gives_on_the_device(tmp_path):
    save_pipeline(tiny.tiny_sd3(), tmp_path)
    cuda, prompts, made = torch.device("cuda"), ["rain", "a red shoe"], []
    for resting, frozen in ((False, Frozen()), (True, Frozen()), (True, Frozen(offload="group"))):
        traced = open_teacher(tmp_path, device=cuda, frozen=frozen, resting=resting)
        latents = torch.randn(2, *traced.latent_shape, generator=torch.Generator().manual_seed(0))
        each = (live(traced, prompts), encode(traced, prompts))
        rows = [one.batch(torch.tensor([1, 0]))[0] for one in each]
        made.append([*(value for side in rows for value in side.values()), decode(traced, latents)])
        away = {name for name, where in places(traced.pipeline).items() if where == "cpu"}
        assert away == {*(traced.encoders if resting else ()), *(["vae"] if frozen else [])}
        live(traced, prompts, stays=True)
        assert not any(places(traced.pipeline)[name] == "cpu" for name in traced.encoders)
    for found in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, made[0], strict=True))
