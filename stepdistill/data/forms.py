"""Captions, with or without their images, from wherever people keep them; one sample at a time, nothing decoded.

folder of images      picture.png with picture.txt or .caption beside it, or in a subfolder named after its class
file.jsonl            an object a line; a folder's metadata.jsonl is read so, too
folder of shards      webdataset's .tar files, or one of them
Hugging Face dataset  a folder of save_to_disk, .parquet or .arrow files, or hub:OWNER/NAME[:SPLIT], streamed
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

from stepdistill.data import folder, hugging_face, shards
from stepdistill.data.sample import Sample, json_sample

Form = Literal["text", "folder", "jsonl", "shards", "dataset", "hub"]


def form(source: str) -> Form | None:
    """What kind of source a recipe names; None for what is none, or is not there."""
    if re.fullmatch(r"hub:[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", source):
        return "hub"
    path = Path(source)
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return "dataset"
        if (path / "metadata.jsonl").is_file():
            return "jsonl"
        inside = {file.suffix for file in path.iterdir()}
        return "shards" if ".tar" in inside else "dataset" if inside & {".parquet", ".arrow"} else "folder"
    if not path.is_file():
        return None
    known: dict[str, Form] = {"": "text", ".txt": "text", ".jsonl": "jsonl", ".tar": "shards"}
    return {**known, ".parquet": "dataset", ".arrow": "dataset"}.get(path.suffix)


def samples(source: str, caption_key: str | None, image_key: str | None, limit: int | None) -> Iterator[Sample]:
    """The samples of ``source`` in their own order, the first ``limit`` of them.

    Args:
        caption_key, image_key: columns of a dataset, keys of JSON objects or endings of a shard's files; None: the
            first of the usual names that is there.

    Raises:
        InputError: the source as a whole cannot be read.
    """
    path = Path(source)
    match form(source):
        case "jsonl":
            found = _lines(path / "metadata.jsonl" if path.is_dir() else path, caption_key, image_key)
        case "shards":
            found = shards.read(sorted(path.glob("*.tar")) if path.is_dir() else [path], caption_key, image_key)
        case "dataset" | "hub":
            found = hugging_face.read(source, caption_key, image_key)
        case _:
            found = folder.read(path, caption_key)
    return islice(found, limit)


def count(source: str, limit: int | None) -> int:
    """How many samples ``samples`` will give; of a hub's dataset ``limit``, as nothing is downloaded."""
    if form(source) == "hub":
        return limit or 0
    return sum(1 for _ in samples(source, None, None, limit))


def _lines(file: Path, caption_key: str | None, image_key: str | None) -> Iterator[Sample]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield json_sample(line, f"{file}:{number}", caption_key, image_key, file.parent)
