"""Videos, sounds and latents made ahead, as data.images."""

import io
import wave

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from stepdistill.data import clips
from stepdistill.data.buckets import Bucket
from stepdistill.data.decoding import Medium
from stepdistill.data.images import bucket_numbers, stream
from stepdistill.data.sample import Tally
from stepdistill.data.sources import count, form, samples
from stepdistill.errors import InputError
from stepdistill.recipe.schema import Data

RATE = 10


def grey(number: int) -> int:
    """Of a frame: far enough apart that a codec's error does not hide its number."""
    return 12 * number


def video(
    count: int,
    width: int = 32,
    height: int = 16,
    rate: int = RATE,
    form: str = "mp4",
    codec: str = "mpeg4",
    **options: str,
) -> bytes:
    """A video whose frames show their numbers as their greys."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.bit_rate = 4_000_000
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), grey(number), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def gif(count: int, milliseconds: int = 100) -> bytes:
    file = io.BytesIO()
    shown = [Image.new("L", (32, 16), grey(number)) for number in range(count)]
    shown[0].save(file, "GIF", save_all=True, append_images=shown[1:], duration=milliseconds)
    return file.getvalue()


def webp(count: int, milliseconds: int = 100) -> bytes:
    file = io.BytesIO()
    shown = [Image.new("RGB", (32, 16), (grey(number),) * 3) for number in range(count)]
    shown[0].save(file, "WEBP", save_all=True, append_images=shown[1:], duration=milliseconds, lossless=True)
    return file.getvalue()


def sound(length: int, rate: int = 8000, channels: int = 1) -> bytes:
    """A .wav that rises from -0.5 to 0.5."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(channels)
        written.setsampwidth(2)
        written.setframerate(rate)
        numbers = (np.linspace(-0.5, 0.5, length) * 32767).astype("<i2")
        written.writeframes(np.repeat(numbers, channels).tobytes())
    return file.getvalue()


def numbers(frames: list[Image.Image]) -> list[int]:
    """The numbers that frames show."""
    return [round(np.asarray(frame.convert("L")).mean() / 12) for frame in frames]


@pytest.mark.parametrize("made", [video, gif, webp])
@pytest.mark.parametrize(
    ("rate", "place", "expected"),
    [
        (None, 0.0, [0, 1, 2, 3, 4]),
        (None, 0.5, [7, 8, 9, 10, 11]),
        (None, 1.0, [15, 16, 17, 18, 19]),
        (5.0, 0.0, [0, 2, 4, 6, 8]),
        (5.0, 0.5, [5, 7, 9, 11, 13]),
        (20.0, 0.0, [0, 0, 1, 1, 2]),
    ],
)
def test_frames_at_the_file_s_rate_and_at_another(made, rate, place, expected):
    chosen = clips.frames(made(20), 5, rate, place)
    assert numbers(chosen) == expected and {one.mode for one in chosen} == {"RGB"}


B_FRAMES = {"bf": "2", "g": "12"}
FILES = [
    ("mp4", "mpeg4", B_FRAMES),
    ("avi", "mpeg4", B_FRAMES),
    ("matroska", "mpeg4", B_FRAMES),
    ("mov", "libx264", {"g": "8", "x264-params": "open-gop=1:bframes=3"}),
    ("avi", "libx264", {"g": "8"}),
    ("mp4", "libx265", {"x265-params": "keyint=8:open-gop=1:log-level=none"}),
    ("webm", "libvpx-vp9", {}),
]


@pytest.mark.parametrize("far", [0.0, 20.0])
@pytest.mark.parametrize(("form", "codec", "options"), FILES)
def test_frames_of_containers_that_store_them_in_another_order(form, codec, options, far, monkeypatch):
    """Also after a jump, of which some end behind the frame."""
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV without {codec}")
    monkeypatch.setattr(clips, "FAR", far)
    content = video(20, 64, 64, form=form, codec=codec, **options)
    for place, first in ((0.0, 0), (0.3, 4), (0.5, 7), (0.8, 12), (1.0, 15)):
        assert numbers(clips.frames(content, 5, None, place)) == list(range(first, first + 5))
    assert clips.size(content) == (64, 64)


