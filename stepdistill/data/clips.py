"""Videos and sounds of real samples: the frames that a pipeline takes, and the part of a sound.

PyAV decodes them; animated pictures (.gif, .webp, .png) are decoded by Pillow, as still ones are.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from stepdistill.data import picture
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

STEP = 0.1
"""Seconds of a frame of an animated picture that states none, and of a video with one frame."""
NEAR = 1e-4
"""Seconds by which a frame may be late and still count as the one at its time."""

Frames = Iterator[tuple[float, Image.Image]]


class Short(ValueError):
    """A video or a sound that has less than the pipeline takes."""


def frames(content: bytes, count: int, rate: float | None = None, place: float = 0.5) -> list[Image.Image]:
    """``count`` frames of a video or an animated picture, RGB, upright and opaque.

    Args:
        content: of the file.
        count: how many.
        rate: frames a second, each the one that is shown at its time; None: those of the file, one after the other.
        place: where they lie in the video, from 0 (its start) to 1 (its end).

    Raises:
        Short: the video has fewer, or ends before.
        One of UNREADABLE: it is no video.
    """
    with _opened(content) as (times, decoded):
        numbers = _chosen(times, count, rate, place)
        kept: dict[int, Image.Image] = {}
        for time, image in decoded(times[numbers[0]]):
            if (number := bisect_right(times, time + NEAR) - 1) in numbers:
                kept[number] = image
            if number >= numbers[-1]:
                break
    if missing := sorted(set(numbers) - kept.keys()):
        raise ValueError(f"frame {missing[0]} cannot be decoded")
    return [kept[number] for number in numbers]


def size(content: bytes) -> tuple[int, int]:
    """Width and height of a video's frames.

    Raises:
        One of UNREADABLE: it is no video.
    """
    with _opened(content) as (times, decoded):
        return next(decoded(times[0]))[1].size


def sound(content: bytes, channels: int, length: int, rate: int, place: float = 0.5) -> "Tensor":
    """A part of a sound, float32 (channels, length) in [-1, 1].

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

    with _container(content) as (av, container):
        if not container.streams.audio:
            raise ValueError("no sound in the file")
        made = av.AudioResampler(format="fltp", layout={1: "mono", 2: "stereo"}[channels], rate=rate)
        decoded = [one.to_ndarray() for frame in (*container.decode(audio=0), None) for one in made.resample(frame)]
    whole = np.concatenate(decoded, 1) if decoded else np.zeros((channels, 0), np.float32)
    if whole.shape[1] < length:
        raise Short(f"shorter than {length / rate:.4g} s: {whole.shape[1] / rate:.4g} s")
    start = int(place * (whole.shape[1] - length))
    return torch.from_numpy(whole[:, start : start + length].copy()).clamp(-1, 1)


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
def _opened(content: bytes) -> Iterator[tuple[list[float], Callable[[float], Frames]]]:
    """The times at which frames begin, and what decodes those from a time on."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            yield _times(image), lambda start: _animated(image, start)
            return
    except UnidentifiedImageError:
        pass
    with _container(content) as (_, container):
        if not container.streams.video:
            raise ValueError("no video in the file")
        stream = container.streams.video[0]
        stamps = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        if not stamps:
            raise ValueError("no frames in the file")
        yield [float(stamp * stream.time_base) for stamp in stamps], lambda start: _video(container, stream, start)


def _times(image: Image.Image) -> list[float]:
    times = [0.0]
    for number in range(getattr(image, "n_frames", 1) - 1):
        image.seek(number)
        times.append(times[-1] + (image.info.get("duration") or 1000 * STEP) / 1000)
    return times


def _animated(image: Image.Image, start: float) -> Frames:
    for number, time in enumerate(_times(image)):
        if time >= start - NEAR:
            image.seek(number)
            yield time, picture.opaque(image.copy())[0].convert("RGB")


def _video(container: Any, stream: Any, start: float) -> Frames:
    container.seek(int(start / stream.time_base), stream=stream)  # to the last whole frame before it
    for frame in container.decode(stream):
        if frame.pts is not None and frame.time >= start - NEAR:
            yield frame.time, frame.to_image().rotate(frame.rotation, expand=True)


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
