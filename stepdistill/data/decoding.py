"""Pictures, videos and sounds, decoded and cut by a few threads while the ones before them are encoded; in order."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from stepdistill.data import clips, picture
from stepdistill.data.buckets import Bucket
from stepdistill.data.sample import UNREADABLE, Sample

THREADS = min(4, os.cpu_count() or 1)
"""Pillow decodes and scales without Python's lock."""
AHEAD = 2 * THREADS
"""Pictures that wait, at most."""
NAMES = {2: "sound", 3: "image", 4: "video"}


@dataclass(frozen=True)
class Medium:
    """What one sample is.

    Args:
        shape: (C, H, W) of a picture, (F, C, H, W) of a video, (channels, length) of a sound.
        rate: of a sound: samples a second; of a video: frames a second, None: those of the file one after the other.
    """

    shape: tuple[int, ...]
    rate: float | None = None

    @property
    def name(self) -> str:
        """In messages."""
        return NAMES[len(self.shape)]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels; those of a sound are nothing."""
        return (1, 1) if self.name == "sound" else (self.shape[-2], self.shape[-1])


@dataclass(frozen=True)
class Cut:
    """The part of a picture, a video or a sound that is kept.

    Args:
        image: uint8 (C, H, W) or (F, C, H, W), float32 (channels, length); or latents that were made ahead.
        whole: width and height of the picture.
        notes: what was changed that its owner should know.
        ready: whether these are latents.
    """

    image: Tensor
    whole: tuple[int, int] = (1, 1)
    notes: Sequence[str] = ()
    ready: bool = False


Waiting = Callable[[], Cut | None]
"""Waits for a picture; None: there is none, or it is in another bucket. Raises one of UNREADABLE."""


def decoding(
    found: Iterable[tuple[int, Sample]], medium: Medium, bucket: Bucket, ahead: int = AHEAD
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
            waiting.append((sample, _begun(pool, row, sample, medium, bucket)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _begun(pool: ThreadPoolExecutor, row: int, sample: Sample, medium: Medium, bucket: Bucket) -> Waiting:
    if sample.image is None or sample.problem or bucket.lacks(row):
        return lambda: None
    try:
        with sample.image() as file:  # by this thread: members of an archive are read one after the other
            content = file.read()
    except UNREADABLE as error:
        return partial(_raise, error)
    return pool.submit(_cut, content, row, medium, bucket).result


def _raise(error: BaseException) -> None:
    raise error


def _cut(content: bytes, row: int, medium: Medium, bucket: Bucket) -> Cut | None:
    # A safetensors file: the length of its header in eight bytes, then JSON.
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content):
        return Cut(_ready(content), ready=True)
    if medium.name == "sound":
        channels, length = medium.shape
        return Cut(clips.sound(content, channels, length, int(medium.rate or 0), bucket.moment(row)))

    def scaled(image: Image.Image) -> Tensor:
        return picture.scaled(bucket.cut(image, row), medium.shape[-3], *bucket.size)

    if medium.name == "video":
        whole = clips.size(content)
        if not bucket.holds(row, whole):
            return None
        cut = clips.frames(content, medium.shape[0], medium.rate, bucket.moment(row), scaled)
        return Cut(torch.stack(cut), whole)
    image, notes = picture.read(io.BytesIO(content), "L" if medium.shape[0] == 1 else "RGB")
    return Cut(scaled(image), image.size, notes) if bucket.holds(row, image.size) else None


def _ready(content: bytes) -> Tensor:
    """The latents in a safetensors file, float32."""
    try:
        tensors = load(content)
    except Exception as error:  # of its own kind, which is no OSError
        raise ValueError(f"not a safetensors file: {error}") from None
    if "latents" not in tensors:
        raise ValueError(f"expected a tensor latents, found {', '.join(tensors) or 'none'}")
    return tensors["latents"].float()