def test_the_speed_of_an_animated_picture_counts():
    for made in (gif, webp):
        assert numbers(clips.frames(made(20, 40), 5, 25.0, 0.0)) == [0, 1, 2, 3, 4]
        assert numbers(clips.frames(made(20, 40), 5, 12.5, 0.0)) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("form", "codec"), [("flac", "flac"), ("ogg", "libopus"), ("mp3", "libmp3lame"), ("mp4", "aac")]
)
def test_sounds_of_other_kinds(form, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV without {codec}")
    file, tone = io.BytesIO(), np.sin(np.arange(16000) * 2 * np.pi * 440 / 8000).astype(np.float32)
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=8000, layout="mono")
        made = av.AudioResampler(format=stream.format, layout="mono", rate=8000)
        frame = av.AudioFrame.from_ndarray((tone[None] * 16000).astype(np.int16), format="s16", layout="mono")
        frame.rate = 8000
        for one in (*made.resample(frame), *made.resample(None)):
            container.mux(stream.encode(one))
        container.mux(stream.encode())
    part = clips.sound(file.getvalue(), 1, 4000, 8000)
    spectrum = torch.fft.rfft(part[0]).abs()
    assert part.shape == (1, 4000) and abs(int(spectrum.argmax()) - 220) <= 1  # 440 Hz in half a second
    assert 0.4 < part.abs().max() < 0.6


def test_a_missing_package_is_not_the_files_fault(tmp_path, monkeypatch):
    data = folder_of(tmp_path, a_mp4=video(3))
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(InputError, match=r"need the package av"):
        list(stream(data, Medium((3, 3, 16, 16)), Tally("data.images", 1.0)))
    with pytest.raises(InputError, match=r"need the package av"):
        bucket_numbers(data, ((16, 16), (16, 32)))


def test_a_picture_is_never_taken_for_latents(tmp_path):
    """The ninth byte of a GIF is its height's first: that of 123 lines is the one that a safetensors file has there."""
    file = io.BytesIO()
    Image.new("RGB", (50, 123), "teal").save(file, "GIF")
    assert file.getvalue()[8:9] == b"{"
    data = folder_of(tmp_path, a_gif=file.getvalue())
    (item,) = stream(data, Medium((3, 16, 16)), Tally("data.images", 0.0))
    assert item.image.shape == (3, 16, 16) and not item.ready


def test_a_video_that_ends_before_is_short():
    with pytest.raises(clips.Short, match="shorter than 5 frames: 4"):
        clips.frames(video(4), 5)
    with pytest.raises(clips.Short, match="shorter than 5 frames at 2 a second: 2 s"):
        clips.frames(gif(20), 5, 2.0)
    assert numbers(clips.frames(video(5), 5)) == [0, 1, 2, 3, 4]


def test_sounds_are_brought_to_the_rate_and_the_channels():
    ramp = clips.sound(sound(8000), 1, 4000, 8000)
    assert ramp.shape == (1, 4000) and torch.allclose(ramp[0], torch.linspace(-0.25, 0.25, 4000), atol=1e-3)
    both = clips.sound(sound(8000, channels=2), 2, 2000, 4000, 0.0)
    assert both.shape == (2, 2000) and torch.equal(both[0], both[1])
    assert abs(both[0, 1000].item() + 0.25) < 0.01  # of half the rate the same moment
    with pytest.raises(clips.Short, match="shorter than 2 s: 1 s"):
        clips.sound(sound(8000), 1, 16000, 8000)


@pytest.mark.parametrize("content", [b"", b"no video at all", video(3)[:200]])
def test_what_is_no_video_is_unreadable(content):
    with pytest.raises(ValueError):
        clips.frames(content, 2)
    with pytest.raises(ValueError):
        clips.sound(content, 1, 10, 8000)


