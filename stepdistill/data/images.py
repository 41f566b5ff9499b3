"""What ``data.images`` and ``data.conditions`` stand for: Fashion-MNIST, a shipped list, or any source of samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from PIL import UnidentifiedImageError
from torch import Tensor

from stepdistill import assets
from stepdistill.data import clips, fashion_mnist, picture
from stepdistill.data.buckets import UNKNOWN, Bucket, Size, nearest
from stepdistill.data.clips import Short
from stepdistill.data.decoding import Medium, decoding
from stepdistill.data.identity import identity
from stepdistill.data.lines import Lines, lines_of
from stepdistill.data.places import is_pattern, is_url, matching
from stepdistill.data.sample import UNREADABLE, Data, Pictures, Sample, Tally
from stepdistill.data.sources import count, form, samples
from stepdistill.errors import InputError
from stepdistill.files import atomic, digest, read_json, write_json, write_text

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """A usable sample of ``data.images``.

    Args:
        name: where it is, for messages.
        image: uint8 (C, H, W), of a video (F, C, H, W); of a sound float32 (channels, length).
        condition: a class name or a caption.
        own: the pictures that ``data.arguments`` names.
        ready: ``image`` holds latents that were made ahead.
    """

    name: str
    image: Tensor
    condition: str
    own: Pictures
    ready: bool = False


def stream(
    data: Data,
    medium: Medium,
    tally: Tally,
    first: int = 0,
    last: int | None = None,
    bucket: Bucket | None = None,
) -> Iterator[Item | None]:
    """The samples ``first`` .. ``last`` of ``data.images``, each in its turn; None for one that cannot be used.

    Images become what ``medium`` says: the middle part with its proportions, and with them that of those pictures that
    have the same proportions as the image. ``tally`` counts what cannot be used. A ``bucket`` of this size may cut
    other parts, and None also stands for images of other buckets.
    """
    if data.images == "fashion-mnist":
        images, labels = _fashion_mnist(medium.shape)
        for number, (image, label) in enumerate(
            zip(images[first:last], labels[first:last].tolist(), strict=True), first
        ):
            tally.read += 1
            yield Item(f"image {number}", image, fashion_mnist.CLASS_NAMES[label], {})
        return
    found = enumerate(islice(_samples(data, "images"), first, last), first)
    own_bucket = bucket or Bucket((medium.size,), 0)
    pictures = decoding(found, medium, own_bucket, 0) if data.arguments else decoding(found, medium, own_bucket)
    for sample, own, notes, waiting in _usable(data, pictures, tally):
        if own is None:
            yield None
            continue
        if sample.image is None:
            tally.reject(sample, f"no {medium.name}")
            yield None
            continue
        try:
            cut = waiting()
        except InputError:  # a package is missing, which is no fault of the file
            raise
        except Short as error:
            tally.reject(sample, str(error))
            yield None
            continue
        except UNREADABLE as error:
            tally.reject(sample, f"unreadable {medium.name}: {error}")
            yield None
            continue
        if cut is None:
            yield None
            continue
        tally.note(sample, *dict.fromkeys([*cut.notes, *notes]))
        parts = {name: picture.middle(one, cut.whole, medium.size) for name, one in own.items()}
        yield Item(sample.name, cut.image, sample.caption or "", parts, cut.ready)


def bucket_numbers(
    data: Data, sizes: Sequence[Size], cache: Path | None = None, source: str | None = None
) -> list[int]:
    """Of each of the images of ``data.images`` the number of the size that is nearest in proportions; else UNKNOWN.

    Args:
        cache: folder in which the numbers are kept, so that the images are looked at once.
        source: the identity of ``data.images``, where it is known.
    """
    source = source or (None if cache is None else identity(data.images or ""))
    name = digest(source, sizes, data.caption_key, data.image_key, data.arguments, data.limit)
    file = cache / f"buckets-{name}.json" if cache is not None else None
    if file is not None and file.is_file():
        return read_json(file)["numbers"]
    numbers = []
    for sample, own, *_ in _usable(data, _alone(data, "images"), Tally("data.images", 1.0)):
        usable = own is not None and sample.image is not None
        numbers.append(nearest_to(sample.image, sizes) if usable else UNKNOWN)
    if file is not None:
        write_json(file, {"numbers": numbers})
    return numbers


def nearest_to(image: Callable[[], BinaryIO], sizes: Sequence[Size]) -> int:
    """The number of the size that is nearest in proportions to a picture or video; UNKNOWN where it is unreadable."""
    try:
        return nearest(*_upright_size(image), sizes)
    except InputError:
        raise
    except UNREADABLE:  # which stream() counts
        return UNKNOWN


def _upright_size(image: Callable[[], BinaryIO]) -> tuple[int, int]:
    with image() as file, suppress(UnidentifiedImageError):
        return picture.upright_size(file)
    with image() as file:
        return clips.size(file.read())


def _fashion_mnist(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    try:
        images, labels = fashion_mnist.load("train")
    except FileNotFoundError as error:
        raise InputError(str(error)) from None
    if images.shape[1:] != tuple(shape):
        raise InputError(f"fashion-mnist has 1x32x32 images, this pipeline wants {'x'.join(map(str, shape))}")
    return images, labels


def own_pictures(data: Data, medium: Medium, count: int, identity: str) -> "OwnPictures":
    """The pictures of the ``count`` usable samples of ``data.images``, which ``identity`` stands for."""

    def read() -> Iterator[Pictures]:
        items = stream(data, medium, Tally("data.images", 1.0))
        return (item.own for item in items if item is not None)

    return OwnPictures(read, count, identity)


def image_count(data: Data) -> int:
    """How many samples ``data.images`` has, usable or not."""
    return (
        fashion_mnist.COUNT if data.images == "fashion-mnist" else count(data.images or "", data.limit, data.image_key)
    )


def close_tally(tally: Tally, data: Data, log: bool = True) -> None:
    """Log what was rejected, with ``log``.

    Raises:
        InputError: more than ``data.max_rejected`` of the samples cannot be used, or all of them.
    """
    tally.close(log)
    if sum(tally.reasons.values()) == tally.read:
        raise InputError(f"data.images: expected images in {data.images}, found none")


def conditions(
    data: Data, log: bool = True, cache: Path | None = None
) -> tuple[str | Sequence[str], "OwnPictures | None"]:
    """ "classes", a file with a prompt a line, or a list: captions each once; of a shipped list its file.

    Where ``data.arguments`` gives each sample pictures of its own: every caption, and the pictures of each.

    Args:
        data: of the recipe; checked there.
        log: say how many samples were rejected.
        cache: as for :func:`requests`.

    Raises:
        InputError: more than ``data.max_rejected`` samples have none, or there are no samples.
    """
    source = data.conditions
    key = "images" if source == "captions" else "conditions"
    if data.arguments:
        return requests(data, key, log, cache)
    if isinstance(source, list) or source == "classes":
        return source, None
    if source in assets.prompt_lists():
        return str(assets.prompts(source)), None
    if source != "captions" and form(source) == "text":
        return _text(source, cache), None
    if cache is None or getattr(data, key) == "fashion-mnist":
        return captions(data, key, log), None
    settings = data.caption_key, data.image_key, data.limit, data.max_rejected
    name = digest(identity(getattr(data, key), named=key == "images"), key, settings)
    return _kept(data, key, log, cache / f"prompts-{name}.json", _each_once), None


def _text(source: str, cache: Path | None) -> str | list[str]:
    """A file with a prompt a line; of files at URLs or by a pattern one in the cache, and without a cache a list."""
    if not is_url(source) and not is_pattern(source):
        return source
    places = matching(source) if is_pattern(source) else [source]
    if cache is None:
        return list(lines_of(places))
    file = cache / f"prompts-{digest(identity(source))}.txt"
    if not file.is_file():
        with atomic(file) as draft, open(draft, "w", encoding="utf-8", newline="\n") as lines:
            lines.writelines(f"{line}\n" for line in lines_of(places))
    return str(file)


def _kept(data: Data, key: str, log: bool, file: Path, chosen: Callable[[Iterator[str]], list[str]]) -> str | list[str]:
    """The captions that are ``chosen`` of all, kept so that the source is read once: a file with a line for each, or,
    where one has several lines, the list of them.

    Args:
        file: what is known of them; the lines are beside it.
    """
    tally, lines = Tally(f"data.{key}", data.max_rejected), file.with_suffix(".txt")
    kept = read_json(file) if file.is_file() else None
    if kept and (kept["captions"] or lines.is_file()):
        tally.add(kept["tally"])
        tally.close(log)
        return kept["captions"] or str(lines)
    found = chosen(caption for caption, _ in _requests(data, key, log, tally))
    several = any(caption.splitlines() != [caption.strip()] for caption in found)
    if not several:
        write_text(lines, "\n".join(found))
    write_json(file, {"tally": tally.facts(), "captions": found if several else None})
    return found if several else str(lines)


def _each_once(captions: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(captions))


def captions(data: Data, key: str = "images", log: bool = True) -> list[str]:
    """The captions of the source that ``data.images`` or ``data.conditions`` (``key``) names, each once, in order."""
    if getattr(data, key) == "fashion-mnist":
        return list(fashion_mnist.CLASS_NAMES)
    return _each_once(caption for caption, _ in _requests(data, key, log))


def requests(
    data: Data, key: str = "images", log: bool = True, cache: Path | None = None
) -> tuple[Sequence[str], "OwnPictures"]:
    """Every caption of the source that ``data.images`` or ``data.conditions`` (``key``) names, with its pictures.

    Args:
        cache: folder in which it is kept which samples can be used, so that they are not read again to find out.
    """
    source = identity(getattr(data, key))
    name = digest(source, key, data.caption_key, data.image_key, data.arguments, data.limit, data.max_rejected)
    if cache is None:
        found: Sequence[str] = [caption for caption, _ in _requests(data, key, log)]
    else:
        kept = _kept(data, key, log, cache / f"prompts-{name}.json", list)
        found = Lines(Path(kept)) if isinstance(kept, str) else kept
    return found, OwnPictures(lambda: (own for _, own in _requests(data, key, log=False)), len(found), name)


class OwnPictures:
    """The pictures of ``count`` samples, read one after the other whenever they are needed.

    Args:
        read: the pictures of each, in order.
        count: how many.
        identity: says which pictures these are.
    """

    def __init__(self, read: Callable[[], Iterator[Pictures]], count: int, identity: str):
        self.read, self.count, self.identity = read, count, identity
        self._next, self._stream = 0, iter(())

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Pictures]:
        return self.read()

    def __getitem__(self, number: int | slice) -> Any:
        """Of a sample, quick in order, else they are read from the first one on; of several as a list."""
        if isinstance(number, slice):
            return list(islice(self.read(), *number.indices(self.count)))
        if number < self._next or not self._next:
            self._next, self._stream = 0, self.read()
        skipped = number - self._next
        self._next = number + 1
        return next(islice(self._stream, skipped, None))


def _requests(data: Data, key: str, log: bool, tally: Tally | None = None) -> Iterator[tuple[str, Pictures]]:
    tally, found = tally or Tally(f"data.{key}", data.max_rejected), 0
    for sample, own, notes, _ in _usable(data, _alone(data, key), tally):
        if own is not None:
            tally.note(sample, *notes)
            found += 1
            yield sample.caption, own  # ty: ignore[invalid-yield], accepted samples have a caption
    tally.close(log)
    if not found:
        raise InputError(f"data.{key}: expected captions in {getattr(data, key)}, found none")


def _samples(data: Data, key: str) -> Iterator[Sample]:
    return samples(getattr(data, key), data.caption_key, data.image_key, data.limit)


def _alone(data: Data, key: str) -> Iterator[tuple[Sample, None]]:
    return ((sample, None) for sample in _samples(data, key))


def _usable(
    data: Data, found: Iterable[tuple[Sample, T]], tally: Tally
) -> Iterator[tuple[Sample, Pictures | None, list[str], T]]:
    """Each sample, the pictures that ``data.arguments`` names, what was changed of them, and what it came with; None
    for the pictures of those that are rejected, as they have not all of these or no caption."""
    for sample, beside in found:
        if not tally.accepts(sample):
            yield sample, None, [], beside
            continue
        own, notes = {}, {}
        try:
            for argument, name in data.arguments.items():
                with sample.other(name) as file:
                    own[argument], changed = picture.read(file)
                notes |= dict.fromkeys(changed)
        except UNREADABLE as error:
            tally.reject(sample, f"unreadable picture: {error}")
            own = None
        except KeyError as error:
            tally.reject(sample, f"no picture {error.args[0]}")
            own = None
        yield sample, own, list(notes), beside
