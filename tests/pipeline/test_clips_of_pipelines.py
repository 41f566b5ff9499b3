"""Real videos and sounds become the latents of pipelines that make such, students train on them, and previews play."""

import wave
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data.test_clips import sound, video
from pipeline.sounds import LENGTH, RATE, TITLED, stable_audio
from pipeline.tiny import redraw, tiny_sd
from pipeline.zoo import ZOO, ready
from stepdistill import sample, train
from stepdistill.errors import InputError
from stepdistill.eval.bench.end_of_run import protocol_of
from stepdistill.pipeline.assemble import save_pipeline
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.latents import decoder, medium, sampling_rate, store_images
from stepdistill.pipeline.layout import layout
from stepdistill.pipeline.trace import trace
from stepdistill.recipe.schema import Data


@pytest.fixture(scope="module")
def wan():
    return trace(ZOO["wan"].build(), ZOO["wan"].arguments)


@pytest.fixture(scope="module")
def audio():
    return trace(stable_audio(), TITLED)


def folder_of(folder: Path, files: dict[str, bytes]) -> Data:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    return Data(images=str(folder))


def test_a_video_is_encoded_as_the_autoencoder_does(wan, tmp_path):
    assert medium(wan).shape == (5, 3, 32, 32) and medium(wan, 8.0).rate == 8.0
    data = folder_of(tmp_path / "clips", {"a.mp4": video(9), "b.mp4": video(5), "c.mp4": video(6)})
    latents = store_images(wan, data).rows("")["latents"]
    assert latents.shape == (3, *wan.latent_shape)
    grey = torch.arange(5).float().mul(12).div(127.5).sub(1).reshape(1, 1, 5, 1, 1).expand(1, 3, 5, 32, 32)
    expected = layout(wan).from_z(wan.pipeline.vae.encode(grey).latent_dist.mean.detach(), wan.latent_shape)
    # The codec keeps greys to about one level.
    assert (latents[1] - expected[0]).abs().max() < 0.05 * expected.abs().max()
    assert (latents[0] - expected[0]).abs().max() > (latents[1] - expected[0]).abs().max()  # its middle is other frames


def test_sounds_are_encoded_and_latents_made_ahead_are_taken_as_they_are(audio, tmp_path):
    made = medium(audio)
    assert made.rate == RATE and made.shape[0] == 2 and 0 < LENGTH - made.shape[1] < 20
    data = folder_of(tmp_path / "sounds", {"a.wav": sound(made.shape[1], RATE), "b.wav": sound(LENGTH, RATE, 2)})
    encoded = store_images(audio, data).rows("")["latents"]
    assert encoded.shape == (2, *audio.latent_shape)
    z = layout(audio).to_z(torch.as_tensor(encoded[0:1]))
    (tmp_path / "ready").mkdir()
    save_file({"latents": z[0]}, tmp_path / "ready" / "a.safetensors")
    (tmp_path / "ready" / "a.txt").write_text("a")
    ready = store_images(audio, Data(images=str(tmp_path / "ready"))).rows("")["latents"]
    torch.testing.assert_close(torch.as_tensor(ready[0:1]), torch.as_tensor(encoded[0:1]))
    save_file({"latents": z}, tmp_path / "ready" / "a.safetensors")  # a batch of one
    again = store_images(audio, Data(images=str(tmp_path / "ready"))).rows("")["latents"]
    assert torch.equal(torch.as_tensor(again[0:1]), torch.as_tensor(ready[0:1]))
    for wrong in (z[0, :, :2], torch.stack([z, z], 1)):
        save_file({"latents": wrong.contiguous()}, tmp_path / "ready" / "a.safetensors")
        with pytest.raises(InputError, match=r"1 of 1 samples rejected \(1 latents of another shape\)"):
            store_images(audio, Data(images=str(tmp_path / "ready")))


def run(folder: Path, pipeline, arguments: dict, method: str, data: dict):
    save_pipeline(pipeline, folder / "teacher")
    return train(
        {
            "teacher": {"pipeline": str(folder / "teacher"), "guidance": {"scale": 2.0}, "arguments": arguments},
            "student": {"steps": 2, "train": "full"},
            "method": {"name": method},
            "data": {"conditions": "captions", **data},
            "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "preview_every": 1, "tracker": "none"},
            "report": {"samples": 0},
            "output": str(folder / "run"),
        }
    ).folder


