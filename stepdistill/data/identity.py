"""Which files a source has, without reading them: what has been encoded of it is good for as long as they stay."""

import csv
import json
import os
import stat
from pathlib import Path

import fsspec

from stepdistill.data.places import ending, inside, is_pattern, is_url, listing, matching, parent
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
    root = folder or parent(source)
    facts = dict(_facts(place, root) for place in places)
    for table in (place for place in places if named and FORMS.get(ending(place)) in ("jsonl", "csv")):
        if not is_url(table):  # what a URL names is at a URL
            facts |= _named(table, root)
    return digest(sorted(facts.items()))


def _facts(place: str, root: str) -> tuple[str, str]:
    """A file's name in the source, and what its system says of it."""
    if is_url(place):
        system, path = fsspec.core.url_to_fs(place)
        known = system.info(path)
        return place, repr([(key, known[key]) for key in sorted(known) if key.lower() in ("size", "etag", "mtime")])
    return os.path.relpath(place, root), _stated(os.stat(place))


def _stated(known: os.stat_result) -> str:
    return f"{known.st_size} {known.st_mtime_ns}"


def _named(table: str, root: str) -> dict[str, str]:
    """The facts of the files on this machine that a table's values name, of which there may be millions."""
    folder, found = str(Path(table).parent), {}
    inner, kind = os.path.relpath(folder, root), ending(table)
    with open(table, "rb") as file:
        for line in file:
            for value in _values(line, kind):
                place = os.path.normpath(os.path.join(folder, value))
                try:
                    known = os.stat(place)
                except (OSError, ValueError):  # a caption is no name, nor is a URL
                    continue
                if value and stat.S_ISREG(known.st_mode):
                    name = os.path.relpath(place, root) if os.path.isabs(value) else os.path.join(inner, value)
                    found[os.path.normpath(name)] = _stated(known)
    return found


def _values(line: bytes, kind: str) -> list[str]:
    """The texts in a line; none in one that cannot be read."""
    try:
        if kind == ".jsonl":
            entry = json.loads(line)
            return [value for value in entry.values() if isinstance(value, str)] if isinstance(entry, dict) else []
        return next(csv.reader([line.decode("utf-8-sig")], delimiter="\t" if kind == ".tsv" else ","), [])
    except (ValueError, RecursionError, csv.Error):
        return []
