"""webdataset shards: .tar files in which neighbours of one name, but for the ending, are a sample.

Read member by member, never unpacked. A member that is no plain file, or whose name leads out of the archive, is
refused.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from stepdistill.data.sample import SUFFIXES, Sample, decoded, first_key, json_sample
from stepdistill.errors import InputError

TEXTS = ("txt", "caption")
LARGEST = 2**28
"""Bytes; what is larger is no picture and no caption."""


def read(files: Sequence[Path], caption_key: str | None, image_key: str | None) -> Iterator[Sample]:
    """The samples of all shards in order; an image can be opened until the next sample is asked for.

    Args:
        caption_key: an ending, such as txt, or a key of the .json members. image_key: an ending, such as jpg.

    Raises:
        InputError: a shard is no .tar file, or is cut short.
    """
    for file in files:
        try:
            with tarfile.open(file) as archive:
                members = (member for member in archive if not member.isdir())
                for key, group in groupby(members, _key):
                    yield from _samples(f"{file}:{key}", archive, list(group), caption_key, image_key)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise InputError(f"{file}: not a whole .tar file ({error})") from None


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _samples(
    name: str,
    archive: tarfile.TarFile,
    members: list[tarfile.TarInfo],
    caption_key: str | None,
    image_key: str | None,
) -> Iterator[Sample]:
    files: dict[str, tarfile.TarInfo] = {}
    for member in members:
        if problem := _refused(member):
            yield Sample(f"{name} {member.name!r}", problem=problem)
        else:
            files[member.name.rpartition("/")[2].partition(".")[2].lower()] = member
    picture = first_key(image_key, [suffix.removeprefix(".") for suffix in sorted(SUFFIXES)], files)
    text = first_key(caption_key, TEXTS, files)
    image = partial(_opened, archive, files[picture]) if picture else None

    def other(key: str) -> BinaryIO:
        return _opened(archive, files[key.lower()])

    if text:
        caption, problem = decoded(archive.extractfile(files[text]).read())
        yield Sample(name, caption, image, problem, other)
    elif "json" in files:
        entry = json_sample(archive.extractfile(files["json"]).read(), name, caption_key)
        yield Sample(name, entry.caption, image, entry.problem, other)
    elif "cls" in files and caption_key is None:  # a class number
        yield Sample(name, *decoded(archive.extractfile(files["cls"]).read())[:1], image, other=other)
    elif files:
        yield Sample(name, problem=f"no caption beside {', '.join(sorted(files))}")


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    try:
        return io.BytesIO(archive.extractfile(member).read())
    except tarfile.TarError as error:
        raise OSError(str(error)) from None


def _refused(member: tarfile.TarInfo) -> str:
    """Why a member is left alone; nothing for a file inside the archive."""
    path = PurePosixPath(member.name.replace("\\", "/"))
    if not member.isreg():
        return "refused: no plain file but a link or device"
    if path.is_absolute() or ".." in path.parts:
        return "refused: a name that leads out of the archive"
    return "refused: larger than 256 MiB" if member.size > LARGEST else ""
