"""Real images: folders of pictures, and Fashion-MNIST where it is installed."""

import gzip

import numpy as np
import pytest
from PIL import Image

from data.loaded import loaded
from stepdistill.data import fashion_mnist
from stepdistill.errors import InputError
from stepdistill.recipe import Data


def test_a_folder_names_its_conditions_by_caption_or_subfolder(tmp_path):
    for name, size in (("cat", (20, 30)), ("dog", (16, 16))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / name / "1.png")
    (tmp_path / "dog" / "1.txt").write_text("a red dog\n")
    pictures, conditions, _ = loaded(Data(images=str(tmp_path)), channels=3, size=16)
    assert conditions == ["cat", "a red dog"]
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures[:, 0].eq(255).all() and pictures[:, 1:].eq(0).all()


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=rf"expected images in {tmp_path}, found none"):
        loaded(Data(images=str(tmp_path)), 1, 16)


def write_idx(folder, name: str, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_refuses_other_content_and_pads(tmp_path, monkeypatch):
    pictures = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    write_idx(tmp_path, "train-images-idx3-ubyte", pictures)
    write_idx(tmp_path, "train-labels-idx1-ubyte", np.array([3, 9], dtype=np.uint8))
    with pytest.raises(ValueError, match="MD5"):
        fashion_mnist.load("train", tmp_path)
    monkeypatch.setattr(fashion_mnist.hashlib, "md5", lambda _: type("", (), {"hexdigest": lambda self: "x"})())
    monkeypatch.setattr(fashion_mnist, "_MD5", dict.fromkeys(fashion_mnist._MD5, "x"))
    loaded, labels = fashion_mnist.load("train", tmp_path)
    assert loaded.shape == (2, 1, 32, 32) and labels.tolist() == [3, 9]
    assert np.array_equal(loaded[:, 0, 2:30, 2:30].numpy(), pictures)
    assert loaded[:, :, :2].eq(0).all() and loaded[:, :, :, 30:].eq(0).all()


def test_a_missing_fashion_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_SYSTEM_FOLDER", tmp_path)
    monkeypatch.delenv("STEPDISTILL_FASHION_MNIST", raising=False)
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        loaded(Data(images="fashion-mnist"), 1, 32)
