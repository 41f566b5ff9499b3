"""Captions, with or without their images, from wherever people keep them; one sample at a time, nothing decoded.

folder of images      picture.png with picture.txt or .caption beside it, or in a subfolder named after its class
file.txt              prompts alone, one a line (:mod:`stepdistill.data.lines`)
file.jsonl, file.csv  an object or a row a sample; a folder's metadata.jsonl or metadata.csv is read so, too
folder of shards      webdataset's .tar files, or one of them, read member by member and never unpacked
Hugging Face dataset  a folder of save_to_disk, .parquet or .arrow files, or hub:OWNER/NAME[:SPLIT], streamed

Each of them may be at a URL that fsspec opens, and files may be named by a pattern ({000..012}.tar, data/*.parquet).
An unusable sample comes with its problem and reading continues; the builders of ``datasets`` for folders, JSON
and shards end at the first one, so that package reads its own formats only.
"""

import csv
import importlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from stepdistill.data import folders
from stepdistill.data.places import ending, inside, is_pattern, is_url, listing, matching, of_train, opened, parent
from stepdistill.data.sample import (
    CAPTION_KEYS,
    IMAGE_KEYS,
    KINDS,
    Sample,
    decoded,
    entry_sample,
    first_key,
    in_memory,
    json_sample,
    text_of,
)
from stepdistill.errors import InputError, in_a_line

Form = Literal["text", "folder", "jsonl", "csv", "shards", "dataset", "hub"]

FORMS: dict[str, Form] = {
    **{".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv", ".tar": "shards", ".tar.gz": "shards"},
    **{".parquet": "dataset", ".arrow": "dataset", ".txt": "text"},
}
"""What a file's ending says."""
TABLES = ("metadata.jsonl", "metadata.csv")
"""Files that say of a folder's pictures what they are, the first that is there."""
SAVED = ("state.json", "dataset_dict.json")
"""Files of a dataset's save_to_disk."""
TEXTS = ("txt", "caption")
"""Endings of a shard's captions."""
LARGEST = 2**28
"""Bytes of a shard's member; what is larger is no picture and no caption."""
OLDEST = 4
"""The first version of ``datasets`` that runs no code from the hub."""
LABEL_KEYS = ("label", "labels", "fine_label")


def form(source: str) -> Form | None:
    """What kind of source a recipe names; None for what is none, or is not there.

    Raises:
        InputError: a URL that cannot be opened, or files of several kinds.
    """
    if re.fullmatch(r"hub:[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", source):
        return "hub"
    if is_pattern(source):
        kinds = {FORMS.get(ending(place)) for place in matching(source)}
        if len(kinds) > 1:
            raise InputError(f"{source}: expected files of one kind, {', '.join(FORMS)}, found several")
        return kinds.pop() if kinds else None
    if is_url(source):
        names = [] if ending(source) in FORMS else listing(source)
        sampled = any(folders.is_sample(PurePosixPath(name)) for name in names)
        return FORMS.get(ending(source)) or _form_of_folder(names) or ("folder" if sampled else None)
    if Path(source).is_dir():
        top = [path.name for path in Path(source).iterdir() if path.is_file()]
        # A clone of a dataset keeps its files further down; the first that is known says what they are.
        inner = (path.relative_to(source).as_posix() for path in Path(source).rglob("*") if path.is_file())
        return _form_of_folder(top) or _form_of_folder(islice(inner, 1000)) or "folder"
    if not Path(source).is_file():
        return None
    return FORMS.get(ending(source) or ".txt")


def _form_of_folder(names: Iterable[str]) -> Form | None:
    """What the files in a folder make it; the names of those in its subfolders have slashes."""
    names = list(names)
    top = [name for name in names if "/" not in name]
    if any(name in SAVED for name in top):
        return "dataset"
    if table := next((name for name in TABLES if name in top), None):
        return FORMS[ending(table)]
    pictured = any(folders.is_picture(PurePosixPath(name)) for name in names)
    for held in (top, [] if pictured else names):
        kinds = {FORMS.get(ending(name)) for name in held}
        if found := next((kind for kind in ("shards", "dataset") if kind in kinds), None):
            return found
    return "folder" if pictured else None


