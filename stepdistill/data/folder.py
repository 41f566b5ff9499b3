"""A folder of pictures with their captions in files beside them, or in the names of subfolders."""

import mimetypes
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from stepdistill.data.sample import SUFFIXES, Sample, decoded, json_sample

CAPTIONS = (".txt", ".caption", ".json")
"""Endings of caption files, the first that is there counts: kohya's trainers write .caption."""
FROM_FOLDERS = "captions come from folder names"
FROM_APART = "captions come from another folder's files"
NO_REPEATS = "repeats in folder names are not applied, every picture counts once"

_REPEATS = re.compile(r"([1-9]\d*)_(.+)")
# Pictures for people, which mimetypes does not know everywhere.
_UNREAD = {".heic", ".heif", ".jxl", ".avifs", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw", ".exr", ".hdr"}


def read(folder: Path, caption_key: str | None = None) -> Iterator[Sample]:
    """The pictures of a folder and its subfolders, by name; those that cannot be read with their problem.

    A caption is in a file beside its picture, or under the same name in a folder of captions alone (images/a/0.png and
    captions/a/0.txt). In a subfolder without caption files the folder's name is the caption of every picture, without
    the number of repeats that kohya's trainers want in front (10_mydog).

    Args:
        caption_key: a further ending of caption files, or the key of a .json; None: the usual ones.
    """
    files = [path for path in sorted(folder.rglob("*")) if not _hidden(path.relative_to(folder)) and path.is_file()]
    pictures = [path for path in files if _is_picture(path)]
    beside, apart = _caption_files(files, folder, {path.relative_to(folder).parts[0] for path in pictures}, caption_key)
    found = {path: beside.get(path.with_suffix("")) or apart.get(_below(path, folder)) for path in pictures}
    captioned = {path.parent for path in (*beside, *(path for path in pictures if found[path]))}
    for path, text in found.items():
        notes = {NO_REPEATS: path.parent.name} if _REPEATS.fullmatch(path.parent.name) else {}
        if path.suffix.lower() not in SUFFIXES:
            caption, problem = None, f"a kind of picture that is not read: {path.suffix}"
        elif text:
            caption, problem = _caption(text, caption_key)
            notes |= {FROM_APART: text.relative_to(folder).parts[0]} if text.parent != path.parent else {}
        elif path.parent in captioned and path.parent != folder:
            caption, problem = None, "no caption file of its name, though its folder has caption files"
        elif path.parent != folder:
            caption, problem = _REPEATS.sub(r"\2", path.parent.name), ""
            notes = {FROM_FOLDERS: path.parent.name} | notes
        else:
            caption, problem = None, "no caption, neither a .txt, .caption or .json beside it nor a subfolder's name"
        yield Sample(str(path), caption, partial(open, path, "rb"), problem, notes=notes)


def _hidden(path: Path) -> bool:
    """Whether a path is one of those that programs leave behind, such as .ipynb_checkpoints/ or ._0.png."""
    return any(part.startswith(".") for part in path.parts)


def _is_picture(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in SUFFIXES | _UNREAD or (mimetypes.guess_type(path.name)[0] or "").startswith("image/")


def _below(path: Path, folder: Path) -> tuple[str, ...]:
    """A file's place below the first folder inside ``folder``, without its ending."""
    parts = path.relative_to(folder).with_suffix("").parts
    return parts[1:] or parts


def _caption_files(
    files: list[Path], folder: Path, pictured: set[str], caption_key: str | None
) -> tuple[dict[Path, Path], dict[tuple[str, ...], Path]]:
    """Caption files by what they lie beside, without ending; those in folders of captions alone by :func:`_below`.

    Args:
        pictured: names inside ``folder`` under which there are pictures.
    """
    beside: dict[Path, Path] = {}
    apart: dict[tuple[str, ...], Path] = {}
    for ending in (f".{caption_key}", *CAPTIONS) if caption_key else CAPTIONS:
        for path in files:
            if path.suffix.lower() != ending or (ending == ".json" and not _has_caption(path, caption_key)):
                continue
            beside.setdefault(path.with_suffix(""), path)
            if path.parent != folder and path.relative_to(folder).parts[0] not in pictured:
                apart.setdefault(_below(path, folder), path)
    return beside, apart


def _has_caption(file: Path, caption_key: str | None) -> bool:
    """Whether a .json holds a caption: other programs keep other facts in such files."""
    return not json_sample(file.read_bytes(), file.name, caption_key).problem


def _caption(file: Path, caption_key: str | None) -> tuple[str | None, str]:
    """(a caption, what is wrong with it) of a caption file."""
    if file.suffix.lower() != ".json":
        return decoded(file.read_bytes())
    entry = json_sample(file.read_bytes(), file.name, caption_key)
    return entry.caption, entry.problem