def folder_of(tmp_path, **files: bytes) -> Data:
    for name, content in files.items():
        (tmp_path / name.replace("_", ".")).write_bytes(content)
        (tmp_path / f"{name.partition('_')[0]}.txt").write_text(f"caption of {name}")
    return Data(images=str(tmp_path))


def test_a_folder_of_videos(tmp_path, capsys):
    data = folder_of(tmp_path, a_mp4=video(8), b_mp4=video(3), c_webm=b"damage", d_gif=gif(8))
    tally = Tally("data.images", 1.0)
    # A folder with pictures is one of pictures; its other files are named by their ending.
    assert [item and item.condition for item in stream(data, Medium((5, 3, 16, 16)), tally)] == ["caption of d_gif"]
    tally.close()
    assert "other kinds are left out (data.image_key: mp4 takes those): 1 of 1 (a.mp4)" in capsys.readouterr().err
    data = data.model_copy(update={"image_key": "mp4"})
    (tmp_path / "d.gif").unlink()
    assert (count(data.images, None, "mp4"), count(data.images, None)) == (2, 3)
    tally = Tally("data.images", 1.0)
    first, short = stream(data, Medium((5, 3, 16, 16)), tally)
    assert first.image.shape == (5, 3, 16, 16) and first.image.dtype == torch.uint8
    assert [round(frame.float().mean().item() / 12) for frame in first.image] == [1, 2, 3, 4, 5]
    assert short is None and tally.reasons == {"shorter than 5 frames": 1}
    tally = Tally("data.images", 1.0)
    every = [*stream(Data(images=str(tmp_path), frame_rate=RATE), Medium((5, 3, 16, 16)), tally)]
    assert [item is None for item in every] == [False, True, True] and tally.reasons["unreadable video"] == 1


def test_videos_go_to_buckets_by_their_proportions(tmp_path):
    data = folder_of(tmp_path, wide_mp4=video(3), high_mp4=video(3, 16, 32))
    sizes = ((16, 32), (32, 16))
    assert bucket_numbers(data, sizes) == [1, 0]
    for number, name in enumerate(("wide_mp4", "high_mp4")):
        found = [*stream(data, Medium((3, 3, 16, 16)), Tally("data.images", 0.0), bucket=Bucket(sizes, number))]
        (item,) = [item for item in found if item is not None]
        assert item.condition == f"caption of {name}" and item.image.shape == (3, 3, *sizes[number])


def test_the_moment_is_drawn_once_for_each_row():
    drawn = [Bucket(((16, 16),), 0, seed=3).moment(row) for row in range(20)]
    assert len(set(drawn)) == 20 and drawn[7] == Bucket(((8, 8),), 0, seed=3).moment(7)
    assert Bucket(((16, 16),), 0).moment(5) == 0.5


def test_latents_that_were_made_ahead(tmp_path):
    data = folder_of(
        tmp_path, a_safetensors=save({"latents": torch.ones(4, 2, 2)}), b_safetensors=save({"z": torch.ones(1)})
    )
    tally = Tally("data.images", 1.0)
    ready, wrong = stream(data, Medium((3, 16, 16)), tally)
    assert ready.ready and ready.image.shape == (4, 2, 2) and wrong is None
    assert "expected a tensor latents, found z" in tally.example


def test_sounds_in_shards(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("0.wav", sound(100)), ("0.txt", b"a rising tone")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (sample,) = samples(str(tmp_path / "a.tar"), None, None, None)
    assert sample.caption == "a rising tone" and sample.image is not None
    (item,) = stream(Data(images=str(tmp_path / "a.tar")), Medium((1, 50), 8000), Tally("data.images", 0.0))
    assert item.image.shape == (1, 50) and item.image.dtype == torch.float32


def test_a_clone_of_a_dataset_with_a_video_beside_it_stays_a_dataset(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("data/train-0.parquet", "demo.mp4"):
        (tmp_path / name).write_bytes(b"")
    assert form(str(tmp_path)) == "dataset"
    (tmp_path / "data" / "train-0.parquet").unlink()
    assert form(str(tmp_path)) == "folder"
