"""Pictures as cameras and other programs write them: turned, 16 bits, transparent, palettes, several frames."""

import io

import numpy as np
import pytest
from PIL import Image

from data.loaded import loaded
from stepdistill.data import images, picture
from stepdistill.data.sample import SUFFIXES, UNREADABLE
from stepdistill.pipeline.stock_call import PICTURES
from stepdistill.recipe import Data

RAMP = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(256, 0)


def turned(size=(12, 12)) -> Image.Image:
    """A picture whose upper half is red when it is upright; the file holds it on its side, with its orientation."""
    upright = Image.new("RGB", size, (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, size[0], size[1] // 2))
    return upright.transpose(Image.Transpose.ROTATE_90)


def save_turned(path, size=(12, 12)) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned clockwise
    turned(size).save(path, exif=exif)


def test_target_and_control_are_both_upright(tmp_path):
    for name in ("0.png", "0.edges.png"):
        save_turned(tmp_path / name)
    line = '{"text": "a", "image": "0.png", "edges": "0.edges.png"}'
    (tmp_path / "pairs.jsonl").write_text(line)
    data = Data(images=str(tmp_path / "pairs.jsonl"), arguments={"image": "edges"})
    pixels, _, (own,) = loaded(data, 3, 12)
    assert pixels[0, 0, :6].eq(255).all() and pixels[0, 2, 6:].eq(255).all() and not pixels[0, 0, 6:].any()
    assert np.array_equal(np.asarray(own["image"]), pixels[0].permute(1, 2, 0).numpy())
    _, (alone,) = images.requests(data)
    assert np.array_equal(np.asarray(alone["image"]), np.asarray(own["image"]))


def test_a_control_is_cut_as_its_target_is(tmp_path):
    """A pipeline squeezes a control of 3:2 into its square; of the target the middle square is taken."""
    wide = Image.fromarray(np.arange(24 * 16 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 24, 3))
    wide.save(tmp_path / "0.png")
    wide.resize((48, 32), Image.Resampling.NEAREST).save(tmp_path / "double.png")
    wide.crop((0, 0, 16, 16)).resize((9, 16)).save(tmp_path / "other.png")
    line = '{"text": "a", "image": "0.png", "same": "0.png", "double": "double.png", "other": "other.png"}'
    (tmp_path / "pairs.jsonl").write_text(line)
    names = {name: name for name in ("same", "double", "other")}
    pixels, _, (own,) = loaded(Data(images=str(tmp_path / "pairs.jsonl"), arguments=names), 3, 16)
    assert np.array_equal(np.asarray(own["same"]), pixels[0].permute(1, 2, 0).numpy())
    assert own["double"].size == (32, 32) and np.array_equal(np.asarray(own["double"])[::2, ::2], own["same"])
    assert own["other"].size == (9, 16)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_ramp_of_16_bits_stays_a_ramp(name, mode, tmp_path):
    Image.fromarray(RAMP).save(tmp_path / name)
    found, notes = picture.read(tmp_path / name, mode)
    assert notes == [picture.FROM_16_BITS] and found.mode == mode
    ramp = np.asarray(found).reshape(256, 256, -1)[0, :, 0].astype(int)
    assert np.array_equal(ramp, np.arange(256))


def test_numbers_without_a_range_are_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="mode F have no stated range"):
        picture.read(tmp_path / "a.tif")


def transparent(mode: str) -> Image.Image:
    """Green that alpha hides, but for a red quarter."""
    image = Image.new("RGBA", (8, 8), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 4))
    if mode == "P":
        paletted = Image.new("P", (8, 8), 0)
        paletted.putpalette([0, 255, 0, 255, 0, 0])
        paletted.paste(1, (0, 0, 4, 4))
        paletted.info["transparency"] = 0
        return paletted
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_a_colour_under_alpha_0_is_not_trained(mode, tmp_path, capsys):
    transparent(mode).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red square")
    pixels, _, _ = loaded(Data(images=str(tmp_path)), 3, 8)
    assert pixels[0, :, 4:].eq(255).all() and pixels[0, :, :, 4:].eq(255).all()
    assert mode == "LA" or pixels[0, :, 0, 0].tolist() == [255, 0, 0]
    assert "data.images: transparent parts are put on white: 1 of 1 (a.png)" in capsys.readouterr().err


def test_an_opaque_alpha_changes_nothing(tmp_path):
    opaque = Image.effect_noise((8, 8), 90).convert("RGB")
    opaque.convert("RGBA").save(tmp_path / "a.png")
    found, notes = picture.read(tmp_path / "a.png")
    assert notes == [] and found.tobytes() == opaque.tobytes()


@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "YCbCr", "L"])
def test_other_modes_are_converted_as_before(mode):
    file = io.BytesIO()
    Image.effect_noise((8, 8), 90).convert("RGB").convert(mode).save(file, "TIFF")
    found, notes = picture.read(io.BytesIO(file.getvalue()))
    assert notes == [] and found.tobytes() == Image.open(io.BytesIO(file.getvalue())).convert("RGB").tobytes()


def test_of_an_animation_the_first_frame_is_taken(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.txt").write_text("red, then blue")
    pixels, _, _ = loaded(Data(images=str(tmp_path)), 3, 8)
    assert pixels[0, 0].eq(255).all() and not pixels[0, 2].any()
    assert f"data.images: {picture.FIRST_FRAME}: 1 of 1 (a.gif)" in capsys.readouterr().err


def test_an_example_that_the_stock_call_misreads_is_refused(tmp_path):
    save_turned(tmp_path / "turned.jpg")
    Image.effect_noise((8, 8), 90).convert("RGBA").save(tmp_path / "opaque.png")
    transparent("RGBA").save(tmp_path / "transparent.png")
    (tmp_path / "none.png").write_bytes(b"none")
    assert picture.misread(tmp_path / "turned.jpg") == picture.misread(tmp_path / "opaque.png") == ""
    assert picture.misread(tmp_path / "transparent.png").endswith("misreads transparent parts")
    assert "can be read" in picture.misread(tmp_path / "none.png")
    Image.fromarray(RAMP).save(tmp_path / "depth.png")
    assert picture.misread(tmp_path / "depth.png").endswith("misreads 16 bits")


def test_examples_and_pictures_of_samples_have_the_same_endings():
    assert set(PICTURES) - {".npy"} == SUFFIXES


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_pictures_are_rejected_and_end_nothing(form, tmp_path):
    """Cut short, with bytes that are others, and with EXIF that is none: Pillow raises more than it says."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((24, 16), 90).convert("RGB").save(file, form, exif=exif.tobytes())
    random, whole, rejected = np.random.default_rng(0), file.getvalue(), 0
    for number in range(60):
        content = bytearray(whole[: random.integers(1, len(whole))] if number % 3 == 0 else whole)
        for place in random.integers(0, min(len(content), 400), number % 8):
            content[place] = random.integers(256)
        try:
            image, _ = picture.read(io.BytesIO(bytes(content)))
            assert image.mode == "RGB"
        except UNREADABLE:
            rejected += 1
    assert rejected


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_that_is_cut_short_is_rejected_with_the_reason(form, tmp_path, capsys):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(file, form)
    (tmp_path / "0.png").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    (tmp_path / "1.png").write_bytes(file.getvalue())
    for name in "01":
        (tmp_path / f"{name}.txt").write_text("noise")
    assert len(loaded(Data(images=str(tmp_path), max_rejected=0.5), 3, 8)[0]) == 1
    assert "1 of 2 samples rejected (1 unreadable image), the first: " in capsys.readouterr().err
