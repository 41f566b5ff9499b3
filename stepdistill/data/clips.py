"""Videos and sounds of real samples: the frames that a pipeline takes, and the part of a sound.

PyAV decodes them; animated pictures (.gif, .webp, .png) are decoded by Pillow, as still ones are.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from stepdistill.data import picture
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

STEP = 0.1
"""Seconds of a frame of an animated picture that states none, and of a video with one frame."""
FAR = 20.0
"""Seconds that are decoded rather than jumped over."""
NEAR = 1e-4
"""Seconds by which a frame may be late and still count as the one at its time."""

Frames = Iterator[tuple[int, Image.Image]]


class Short(ValueError):
    """A video or a sound that has less than the pipeline takes."""


def frames(
    content: bytes,
    count: int,
    rate: float | None = None,
    place: float = 0.5,
    taken: Callable[[Image.Image], Any] = lambda image: image,
) -> list[Any]:
    """``count`` frames of a video or an animated picture, RGB, upright and opaque.

    Args:
        content: of the file.
        count: how many.
        rate: frames a second, each the one that is shown at its time; None: those of the file, one after the other.
        place: where they lie in the video, from 0 (its start) to 1 (its end).
        taken: what is kept of a frame, such as it in small: whole ones of a large video fill the memory.

    Raises:
        Short: the video has fewer, or ends before.
        One of UNREADABLE: it is no video.
    """
    with _opened(content) as (times, decoded):
        numbers = _chosen(times, count, rate, place)
        kept = _kept(numbers, decoded(numbers[0]), taken)
        if len(kept) < len(set(numbers)) and numbers[0]:  # the jump ended behind the first one
            kept = _kept(numbers, decoded(0), taken)
    if missing := sorted(set(numbers) - kept.keys()):
        raise ValueError(f"frame {missing[0]} cannot be decoded")
    return [kept[number] for number in numbers]


def _kept(numbers: Sequence[int], decoded: Frames, taken: Callable[[Image.Image], Any]) -> dict[int, Any]:
    """What is taken of the frames with these numbers, of those that are decoded."""
    kept = {}
    for number, image in decoded:
        if number in numbers:
            kept[number] = taken(image)
        if number >= numbers[-1]:
            break
    return kept


def size(content: bytes) -> tuple[int, int]:
    """Width and height of a video's frames.

    Raises:
        One of UNREADABLE: it is no video.
    """
    with _opened(content) as (_, decoded):
        for _, image in decoded(0):
            return image.size
    raise ValueError("no frames in the file")


def sound(content: bytes, channels: int, length: int, rate: int, place: float = 0.5) -> "Tensor":
    """A part of a sound, float32 (channels, length) in [-1, 1].

    The file is decoded twice, to know how long it is: only the part is in memory.

    Args:
        content: of the file; the sound of a video counts as well.
        channels: 1 or 2.
        length: of the part, in samples.
        rate: samples a second.
        place: where it lies, from 0 (the start) to 1 (the end).

    Raises:
        Short: the sound is shorter.
        One of UNREADABLE: it is no sound.
    """
    import torch

    whole = sum(block.shape[1] for block in _resampled(content, channels, rate))
    if whole < length:
        raise Short(f"shorter than {length / rate:.4g} s: {whole / rate:.4g} s")
    start, done, parts = int(place * (whole - length)), 0, []
    for block in _resampled(content, channels, rate):
        parts.append(block[:, max(0, start - done) : max(0, start + length - done)])
        done += block.shape[1]
        if done >= start + length:
            break
    return torch.from_numpy(np.concatenate(parts, 1)).clamp(-1, 1)


def _resampled(content: bytes, channels: int, rate: int) -> Iterator[np.ndarray]:
    """The sound in the file, a block (channels, some samples) after the other."""
    with _container(content) as (av, container):
        if not container.streams.audio:
            raise ValueError("no sound in the file")
        made = av.AudioResampler(format="fltp", layout={1: "mono", 2: "stereo"}[channels], rate=rate)
        for frame in chain(container.decode(audio=0), [None]):  # None: what is left
            for one in made.resample(frame):
                yield one.to_ndarray()


def _chosen(times: Sequence[float], count: int, rate: float | None, place: float) -> list[int]:
    """The numbers of the frames that are taken of those that begin at ``times``."""
    if rate is None:
        if len(times) < count:
            raise Short(f"shorter than {count} frames: {len(times)}")
        first = int(place * (len(times) - count))
        return list(range(first, first + count))
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else STEP
    room = times[-1] + step - times[0] - (count - 1) / rate  # in which the first one may lie
    if room < NEAR:
        raise Short(f"shorter than {count} frames at {rate:g} a second: {times[-1] + step - times[0]:.4g} s")
    first = times[0] + place * max(0.0, room - step)
    return [bisect_right(times, first + number / rate + NEAR) - 1 for number in range(count)]


@contextmanager
def _opened(content: bytes) -> Iterator[tuple[list[float], Callable[[int], Frames]]]:
    """The times at which frames begin, and what decodes those from a number on, each with its number."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            yield _times(image), lambda first: _animated(image, first)
            return
    except UnidentifiedImageError:
        pass
    with _container(content) as (_, container):
        if not container.streams.video:
            raise ValueError("no video in the file")
        stream = container.streams.video[0]
        # A cut that was made without encoding again leaves frames in front that no player shows.
        shown = (packet for packet in container.demux(stream) if packet.pts is not None and not packet.is_discard)
        times = sorted(float(packet.pts * stream.time_base) for packet in shown)
    if not times:
        raise ValueError("no frames in the file")
    yield times, lambda first: _video(content, times, first)


def _times(image: Image.Image) -> list[float]:
    times = [0.0]
    for number in range(getattr(image, "n_frames", 1) - 1):
        image.seek(number)
        image.load()  # WebP and AVIF state their durations then
        times.append(times[-1] + (image.info.get("duration") or 1000 * STEP) / 1000)
    return times


def _animated(image: Image.Image, first: int) -> Frames:
    for number in range(first, getattr(image, "n_frames", 1)):
        image.seek(number)
        yield number, picture.opaque(image.copy())[0].convert("RGB")


def _video(content: bytes, times: Sequence[float], first: int) -> Frames:
    """Frames in the order in which they are shown: counted from the start, or by their times after a jump to one.

    Not all jumps end before the frame, and .avi states no times of frames that are shown in another order than stored.
    """
    with _container(content) as (_, container):
        stream = container.streams.video[0]
        jump = times[first] - times[0] > FAR and "avi" not in container.format.name
        if jump:
            container.seek(int(times[first] / stream.time_base), stream=stream)  # to the last whole frame before it
        for number, frame in enumerate(container.decode(stream)):
            if jump:
                number = bisect_right(times, frame.time + NEAR) - 1 if frame.pts is not None else -1
            if number >= first:
                yield number, frame.to_image().rotate(frame.rotation, expand=True)


@contextmanager
def _container(content: bytes) -> Iterator[tuple[Any, Any]]:
    """(PyAV, the file opened by it).

    Raises:
        InputError: PyAV is not installed.
        ValueError: it cannot read the file.
    """
    try:
        import av  # an extra, which pictures do not need
    except ImportError:
        raise InputError("data.images: videos and sounds need the package av (pip install -e '.[video]')") from None
    try:
        with av.open(io.BytesIO(content)) as container:
            yield av, container
    except av.FFmpegError as error:
        raise ValueError(str(error)) from None