def samples(source: str, caption_key: str | None, image_key: str | None, limit: int | None) -> Iterator[Sample]:
    """The samples of ``source`` in their own order, the first ``limit`` of them.

    Args:
        caption_key: a column of a dataset, a key of JSON objects or an ending of a shard's files; None: the first of
            the usual names that is there.
        image_key: likewise.

    Raises:
        InputError: the source as a whole cannot be read.
    """
    match form(source):
        case "jsonl" | "csv" as kind:
            read = {"jsonl": _lines, "csv": _table}[kind]
            stream = chain.from_iterable(read(file, caption_key, image_key) for file in _files(source, kind))
        case "shards":
            stream = _shards(_files(source, "shards"), caption_key, image_key)
        case "dataset" | "hub":
            stream = _rows(source, caption_key, image_key)
        case _:
            stream = folders.pictures(source, caption_key, image_key)
    return islice(stream, limit)


def count(source: str, limit: int | None, image_key: str | None = None) -> int:
    """How many samples ``samples`` will give, from a listing or from what files state of themselves where they do.

    Of a hub's dataset ``limit``, as nothing is downloaded.
    """
    kind = form(source)
    if kind == "hub":
        return limit or 0
    if kind == "folder":
        number = folders.count(source, image_key)
    elif kind == "dataset" and (stated := _stated(source)) is not None:
        number = stated
    else:
        return sum(1 for _ in samples(source, None, None, limit))
    return number if limit is None else min(number, limit)


def _files(source: str, kind: Form) -> list[str]:
    """A source's files: itself, those of a pattern, or those in a folder, or else in its subfolders."""
    if is_pattern(source):
        return matching(source)
    if not (Path(source).is_dir() or (is_url(source) and ending(source) not in FORMS)):
        return [source]
    names = listing(source)
    if table := next((name for name in TABLES if name in names and FORMS[ending(name)] == kind), None):
        return [inside(source, table)]
    fitting = [name for name in names if FORMS.get(ending(name)) == kind]
    top = [name for name in fitting if "/" not in name]
    return [inside(source, name) for name in of_train(source, top or fitting)]


