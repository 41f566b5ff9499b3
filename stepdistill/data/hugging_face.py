"""Datasets of Hugging Face's ``datasets`` package: saved folders, parquet and arrow files, and those of the hub."""

import importlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from stepdistill.data.sample import CAPTION_KEYS, IMAGE_KEYS, Sample, first_key, in_memory, text_of
from stepdistill.errors import InputError

OLDEST = 4
"""The first version of the package that runs no code from the hub."""
LABEL_KEYS = ("label", "labels", "fine_label")


def read(source: str, caption_key: str | None, image_key: str | None) -> Iterator[Sample]:
    """The samples of a dataset, streamed; class labels by their names.

    Args:
        source: see :mod:`stepdistill.data.forms`; of several splits "train". caption_key, image_key: columns.

    Raises:
        InputError: the package is missing or too old, or there is no such dataset, split or column.
    """
    library = _library(source)
    try:
        dataset = _opened(library, source)
        features = dataset.features or {}
        for number, row in enumerate(dataset.decode(False)):
            if number == 0:
                key = first_key(caption_key, (*CAPTION_KEYS, *LABEL_KEYS), row)
                picture = first_key(image_key, IMAGE_KEYS, row)
                if key is None or (image_key and picture is None):
                    wanted = (image_key if key else caption_key) or " or ".join(CAPTION_KEYS)
                    raise InputError(f"{source}: expected a column {wanted}, found {', '.join(row)}")
                named = getattr(features.get(key), "int2str", None)
            value = row[key]
            caption, problem = text_of(named(value) if named and value is not None else value, key)
            image = _file(row[picture]) if picture else None
            yield Sample(f"{source}, row {number}", caption, image, problem, partial(_other, row))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, library.exceptions.DatasetsError) as error:
        raise InputError(f"{source}: not a dataset that can be read: {' '.join(str(error).split())}") from None


def _library(source: str) -> Any:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(f"{source}: needs the datasets package (pip install -e '.[data]'): {error}") from None
    if int(library.__version__.partition(".")[0]) < OLDEST:
        raise InputError(f"{source}: needs datasets {OLDEST} or newer, found {library.__version__}")
    return library


def _opened(library: Any, source: str) -> Any:
    """The dataset as one that streams."""
    if source.startswith("hub:"):
        _, name, *split = source.split(":")
        return library.load_dataset(name, split=split[0] if split else "train", streaming=True)
    path = Path(source)
    if (path / "state.json").is_file():
        return library.load_from_disk(str(path)).to_iterable_dataset()
    if (path / "dataset_dict.json").is_file():
        splits = library.load_from_disk(str(path))
        if "train" not in splits:
            raise InputError(f"{source}: expected a split train, found {', '.join(splits)}; name one's folder")
        return splits["train"].to_iterable_dataset()
    files = [path] if path.is_file() else sorted([*path.glob("*.parquet"), *path.glob("*.arrow")])
    kinds = {file.suffix.removeprefix(".") for file in files}
    if len(kinds) > 1:
        raise InputError(f"{source}: expected .parquet or .arrow files, found both")
    return library.load_dataset(kinds.pop(), data_files=[str(file) for file in files], split="train", streaming=True)


def _file(value: Any) -> Any:
    """Opens what an undecoded image column holds: its bytes, or else where they are."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return in_memory(value["bytes"])
        value = value.get("path")
    return partial(_open, value) if isinstance(value, str) else None


def _other(row: dict[str, Any], key: str) -> Any:
    opens = _file(row[key])
    if opens is None:
        raise OSError(f"column {key} holds no picture")
    return opens()


def _open(place: str) -> Any:
    return fsspec.open(place, "rb").open()
