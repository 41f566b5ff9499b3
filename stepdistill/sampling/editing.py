"""Inverting and editing real pictures with an iCD student (Starodubcev et al. 2024).

    invert    x = alpha x_0 + sigma eps at the lowest time of the grid
              up the grid by the encoder, SOURCE condition, w = 1
    edit      down the grid by the student from there, TARGET condition
              w(t) = 1 above tau_high, w below tau, linear between

The encoder has no guidance, so that the code z of a real picture is as likely as noise. Guidance in the first steps
would change the layout; below tau it changes what the target condition says. The loop is not a stock call: no stock
pipeline takes another w at each step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.data import picture
from stepdistill.data.sample import UNREADABLE
from stepdistill.diffusion.denoiser import Conditions, Denoiser
from stepdistill.diffusion.devices import best_device
from stepdistill.diffusion.samplers import DDIM
from stepdistill.diffusion.schedule import Prediction, Schedule
from stepdistill.errors import InputError
from stepdistill.methods.parts.times import T_FLOOR
from stepdistill.pipeline.conditioning import encode, entries
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.exports import ExportFacts
from stepdistill.pipeline.latents import encode_images, image_shape
from stepdistill.pipeline.load import load_network, pipeline_of
from stepdistill.pipeline.set_up import set_up
from stepdistill.pipeline.trace import Trace
from stepdistill.roles.guidance_embedding import read_embedding
from stepdistill.sampling.generate import noise
from stepdistill.sampling.image_grid import image_grid
from stepdistill.sampling.sample import inspect

ENCODER = "encoder"
Guidance = Callable[[float], float]
"""w by time t."""


@dataclass(frozen=True)
class Editor:
    """A student and its inverse on one grid.

    Args:
        trace: of the exported pipeline.
        student: down the grid; it takes ``guidance_scale`` (B,) where ``embedded``.
        encoder: up the grid.
        times: of the grid, descending from the noise end to the lowest time.
        embedded: whether the student has w as an input.
        scale: the w that the export was made for.
    """

    trace: Trace
    student: Denoiser
    encoder: Denoiser
    times: tuple[float, ...]
    embedded: bool
    scale: float


@dataclass(frozen=True)
class Edited:
    """What an edit gave: images uint8 (C, H, W), and the facts people ask for.

    ``z_mean`` and ``z_std`` are of the code, N(0, 1) for a picture that the student can draw. ``error`` is the mean
    absolute difference of picture and reconstruction, of 1.
    """

    image: Tensor
    reconstruction: Tensor
    edited: Tensor | None
    z_mean: float
    z_std: float
    error: float
    path: Path | None


def load_editor(path: str | Path) -> Editor:
    """The student and the encoder of a run or an export.

    Raises:
        InputError: the export has no encoder.
    """
    folder = Path(pipeline_of(path))
    facts = ExportFacts.read(folder)
    if facts is None or not (folder / ENCODER).is_dir():
        raise InputError(f"{path}: expected a run or an export of method icd, found no folder {ENCODER} in it")
    traced = inspect(folder)
    device = best_device()
    traced.pipeline.to(device)
    network = traced.denoiser.network
    encoder = load_network(type(network), folder / ENCODER).float().requires_grad_(False).to(device)
    student = read_embedding(network, folder).requires_grad_(False).to(device)
    own = lambda scheduler, steps: set_up(traced, scheduler, steps)[0]  # noqa: E731
    grid = DDIM(traced.denoiser.schedule, traced.pipeline.scheduler, facts.steps, own).grid()
    times = (*(step.t for step in grid), lowest_time(traced.denoiser.schedule))
    embedded, scale = student is not network, facts.guidance
    return Editor(traced, traced.denoiser.on(student), traced.denoiser.on(encoder), times, embedded, scale)


def lowest_time(schedule: Schedule) -> float:
    """Where inversion starts: 0, or a little above it where time 0 has no noise at all."""
    clean = torch.zeros(1, dtype=torch.float64)
    return 0.0 if schedule.sigma(clean) > 0 else T_FLOOR


def dynamic_guidance(scale: float, low: float, high: float | None = None) -> Guidance:
    """w(t): ``scale`` at times up to ``low``, 1 above ``high`` (None: ``low``), linear between.

    Raises:
        InputError: ``high`` is below ``low``, or one is outside [0, 1].
    """
    high = low if high is None else high
    if not 0 <= low <= high <= 1:
        raise InputError(f"tau: expected times from 0 to 1 in ascending order, found {low:g} and {high:g}")

    def at(t: float) -> float:
        share = (t <= low) if low == high else min(1.0, max(0.0, (high - t) / (high - low)))
        return 1 + (scale - 1) * float(share)

    return at


@torch.no_grad()
def invert(editor: Editor, latents: Tensor, cond: Conditions, eps: Tensor) -> Tensor:
    """The noise z (B, ...) that the student turns into ``latents`` (B, ...) under ``cond``.

    Args:
        editor: student and encoder.
        latents: clean, as the denoiser has them.
        cond: the source condition, B rows.
        eps: standard normal (B, ...), for the trace of noise at the lowest time.
    """
    times = editor.times[::-1]
    x = editor.encoder.schedule.add_noise(latents, eps, _rows(times[0], latents))
    for t, r in pairwise(times):
        x = _jump(editor.encoder(x, _rows(t, x), cond), r)
    return x


@torch.no_grad()
def redraw(editor: Editor, z: Tensor, cond: Conditions, guidance: Guidance) -> Tensor:
    """Clean latents (B, ...) that the student makes of the code ``z`` (B, ...) under ``cond`` and w(t)."""
    x = z
    for t, r in zip(editor.times[:-1], [*editor.times[1:-1], None], strict=True):
        rows = _rows(t, x)
        guidance_input = {"guidance_scale": torch.full_like(rows, guidance(t))} if editor.embedded else {}
        prediction = editor.student(x, rows, cond | guidance_input)
        x = prediction.x0 if r is None else _jump(prediction, r)
    return x


def edit(
    path: str | Path,
    image: str | Path,
    source: str | int,
    target: str | int | None = None,
    *,
    guidance: float | None = None,
    tau: float = 0.7,
    tau_high: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
) -> Edited:
    """Invert a picture and draw it again under another condition.

    Args:
        path: a run or an export of method ``icd``.
        image: a picture file; its middle square is scaled to the pipeline's size.
        source: what the picture shows, a prompt or a class.
        target: what it should show; None: reconstruct it only.
        guidance: w below ``tau``; None: that of the export.
        tau: the time, of which 1 is noise, below which guidance is on.
        tau_high: the time above which it is off, linear between; None: ``tau``.
        seed: of the trace of noise at the lowest time.
        out: where to write picture, reconstruction and edit side by side.

    Returns:
        Pictures and facts.

    Raises:
        InputError: no such student, picture or class; or a w for a student without an input for it.
    """
    editor = load_editor(path)
    if not editor.embedded and guidance is not None and guidance != editor.scale:
        raise InputError(f"guidance: expected {editor.scale:g}, as this student has no input for w, found {guidance:g}")
    scale = editor.scale if guidance is None else guidance
    traced = editor.trace
    real = read_square(Path(image), *image_shape(traced))
    device = traced.pipeline.device
    latents = encode_images(traced, real[None]).float().to(device)
    requested = entries(traced, [source] if target is None else [source, target])
    conditions = [encode(traced, [one]).to(device).batch(torch.zeros(1, dtype=torch.long))[0] for one in requested]
    z = invert(editor, latents, conditions[0], noise(traced.latent_shape, seed, [0]).to(device))
    back = decode(traced, redraw(editor, z, conditions[0], lambda t: 1.0))[0]
    changed = None
    if target is not None:
        changed = decode(traced, redraw(editor, z, conditions[1], dynamic_guidance(scale, tau, tau_high)))[0]
    if out is not None:
        panels = [real, back] if changed is None else [real, back, changed]
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        image_grid(torch.stack(panels), columns=len(panels)).save(out)
    error = (back.float() - real.float()).abs().mean().item() / 255
    return Edited(real, back, changed, z.mean().item(), z.std().item(), error, out)


def read_square(file: Path, channels: int, side: int) -> Tensor:
    """The middle square of a picture file, uint8 (channels, side, side).

    Raises:
        InputError: it cannot be read.
    """
    try:
        original, _ = picture.read(file, "L" if channels == 1 else "RGB")
    except UNREADABLE as error:
        raise InputError(f"{file}: expected a picture that can be read ({error})") from None
    return picture.scaled(picture.middle(original), channels, side, side)


def _jump(prediction: Prediction, r: float) -> Tensor:
    return prediction.schedule.add_noise(prediction.x0, prediction.eps, _rows(r, prediction.x_t))


def _rows(time: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), time, dtype=torch.float64, device=like.device)
