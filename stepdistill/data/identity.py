"""Which files a source has, without reading them: what has been encoded of it is good for as long as they stay."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec

from stepdistill.data.places import ending, inside, is_pattern, is_url, listing, matching, opened, parent
from stepdistill.data.sources import FORMS, dataset_library, form
from stepdistill.files import digest


def identity(source: str, named: bool = True) -> str:
    """A hash of the names, sizes and times of change of a source's files; of a data set on the hub of its builder.

    Files of an archive are part of the archive. Of a table (.jsonl, .csv) the files count that its values name; of URLs
    the names alone do.

    Args:
        named: whether the files that a table's values name count, which takes a look at each.
    """
    if form(source) == "hub":
        return digest(source, dataset_library(source).load_dataset_builder(source.split(":")[1]).hash)
    folder = source if Path(source).is_dir() or (is_url(source) and ending(source) not in FORMS) else None
    if is_pattern(source):
        places = matching(source)
    else:
        places = [source] if folder is None else [inside(folder, name) for name in listing(folder)]
    tables = [place for place in places if FORMS.get(ending(place)) in ("jsonl", "csv")] if named else []
    places += [place for table in tables for place in _named(table)]
    root = folder or parent(source)
    return digest(sorted(_facts(place, root) for place in dict.fromkeys(places)))


def _facts(place: str, root: str) -> tuple[str, str]:
    """A file's name in the source, and what its system says of it."""
    if is_url(place):
        system, path = fsspec.core.url_to_fs(place)
        known = system.info(path)
        return place, repr([(key, known[key]) for key in sorted(known) if key.lower() in ("size", "etag", "mtime")])
    stated = os.stat(place)
    return os.path.relpath(place, root), f"{stated.st_size} {stated.st_mtime_ns}"


def _named(table: str) -> Iterator[str]:
    """The files on this machine that a table's values name."""
    with opened(table) as file:
        for line in file:
            for value in _values(line, ending(table)):
                place = inside(parent(table), value)
                if not is_url(place) and _is_file(place):
                    yield place


def _values(line: bytes, kind: str) -> list[str]:
    """The texts in a line; none in one that cannot be read."""
    try:
        if kind == ".jsonl":
            entry = json.loads(line)
            return [value for value in entry.values() if isinstance(value, str)] if isinstance(entry, dict) else []
        return next(csv.reader([line.decode("utf-8-sig")], delimiter="\t" if kind == ".tsv" else ","), [])
    except (ValueError, RecursionError, csv.Error):
        return []


def _is_file(place: str) -> bool:
    try:
        return bool(place) and os.path.isfile(place)
    except (OSError, ValueError):  # a caption is no name
        return False
