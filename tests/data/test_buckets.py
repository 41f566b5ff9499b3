"""Buckets: sizes of one area, the one that a picture goes to, and the part of it that is kept."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from data.loaded import loaded
from stepdistill.data import decoding, images
from stepdistill.data.buckets import UNKNOWN, Bucket, bucket_sizes, nearest
from stepdistill.recipe import Data

SIZES = ((16, 16), (16, 24), (24, 16))


def test_sizes_of_one_area_in_multiples_that_the_pipeline_takes():
    sizes = bucket_sizes((1024, 1024), 8)
    assert sizes[0] == (1024, 1024) and {(832, 1216), (1216, 832), (896, 1152)} < set(sizes)
    assert all(height % 64 == width % 64 == 0 for height, width in sizes)
    assert all(abs(math.prod(size) / 2**20 - 1) < 0.05 and 0.5 <= size[0] / size[1] <= 2 for size in sizes)
    assert bucket_sizes((64, 64), 8)[1:] == [(48, 80), (48, 88), (56, 72), (72, 56), (80, 48), (88, 48)]
    # A pipeline of another proportion keeps its own size.
    assert bucket_sizes((832, 1216), 16)[0] == (832, 1216)


def test_a_picture_goes_to_the_nearest_proportions():
    assert [nearest(*size, SIZES) for size in ((300, 200), (200, 200), (9, 16), (3000, 100))] == [1, 0, 2, 1]


@pytest.fixture
def folder(tmp_path):
    """A square, a wide and a high picture with columns and rows that tell their place, and one that is broken."""
    ramp = np.arange(240, dtype=np.uint8)
    pictures = {"square": (64, 64), "wide": (64, 240), "high": (96, 64)}
    for name, (height, width) in pictures.items():
        pixels = np.broadcast_to(ramp[:width], (height, width))
        Image.fromarray(np.stack([pixels, pixels, pixels], -1)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines = [{"file_name": f"{name}.png", "text": name} for name in (*pictures, "broken")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Data(images=str(tmp_path), max_rejected=0.5)


def test_each_bucket_has_its_pictures_scaled_and_cropped(folder):
    assert images.bucket_numbers(folder, SIZES) == [0, 1, 2, UNKNOWN]
    for number, name in enumerate(("square", "wide", "high")):
        pixels, captions, _ = loaded(folder, 3, 0, Bucket(SIZES, number))
        assert captions == [name] and pixels.shape == (1, 3, *SIZES[number])
    wide = loaded(folder, 3, 0, Bucket(SIZES, 1))[0].float()
    # 96 of 240 columns: the middle ones.
    assert wide.mean().item() == pytest.approx(119.5, abs=1)


def test_random_crops_are_of_seed_and_picture_alone(folder):
    bucket = [loaded(folder, 3, 0, Bucket(SIZES, 1, seed))[0].float().mean().item() for seed in (0, 0, 1, 2)]
    assert bucket[0] == bucket[1] and len(set(bucket)) == 3
    assert all(47 <= mean <= 192 for mean in bucket)


def test_an_upright_picture_is_measured_as_it_is_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (96, 64)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("a")
    assert images.bucket_numbers(Data(images=str(tmp_path)), SIZES) == [2]


def test_each_picture_is_looked_at_once(folder, tmp_path_factory, monkeypatch):
    """With many buckets it would be opened for each of them, and at every start again."""
    looked, cache = [], tmp_path_factory.mktemp("cache")
    measured = images._upright_size
    monkeypatch.setattr(images, "_upright_size", lambda image: looked.append(image) or measured(image))
    first = images.bucket_numbers(folder, SIZES, cache)
    assert len(looked) == 4 and images.bucket_numbers(folder, SIZES, cache) == first and len(looked) == 4
    for number in range(len(SIZES)):
        plain, known = (loaded(folder, 3, 0, Bucket(SIZES, number, None, of)) for of in (None, first))
        assert (plain[0] == known[0]).all() and plain[1] == known[1]
    listed = images.identity(folder.images)
    monkeypatch.setattr(images, "identity", None)  # a start that has listed the source does so once
    assert images.bucket_numbers(folder, SIZES, cache, listed) == first and len(looked) == 4
    read, cut = [], decoding._cut
    monkeypatch.setattr(decoding, "_cut", lambda *given: read.append(given[1]) or cut(*given))
    loaded(folder, 3, 0, Bucket(SIZES, 1, None, first))
    assert sorted(read) == [1, 3]  # with the numbers, its own and the one that cannot be read
