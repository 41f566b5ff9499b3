"""Videos and sounds that a pipeline makes: as pictures, and as files that play."""

import math
import wave
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.pipeline.decode import as_pictures, played
from stepdistill.pipeline.latents import sampling_rate
from stepdistill.pipeline.trace import Trace
from stepdistill.progress import say
from stepdistill.sampling.image_grid import image_grid

WHOLE = 4
"""Videos and sounds that are written as files, of many."""
WIDEST = 1024
"""Pixels of an animation's width at most."""
MILLISECONDS = 62
"""Of a frame: 16 a second, as many video networks are trained for; pipelines do not state theirs."""

BANDS = 128
"""Height of a spectrogram in pixels; its frequencies lie evenly on a logarithmic axis."""
COLUMNS = 256
"""Width at most."""
RANGE = 80.0
"""Decibels below a full tone that are shown; what is quieter is black."""


def drawn(trace: Trace, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Pictures uint8 (N, C, H, W) of latents, of videos the middle frames, of sounds the spectra; and the first of the
    videos (F, C, H, W) or sounds (channels, length) themselves."""
    pictures: list[Tensor] = []
    whole: list[Tensor] = []
    for made, count in played(trace, latents):
        if made.ndim < 4:
            made = made.reshape(count, -1, made.shape[-1])
        if made.ndim != 4:
            whole += made[: WHOLE - len(whole)]
        pictures.append(spectrograms(made) if made.ndim == 3 else as_pictures(made, count))
    return torch.cat(pictures), whole


def write_whole(path: Path, samples: Sequence[Tensor], trace: Trace) -> list[Path]:
    """Write what :func:`drawn` returned whole: videos side by side as PATH.webp, sounds as PATH_0.wav, ..."""
    if not samples:
        return []
    if samples[0].ndim == 4:
        files = [path.with_name(f"{path.name}.webp")]
        write_animation(files[0], torch.stack([*samples]))
        return files
    try:
        rate = sampling_rate(trace.pipeline)
    except InputError as error:
        say(f"no .wav files: {error}")
        return []
    files = [path.with_name(f"{path.name}_{number}.wav") for number in range(len(samples))]
    for file, sound in zip(files, samples, strict=True):
        write_wav(file, sound, rate)
    return files


def write_animation(path: Path, videos: Tensor) -> None:
    """Videos (N, F, C, H, W) in [0, 1] side by side as an animated picture (.webp), which plays without end."""
    frames = []
    for shown in (videos.clamp(0, 1) * 255).round().to(torch.uint8).unbind(1):
        sheet = image_grid(shown, columns=2 if len(shown) > 3 else len(shown))
        sheet.thumbnail((WIDEST, 4 * WIDEST))
        frames.append(sheet)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0)


def spectrograms(sounds: Tensor) -> Tensor:
    """Of sounds (N, channels, length) in [-1, 1] their spectra in decibels, uint8 (N, 1, BANDS, COLUMNS or fewer).

    High frequencies are at the top; channels are averaged; white is a tone of amplitude 1.
    """
    mono = sounds.float().cpu().mean(1)
    window = min(1024, mono.shape[1])
    hop = max(1, window // 4, -(-mono.shape[1] // COLUMNS))
    shape = torch.hann_window(window)
    spectra = torch.stft(mono, window, hop, window=shape, return_complex=True).abs() / (shape.sum() / 2)
    bins = spectra.shape[1]
    rows = (torch.logspace(0, math.log2(bins), BANDS, 2.0) - 1).round().long()
    levels = 20 * spectra[:, rows.flip(0), :COLUMNS].clamp_min(1e-8).log10() / RANGE + 1
    return (levels.clamp(0, 1) * 255).round().to(torch.uint8).unsqueeze(1)


def write_wav(path: Path, sound: Tensor, rate: int) -> None:
    """A sound (channels, length) in [-1, 1] as a WAV file of 16 bits, ``rate`` samples a second."""
    numbers = (sound.float().cpu().clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(sound))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(numbers.T.contiguous().numpy().astype("<i2").tobytes())