def test_a_student_of_videos(tmp_path):
    data = folder_of(tmp_path / "clips", {"a.mp4": video(9), "b.mp4": video(5)})
    made = run(tmp_path, ZOO["wan"].build(), ZOO["wan"].arguments, "lcm", {"images": data.images, "crop": "random"})
    for name in ("teacher", "000001_student"):
        with Image.open(made / "previews" / f"{name}.webp") as moving:
            assert moving.n_frames == 5 and moving.size == (66, 32)
    assert (made / "export" / "stepdistill.json").is_file()  # a plain call of it gives the same
    result = sample(made, steps=2, count=1, conditions=["rain"], out=tmp_path / "grid.png")
    assert (
        result.files == (tmp_path / "grid_whole.webp",)
        and result.files[0].is_file()
        and result.images.shape == (1, 3, 32, 32)
    )


def test_a_student_of_sounds(tmp_path):
    data = folder_of(tmp_path / "sounds", {"a.wav": sound(LENGTH, RATE), "b.wav": sound(2 * LENGTH, RATE)})
    made = run(tmp_path, stable_audio(), TITLED, "pcm", {"images": data.images})
    with Image.open(made / "previews" / "000001.png") as spectra:
        assert spectra.convert("L").getextrema()[0] < 128
    with wave.open(str(made / "previews" / "000001_student_1.wav")) as played:
        assert (played.getframerate(), played.getnchannels()) == (RATE, 2) and LENGTH - played.getnframes() < 20
        assert any(played.readframes(LENGTH))
    assert (made / "export" / "stepdistill.json").is_file()  # a plain call of it gives the same


def test_no_report_is_promised_of_sounds(audio):
    with pytest.raises(InputError, match=r"expected a pipeline of pictures, StableAudioPipeline makes \(2, 156\)"):
        protocol_of(audio, "teacher", ["enet"])


def test_the_rate_is_that_of_the_part_that_makes_the_sound():
    """AudioLDM 2's feature extractor listens at another rate than its vocoder speaks."""
    heard, spoken = SimpleNamespace(sampling_rate=48000), SimpleNamespace(config=SimpleNamespace(sampling_rate=16000))
    parts = {"feature_extractor": heard, "vae": SimpleNamespace(config=SimpleNamespace()), "vocoder": spoken}
    assert sampling_rate(SimpleNamespace(components=parts, **parts)) == 16000
    with pytest.raises(InputError, match="states the sampling_rate"):
        sampling_rate(SimpleNamespace(components={"feature_extractor": heard}, feature_extractor=heard))


def animate_diff():
    """SD with motion modules; its autoencoder of pictures is given a video's frames in the place of a batch."""
    parts = dict(tiny_sd().components)
    motion = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    )
    unet = diffusers.UNetMotionModel.from_unet2d(parts.pop("unet"), motion)
    for name in ("safety_checker", "requires_safety_checker", "feature_extractor", "image_encoder"):
        parts.pop(name, None)
    return ready(diffusers.AnimateDiffPipeline(**parts, unet=redraw(unet, 5), motion_adapter=None))


def test_a_video_that_is_decoded_picture_by_picture(tmp_path):
    traced = trace(animate_diff(), {"num_frames": 3})
    own, kind = layout(traced), medium(traced)
    assert own.frames and own.shape[0] == 3 and kind.shape[0] == 3 and kind.name == "video"
    data = folder_of(tmp_path / "clips", {"a.mp4": video(3), "b.mp4": video(7)})
    latents = torch.as_tensor(store_images(traced, data).rows("")["latents"][0:2])
    assert latents.shape == (2, *traced.latent_shape)
    side = kind.shape[-1]
    grey = torch.arange(3).float().mul(12).div(127.5).sub(1).reshape(3, 1, 1, 1).expand(3, 3, side, side)
    expected = traced.pipeline.vae.encode(grey).latent_dist.mean.detach()
    assert (own.to_z(latents)[0] - expected).abs().max() < 0.05 * expected.abs().max()
    shown = decoder(traced)(latents)  # the middle frames
    assert (decode(traced, latents).float() / 127.5 - 1 - shown.detach().clamp(-1, 1)).abs().max() < 0.02
