"""Threads decode the next pictures; what comes out is what one thread would give, in the order of the samples."""

import io
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from stepdistill.data import decoding
from stepdistill.data.images import stream
from stepdistill.data.sample import Tally
from stepdistill.recipe import Data

COUNT = 30
BROKEN = 4


@pytest.fixture
def data(tmp_path) -> Data:
    """Pictures of which each has its number as its colour and a higher one is 24 x 16; one is broken."""
    for number in range(COUNT):
        Image.new("RGB", (16 + 8 * (number > 9), 16), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text(str(number))
    (tmp_path / f"{BROKEN:02}.png").write_bytes(b"none")
    return Data(images=str(tmp_path))


def threads() -> int:
    return sum(thread.name.startswith("decoding") for thread in threading.enumerate())


def test_samples_come_in_their_order_and_are_counted_when_they_come(data, monkeypatch):
    cut = decoding._cut

    def slow(content, row, *given):
        time.sleep(0.02 * (row % 4 == 0))
        return cut(content, row, *given)

    monkeypatch.setattr(decoding, "_cut", slow)
    tally = Tally("data.images", 0.1)
    found = stream(data, decoding.Medium((3, 16, 16)), tally)
    for number, item in enumerate(found):
        assert tally.read == number + 1 and tally.reasons == ({"unreadable image": 1} if number >= BROKEN else {})
        assert (item is None) == (number == BROKEN)
        assert item is None or (item.condition, int(item.image[0, 0, 0])) == (str(number), number)
        assert number == 0 or 0 < threads() <= decoding.THREADS or number + decoding.AHEAD >= COUNT - 1
        if number == 25:
            break
    found.close()
    assert threads() == 0
    # Files of a store must not depend on where in memory a picture was: its tally is in them.
    assert tally.example.endswith("(unreadable image: cannot identify image file)")


def test_pictures_are_cut_to_the_proportions_of_the_pipeline(tmp_path):
    pixels = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None], (64, 16, 3))
    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("high")
    (item,) = stream(Data(images=str(tmp_path)), decoding.Medium((3, 8, 16)), Tally("data.images", 1.0))
    assert item.image.shape == (3, 8, 16) and item.image[0, :, 0].tolist() == [*range(28, 36)]


def test_other_files_of_an_archive_are_read_while_it_is_open(tmp_path):
    """Those of its last samples, too."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(3):
                picture = io.BytesIO()
                Image.new("RGB", (16, 16), (10 * shard + number, 0, 0)).save(picture, "png")
                for ending, content in (("png", picture.getvalue()), ("edge.png", picture.getvalue()), ("txt", b"one")):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    data = Data(images=str(tmp_path / "{0..1}.tar"), arguments={"image": "edge.png"})
    items = [*stream(data, decoding.Medium((3, 16, 16)), Tally("data.images", 0.0))]
    assert [int(item.image[0, 0, 0]) for item in items] == [0, 1, 2, 10, 11, 12]
    assert [item.own["image"].getpixel((0, 0))[0] for item in items] == [0, 1, 2, 10, 11, 12]
