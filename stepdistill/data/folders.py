"""Folders of pictures, videos or sounds with their captions, as trainers and people lay them out, here or at a URL."""

import mimetypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from math import gcd
from pathlib import PurePosixPath as Name

from stepdistill.data.places import inside, listing, opened
from stepdistill.data.sample import KINDS, SUFFIXES, Sample, decoded, json_sample

CAPTIONS = (".txt", ".caption", ".json")
"""Endings of caption files, the first that is there counts: kohya's trainers write .caption."""
FROM_FOLDERS = "captions come from folder names"
FROM_APART = "captions come from another folder's files"
REPEATED = "pictures are repeated as their folders' names say"

# Kohya's 10_mydog; four digits are a year.
_REPEATS = re.compile(r"^([1-9]\d{0,2})_(.+)$")
# Pictures for people, which mimetypes does not know everywhere.
_UNREAD = {".heic", ".heif", ".jxl", ".avifs", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw", ".exr", ".hdr"}


def pictures(folder: str, caption_key: str | None, image_key: str | None = None) -> Iterator[Sample]:
    """The pictures of a folder and its subfolders, by name; those that cannot be read with their problem. Of a folder
    without pictures the videos, else the sounds, else latents that were made ahead.

    A caption is in a file beside its picture, or under the same name in a folder of captions alone (images/a/0.png and
    captions/a/0.txt). In a subfolder without caption files the folder's name is the caption of every picture, without
    the number of repeats that kohya's trainers want in front (10_mydog).

    After all pictures once, those with more repeats come again, as often as the proportions of the numbers say: with
    10_a alone each comes once, with 10_a and 5_b those of the first twice.

    Args:
        caption_key: a further ending of caption files, or the key of a .json; None: the usual ones.
        image_key: the ending of the videos, sounds or latents, such as mp4; None: see above.
    """
    names = [Name(name) for name in listing(folder)]
    shown = _shown(names, image_key)
    samples = list(_once(folder, names, shown, caption_key))
    if samples and (others := sorted({name for name in names if is_sample(name)} - {*shown})):
        note = f"files of other kinds are left out (data.image_key: {others[0].suffix[1:]} takes those)"
        samples[0] = replace(samples[0], notes={**samples[0].notes, note: others[0].name})
    times = _times(shown)
    for again in range(max(times, default=0)):
        yield from (sample for sample, number in zip(samples, times, strict=True) if number > again)


def count(folder: str, image_key: str | None = None) -> int:
    """How many samples :func:`pictures` gives, from the names alone."""
    return sum(_times(_shown([Name(name) for name in listing(folder)], image_key)))


def is_sample(name: Name) -> bool:
    """Whether a file is a sample by its name, of whatever kind."""
    return is_picture(name) or any(name.suffix.lower() in kind for kind in KINDS)


def _shown(names: Sequence[Name], image_key: str | None) -> list[Name]:
    """The files that are samples: videos, sounds or latents with the ending ``image_key``, else those of one kind."""
    ending = f".{(image_key or '').lower().removeprefix('.')}"
    if any(ending in kind for kind in KINDS[1:]) and (chosen := [n for n in names if n.suffix.lower() == ending]):
        return chosen
    kinds = ([name for name in names if name.suffix.lower() in kind] for kind in KINDS[1:])
    return next(filter(None, ([name for name in names if is_picture(name)], *kinds)), [])


def is_picture(name: Name) -> bool:
    """Whether a file is a picture by its name, also one of a kind that is not read."""
    suffix = name.suffix.lower()
    return suffix in SUFFIXES | _UNREAD or (mimetypes.guess_type(name.name)[0] or "").startswith("image/")


def _once(folder: str, names: Sequence[Name], shown: Sequence[Name], caption_key: str | None) -> Iterator[Sample]:
    """A sample for each picture of ``shown``; ``names`` are all files."""
    beside, apart = _caption_files(folder, names, {name.parts[0] for name in shown}, caption_key)
    captions = {name: beside.get(name.with_suffix("")) or apart.get(_below(name)) for name in shown}
    captioned = {name.parent for name in (*beside, *(name for name in shown if captions[name]))}
    repeated = max(_times(shown), default=1) > 1
    for name, text in captions.items():
        place, own = inside(folder, str(name)), name.parent.name
        notes = {REPEATED: own} if repeated and _REPEATS.fullmatch(own) else {}
        if not any(name.suffix.lower() in kind for kind in KINDS):
            caption, problem = None, f"a kind of picture that is not read: {name.suffix}"
        elif text:
            caption, problem = _caption_in(inside(folder, str(text)), caption_key)
            notes |= {FROM_APART: text.parts[0]} if text.parent != name.parent else {}
        elif name.parent in captioned and own:
            caption, problem = None, "no caption file of its name, though its folder has caption files"
        elif own:
            caption, problem = _REPEATS.sub(r"\2", own), ""
            notes = {FROM_FOLDERS: own} | notes
        else:
            caption, problem = None, "no caption, neither a .txt, .caption or .json beside it nor a subfolder's name"
        yield Sample(place, caption, partial(opened, place), problem, notes=notes)


def _times(shown: Sequence[Name]) -> list[int]:
    """How often each picture comes: the repeats in its folder's name, divided by what all have in common."""
    found = [_REPEATS.fullmatch(name.parent.name) for name in shown]
    repeats = [int(match[1]) if match else 1 for match in found]
    common = reduce(gcd, repeats, 0) or 1
    return [number // common for number in repeats]


def _below(name: Name) -> tuple[str, ...]:
    """A file's place below the first folder in its name, without its ending."""
    parts = name.with_suffix("").parts
    return parts[1:] or parts


def _caption_files(
    folder: str, names: Sequence[Name], pictured: set[str], caption_key: str | None
) -> tuple[dict[Name, Name], dict[tuple[str, ...], Name]]:
    """Caption files by what they lie beside, without ending; those in folders of captions alone by :func:`_below`.

    Args:
        pictured: names inside ``folder`` under which there are pictures.
    """
    beside: dict[Name, Name] = {}
    apart: dict[tuple[str, ...], Name] = {}
    for suffix in (f".{caption_key}", *CAPTIONS) if caption_key else CAPTIONS:
        for name in names:
            if name.suffix.lower() != suffix:
                continue
            # Other programs keep other facts in such files.
            if suffix == ".json" and _caption_in(inside(folder, str(name)), caption_key)[1]:
                continue
            beside.setdefault(name.with_suffix(""), name)
            if len(name.parts) > 1 and name.parts[0] not in pictured:
                apart.setdefault(_below(name), name)
    return beside, apart


def _caption_in(place: str, caption_key: str | None) -> tuple[str | None, str]:
    """(a caption, what is wrong with it) of a caption file."""
    with opened(place) as file:
        content = file.read()
    if not place.lower().endswith(".json"):
        return decoded(content)
    entry = json_sample(content, place, caption_key)
    return entry.caption, entry.problem
