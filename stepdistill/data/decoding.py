"""Pictures of samples, decoded and cut by a few threads while the ones before them are encoded; in order."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from stepdistill.data import picture
from stepdistill.data.buckets import Bucket
from stepdistill.data.sample import UNREADABLE, Sample

THREADS = min(4, os.cpu_count() or 1)
"""Pillow decodes and scales without Python's lock."""
AHEAD = 2 * THREADS
"""Pictures that wait, at most."""


@dataclass(frozen=True)
class Cut:
    """The part of a picture that is kept.

    Args:
        image: uint8 (C, H, W).
        whole: width and height of the picture.
        notes: what was changed that its owner should know.
    """

    image: Tensor
    whole: tuple[int, int]
    notes: list[str]


Waiting = Callable[[], Cut | None]
"""Waits for a picture; None: there is none, or it is in another bucket. Raises one of UNREADABLE."""


def decoding(
    found: Iterable[tuple[int, Sample]], channels: int, bucket: Bucket, ahead: int = AHEAD
) -> Iterator[tuple[Sample, Waiting]]:
    """Each of the samples, given with its number, and what waits for its picture.

    Args:
        ahead: how many samples are read before they are needed; 0 where more than their pictures is read of them, as
            files of an archive can be opened until the next sample is read.
    """
    waiting: deque[tuple[Sample, Waiting]] = deque()
    pool = ThreadPoolExecutor(THREADS, "decoding")
    try:
        for row, sample in found:
            waiting.append((sample, _begun(pool, row, sample, channels, bucket)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _begun(pool: ThreadPoolExecutor, row: int, sample: Sample, channels: int, bucket: Bucket) -> Waiting:
    if sample.image is None or sample.problem or bucket.lacks(row):
        return lambda: None
    try:
        with sample.image() as file:  # by this thread: members of an archive are read one after the other
            content = file.read()
    except UNREADABLE as error:
        return partial(_raise, error)
    return pool.submit(_cut, content, row, channels, bucket).result


def _raise(error: BaseException) -> None:
    raise error


def _cut(content: bytes, row: int, channels: int, bucket: Bucket) -> Cut | None:
    image, notes = picture.read(io.BytesIO(content), "L" if channels == 1 else "RGB")
    if not bucket.holds(row, image.size):
        return None
    return Cut(picture.scaled(bucket.cut(image, row), channels, *bucket.size), image.size, notes)
