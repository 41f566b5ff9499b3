"""Where a source's files are: on this machine, or at a URL that fsspec opens (s3://, gs://, hf://, https://, ...)."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from stepdistill.errors import InputError, in_a_line
from stepdistill.progress import say

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SPLITS = {"train", "training"}, {"test", "testing", "val", "valid", "validation", "eval", "dev"}


def is_url(place: str) -> bool:
    """Whether fsspec is to open a place."""
    return _URL.match(place) is not None


def opened(place: str | Path) -> BinaryIO:
    """A file, open for reading.

    Raises:
        OSError: it cannot be opened; also where the package is missing that opens such URLs.
    """
    if not is_url(str(place)):
        return open(place, "rb")
    try:
        return fsspec.open(str(place), "rb").open()
    except (ImportError, ValueError) as error:
        raise OSError(f"{place}: {error}") from None


def inside(folder: str | Path, name: str) -> str:
    """The place of a file that is named relative to a folder; a URL or an absolute path as it is."""
    if is_url(name):
        return name
    return f"{str(folder).rstrip('/')}/{name}" if is_url(str(folder)) else str(Path(folder) / name)


def parent(place: str) -> str:
    """The folder that a file is in."""
    return place.rpartition("/")[0] if is_url(place) else str(Path(place).parent)


def ending(place: str) -> str:
    """The ending of a place's name in lower case: ".tar", of compressed shards ".tar.gz"; "" for none."""
    name = place.partition("?")[0] if is_url(place) else place
    name = name.rpartition("/")[2].lower()
    return ".tar.gz" if name.endswith((".tar.gz", ".tgz")) else Path(name).suffix


def listing(folder: str) -> list[str]:
    """The files in a folder and its subfolders by their names relative to it, in order; hidden ones are left out.

    Raises:
        InputError: a URL that cannot be listed.
    """
    if is_url(folder):
        files, root = _filesystem(folder)
        try:
            names = [name[len(root) :].lstrip("/") for name in files.find(root)]
        except (OSError, NotImplementedError, ValueError) as error:
            raise InputError(f"{folder}: cannot be listed: {in_a_line(error)}") from None
    else:
        names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
    kept = [name for name in names if name and not any(part.startswith(".") for part in name.split("/"))]
    return sorted(kept, key=lambda name: name.split("/"))


def matching(source: str) -> list[str]:
    """The places that a name with {000..012}, {a,b} or * stands for, in order.

    Raises:
        InputError: a URL that cannot be listed.
    """
    places: list[str] = []
    for one in _without_braces(source):
        if "*" not in one:
            places.append(one)
        elif is_url(one):
            files, root = _filesystem(one)
            places += sorted(files.unstrip_protocol(name) for name in files.glob(root))
        else:
            places += sorted(glob.glob(one, recursive=True))
    return places


def is_pattern(source: str) -> bool:
    """Whether a name stands for several places."""
    return ("*" in source or "{" in source) and not Path(source).exists()


def of_train(folder: str, names: Sequence[str]) -> list[str]:
    """Of files that are named after splits (train-0.parquet, test/0.tar) those of the split for training."""
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in names}
    trained, others = ([name for name, held in words.items() if held & split] for split in _SPLITS)
    if not trained or not others:
        return list(names)
    say(f"{folder}: {len(trained)} files of the split train are read, {len(names) - len(trained)} others are not")
    return trained


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: cannot be opened: {in_a_line(error)}") from None


def _without_braces(source: str) -> list[str]:
    """Names for the braces in a name: {000..012} is each number, with its zeros, {a,b} each word."""
    found = re.search(r"\{([^{}]*)\}", source)
    if found is None:
        return [source]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = numbers.groups()
        words = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        words = found[1].split(",")
    return [name for word in words for name in _without_braces(source[: found.start()] + word + source[found.end() :])]
