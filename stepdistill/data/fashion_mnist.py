"""Fashion-MNIST (Xiao et al. 2017, MIT licence), read from its four idx.gz files, padded to 32x32."""

import gzip
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

COUNT = 60_000
"""Training images."""

# MD5 of the decompressed files: packagers re-compress them, so the .gz differ.
_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
_SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def find_folder(folder: str | Path | None = None) -> Path:
    """The folder with the idx files: ``folder``, $STEPDISTILL_FASHION_MNIST, or the Debian package's.

    Raises:
        FileNotFoundError: none of them holds the training images; the message says how to get them.
    """
    candidates = [folder, os.environ.get("STEPDISTILL_FASHION_MNIST"), _SYSTEM_FOLDER]
    for candidate in candidates:
        if candidate and any(Path(candidate).glob("train-images-idx3-ubyte*")):
            return Path(candidate)
    tried = ", ".join(str(c) for c in candidates if c)
    raise FileNotFoundError(
        f"Fashion-MNIST not found (looked in {tried}); install it with "
        "'apt-get install dataset-fashion-mnist' or set STEPDISTILL_FASHION_MNIST to the folder "
        "that holds train-images-idx3-ubyte.gz and its three siblings"
    )


def _read_idx(folder: Path, name: str) -> np.ndarray:
    packed, plain = folder / f"{name}.gz", folder / name
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    if (md5 := hashlib.md5(raw).hexdigest()) != _MD5[name]:
        raise ValueError(f"{folder / name}: MD5 of the decompressed file is {md5}, expected {_MD5[name]}")
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dims)


def load(split: str, folder: str | Path | None = None) -> "tuple[Tensor, Tensor]":
    """One split as ``(images, labels)``: uint8 (N, 1, 32, 32), zero-padded from 28x28, and int64 (N,).

    Args:
        split: "train" (60,000) or "test" (10,000); both hold the ten classes in equal numbers.
        folder: where the idx files are; see :func:`find_folder`.
    """
    import torch  # it takes seconds, and `stepdistill doctor` only asks for the folder

    prefix = {"train": "train", "test": "t10k"}[split]
    folder = find_folder(folder)
    images = torch.from_numpy(_read_idx(folder, f"{prefix}-images-idx3-ubyte").copy())
    labels = torch.from_numpy(_read_idx(folder, f"{prefix}-labels-idx1-ubyte").copy()).long()
    return torch.nn.functional.pad(images, (2, 2, 2, 2))[:, None], labels