def _lines(file: str, caption_key: str | None, image_key: str | None) -> Iterator[Sample]:
    with _source_file(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield json_sample(line, f"{file}:{number}", caption_key, image_key, parent(file))


def _table(file: str, caption_key: str | None, image_key: str | None) -> Iterator[Sample]:
    """The rows of a table whose first row names the columns; paths of images are relative to the file."""
    delimiter = "\t" if ending(file) == ".tsv" else ","
    with _source_file(file) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, delimiter=delimiter)
        try:
            for row in rows:
                name = f"{file}:{rows.line_num}"
                if None in row or None in row.values():
                    columns = len(rows.fieldnames or ())
                    yield Sample(name, problem=f"another number of columns than the {columns} of the first row")
                else:
                    yield entry_sample(row, name, caption_key, image_key, parent(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{file}:{rows.line_num + 1}: cannot be read as a table in UTF-8: {error}") from None


def _source_file(file: str) -> BinaryIO:
    """A source's own file, open.

    Raises:
        InputError: it cannot be opened.
    """
    try:
        return opened(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be opened: {in_a_line(error)}") from None


def _shards(files: Sequence[str], caption_key: str | None, image_key: str | None) -> Iterator[Sample]:
    """The samples of all shards in order; an image can be opened until the next sample is read.

    Args:
        caption_key: an ending, such as txt, or a key of the .json members.
        image_key: an ending, such as jpg.

    Raises:
        InputError: a shard is no .tar file, or is cut short.
    """
    for file in files:
        try:
            with _source_file(file) as content, tarfile.open(fileobj=content) as archive:
                members = (member for member in archive if not member.isdir())
                for key, group in groupby(members, _stem):
                    yield from _grouped(f"{file}:{key}", archive, list(group), caption_key, image_key)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise InputError(f"{file}: not a whole .tar file ({error})") from None


def _stem(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _grouped(
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
    endings = [suffix.removeprefix(".") for kind in KINDS for suffix in sorted(kind)]
    picture = first_key(image_key, endings, files)
    text = first_key(caption_key, TEXTS, files)
    image = partial(_member, archive, files[picture]) if picture else None

    def other(key: str) -> BinaryIO:
        return _member(archive, files[key.lower()])

    if text:
        caption, problem = decoded(_member(archive, files[text]).read())
        yield Sample(name, caption, image, problem, other)
    elif "json" in files:
        entry = json_sample(_member(archive, files["json"]).read(), name, caption_key)
        yield Sample(name, entry.caption, image, entry.problem, other)
    elif "cls" in files and caption_key is None:  # a class number
        yield Sample(name, *decoded(_member(archive, files["cls"]).read())[:1], image, other=other)
    elif files:
        yield Sample(name, problem=f"no caption beside {', '.join(sorted(files))}")


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    try:
        file = archive.extractfile(member)
        if file is None:
            raise OSError(f"{member.name} is no file")
        return io.BytesIO(file.read())
    except tarfile.TarError as error:
        raise OSError(str(error)) from None


def _refused(member: tarfile.TarInfo) -> str:
    """Why a member is left alone; nothing for a file inside the archive."""
    path = PurePosixPath(member.name.replace("\\", "/"))
    if not member.isreg():
        return "refused: no plain file but a link or device"
    if path.is_absolute() or ".." in path.parts:
        return "refused: a name that leads out of the archive"
    whole = any(path.suffix.lower() in kind for kind in KINDS[1:])  # videos, sounds and latents
    return "refused: larger than 256 MiB" if member.size > LARGEST and not whole else ""


def _rows(source: str, caption_key: str | None, image_key: str | None) -> Iterator[Sample]:
    """The samples of a dataset, streamed; class labels by their names.

    Args:
        source: files, a folder, or hub:OWNER/NAME[:SPLIT]; of several splits "train".
        caption_key: the captions' column.
        image_key: the images' column.

    Raises:
        InputError: the package is missing or too old, or there is no such dataset, split or column.
    """
    library = dataset_library(source)
    try:
        dataset = _opened(library, source)
        features = dataset.features or {}
        for number, row in enumerate(dataset.decode(False)):
            if number == 0:
                key = first_key(caption_key, (*CAPTION_KEYS, *LABEL_KEYS), row)
                picture = first_key(image_key, IMAGE_KEYS, row)
                if key is None or (image_key and picture is None):
                    expected = (image_key if key else caption_key) or " or ".join(CAPTION_KEYS)
                    raise InputError(f"{source}: expected a column {expected}, found {', '.join(row)}")
                named = getattr(features.get(key), "int2str", None)
            value = row[key]
            caption, problem = text_of(named(value) if named and value is not None else value, key)
            image = _file(row[picture]) if picture else None
            yield Sample(f"{source}, row {number}", caption, image, problem, partial(_column, row))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, library.exceptions.DatasetsError) as error:
        raise InputError(f"{source}: not a dataset that can be read: {in_a_line(error)}") from None


def dataset_library(source: str) -> Any:
    """The package ``datasets``.

    Raises:
        InputError: it is missing or too old.
    """
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
    if (saved := _saved(library, source)) is not None:
        return saved.to_iterable_dataset()
    files = _files(source, "dataset")
    kinds = {ending(file).removeprefix(".") for file in files}
    if len(kinds) > 1:
        raise InputError(f"{source}: expected .parquet or .arrow files, found both")
    return library.load_dataset(kinds.pop(), data_files=files, split="train", streaming=True)


def _saved(library: Any, source: str) -> Any:
    """A dataset that save_to_disk wrote, of several splits "train"; None for any other source."""
    if is_pattern(source) or ending(source) in FORMS:
        return None
    held = {name for name in SAVED if name in listing(source)} if is_url(source) else None
    if not any(name in held if held is not None else (Path(source) / name).is_file() for name in SAVED):
        return None
    dataset = library.load_from_disk(source)
    if hasattr(dataset, "to_iterable_dataset"):
        return dataset
    if "train" not in dataset:
        raise InputError(f"{source}: expected a split train, found {', '.join(dataset)}; name one's folder")
    return dataset["train"]


def _stated(source: str) -> int | None:
    """How many rows a dataset's files say that they have; None where they do not say."""
    library = dataset_library(source)
    try:
        if (saved := _saved(library, source)) is not None:
            return len(saved)
        files = _files(source, "dataset")
        if any(ending(file) != ".parquet" for file in files):
            return None
        parquet, rows = importlib.import_module("pyarrow.parquet"), 0
        for file in files:
            with _source_file(file) as content:
                rows += parquet.read_metadata(content).num_rows
        return rows
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, library.exceptions.DatasetsError) as error:
        raise InputError(f"{source}: not a dataset that can be read: {in_a_line(error)}") from None


def _file(value: Any) -> Any:
    """Opens what an undecoded image column holds: its bytes, or else where they are."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return in_memory(value["bytes"])
        value = value.get("path")
    if isinstance(value, bytes):
        return in_memory(value)
    return partial(opened, value) if isinstance(value, str) else None


def _column(row: dict[str, Any], key: str) -> Any:
    opens = _file(row[key])
    if opens is None:
        raise OSError(f"column {key} holds no picture")
    return opens()
