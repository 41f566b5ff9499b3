"""The proof of an export: a plain call of it, where this package cannot be imported, is the training-time sampler.

The two run one after the other, and one is gone when the other is loaded: the memory of one pipeline is enough.
"""

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.devices import empty_cache, torch_of
from stepdistill.errors import RunError
from stepdistill.pipeline import ip_adapter, stock_call
from stepdistill.pipeline.call import TraceError, call_arguments
from stepdistill.pipeline.compare import deviation, tolerance
from stepdistill.pipeline.components import modules, scheduled
from stepdistill.pipeline.conditioning import plain_conditions
from stepdistill.pipeline.decode import as_pictures, decode, standing_in
from stepdistill.pipeline.exports import further_loras
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.guiders import guided_at, guiders
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.names import source
from stepdistill.pipeline.recording import forked_random
from stepdistill.pipeline.self_test import SELF_TEST_LIMIT
from stepdistill.pipeline.trace import Trace
from stepdistill.roles.attach import CONFIG as ATTACHED
from stepdistill.training.session import Session

TOLERANCE = 1e-5
LEVELS = 2
"""How many of 255 levels a picture may differ by: latents that agree, rounded."""
ROUNDING = 1e-6
"""How far latents of one computation may be apart, relative to the largest: some decoders make much of it."""
CHECKED = 4


class ExportError(RunError):
    """The reloaded pipeline does not repeat the training-time sampler; nothing was left behind."""


@dataclass(frozen=True)
class Sampled:
    """What the training-time sampler makes at one of the run's sizes, in the host's memory.

    Args:
        size: its name in messages; "" where the run has one.
        call: arguments of the plain call that is to make the same.
        noise: where it began, as :func:`stock_call.record` names it.
        latents: where it ended.
        pictures: of the latents; None in half precision.
        levels: how many of 255 levels the pictures move by where rounding moves the latents.
        limit: the largest relative difference that counts as equal.
    """

    size: str
    call: dict[str, Any]
    noise: dict[str, Tensor]
    latents: Tensor
    pictures: Tensor | None
    levels: int
    limit: float


def check(draft: Path, out: Path, session: Session, form: str) -> float:
    """How far a plain call of the draft is from the training-time sampler, relative; of several sizes at two.

    Both start from the same noise and draw the same random numbers.

    Args:
        out: its name in messages.
        session: whose device and precision the call has; it is without weights afterwards.
        form: "pipeline" or "lora".

    Raises:
        ExportError: it is too far.
    """
    request, made = _request(draft, session, form == "lora"), []
    own = session.trace.denoiser_in(session.trace.pipeline)
    with quiet():  # diffusers warns of each cast
        for network in (own, session.method.roles.student.network):
            network.to(session.device, precision(session))  # as the stock pipeline has it
    for size in sorted({0, len(session.sizes) - 1}):  # each is a call of the whole pipeline
        with session.at(size):
            made.append(_sampled(session))
    release(session)
    return max(_compared(draft, out, request, ours, session) for ours in made)


def _request(folder: Path, session: Session, lora: bool) -> dict[str, Any]:
    """What :mod:`stepdistill.pipeline.stock_call` is to load, and how."""
    teacher = session.recipe.teacher
    return {
        "pipeline": source(teacher.pipeline) if lora else str(folder),
        "revision": teacher.revision if lora else None,
        "variant": teacher.variant if lora else None,
        "lora": str(folder) if lora else None,
        "further_loras": further_loras(folder),
        "scheduler": type(session.sampler.scheduler).__name__,
        "ip_adapter": teacher.ip_adapter and ip_adapter.stock_arguments(teacher.ip_adapter),
        "ip_adapter_scale": teacher.ip_adapter and teacher.ip_adapter.scale,
        "guiders": [*guiders(session.trace.pipeline)] if lora else [],
        "device": str(session.device),
        "dtype": str(precision(session)).removeprefix("torch."),
    }


@torch.no_grad()
def _sampled(session: Session, count: int | None = None) -> Sampled:
    """What the student makes at the session's size: CHECKED samples, or ``count``; one if no more can be decoded."""
    rows = torch.arange(session.trace.at_once(count or CHECKED)) % len(session.conditioning)
    call = stock_arguments(
        session.trace, [session.conditioning.entries[i] for i in rows.tolist()], session.sampler.steps
    )
    began = without_network(session, call)
    latents = repeated(session, session.method.roles.student, rows, began)
    try:
        pictures, levels = _pictures(session, latents, began) if precision(session) == torch.float32 else (None, 0)
    except (TraceError, torch.OutOfMemoryError):
        if len(latents) == 1:
            raise
        return _sampled(session, 1)
    size = session.sizes[session.size].name
    noise = {name: value for name, value in began.items() if name.startswith("noise")}
    return Sampled(size, call, noise, latents.cpu(), pictures, levels, allowed(session))


def _pictures(session: Session, latents: Tensor, began: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The pictures of the latents, and how far they move with latents that are ROUNDING away, in levels.

    Args:
        began: what :func:`stock_call.record` returned for a call of the same noise; it keeps the same part.
    """
    made, left = [], began.get("latents")
    for share in (0.0, ROUNDING):
        with forked_random(session.device):
            torch.manual_seed(0)
            moved = latents + share * latents.abs().max() * torch.randn_like(latents).sign()
            torch.manual_seed(0)  # the plain call's seed and batch: a kept first frame is drawn from its encoding
            made.append(decode(session.trace, moved, len(latents), left))
    return made[0], int((made[0].float() - made[1].float()).abs().max())


def _compared(draft: Path, out: Path, request: dict[str, Any], ours: Sampled, session: Session) -> float:
    """How far a plain call is from ``ours``.

    Raises:
        ExportError: it is too far.
    """
    if (draft / ATTACHED).is_file():  # attaching it takes this package
        stock = stock_call.record(load_pipeline(draft), ours.call)
    else:
        stock = call_elsewhere(request | {"call": ours.call})
    where = f" at {ours.size}" if ours.size else ""
    if not all(torch.equal(stock[name], noise) for name, noise in ours.noise.items()):
        raise ExportError(f"{out}: a plain call{where} starts from other noise than the same call of the teacher")
    error = deviation(free_part(session.trace, stepped_in(session.trace, stock, "latents")), ours.latents)
    if not error <= ours.limit:
        raise ExportError(
            f"{out}: the reloaded pipeline differs from the training-time sampler by {error:.2e}{where} "
            f"(allowed {ours.limit:.0e}); the stock call of this pipeline does not run sampler {session.sampler.name}"
        )
    if "images" in stock and ours.pictures is not None:  # which may be no tensor
        images = as_pictures(stock["images"].float(), len(ours.latents))
        levels = int((images.float() - ours.pictures.float()).abs().max())
        if levels > max(LEVELS, 2 * ours.levels):
            raise ExportError(f"{out}: the reloaded pipeline's pictures differ by {levels} of 255 levels{where}")
    return error


def allowed(session: Session) -> float:
    """The largest relative difference that counts as equal: rounding, in the precision of the session's pipeline.

    Of a pipeline whose own steps were not repeated to 1e-5 in tracing, as it makes much of rounding, their error for
    each step on top.
    """
    error = session.trace.self_test_error
    unsteady = session.sampler.steps * error if error > SELF_TEST_LIMIT else 0.0
    return max(TOLERANCE + session.sampler.rounding + unsteady, tolerance(precision(session)))


def precision(session: Session) -> torch.dtype:
    """What the session's pipeline computes in."""
    return torch.bfloat16 if session.recipe.teacher.precision == "bf16" else torch.float32


def release(session: Session) -> None:
    """Free the memory of a session's networks; what is known of them stays."""
    networks = [*modules(session.trace.pipeline).values(), *(role.network for _, role in session.method.roles.items())]
    for network in networks:
        network.to("meta")
    empty_cache()


def stock_arguments(traced: Trace, entries: Sequence[str | int], steps: int, output_type: str = "pt") -> dict[str, Any]:
    """What the exported pipeline is called with."""
    wishes = {"steps": steps, "guidance": traced.guidance.plain_scale, "output_type": output_type}
    return call_arguments(traced.pipeline, traced.entries(entries), traced.arguments, **wishes)


def without_network(session: Session, call: dict[str, Any]) -> dict[str, Tensor]:
    """What :func:`stock_call.record` tells of a plain call with the student's scheduler, a function being the network.

    Args:
        call: arguments of the pipeline's call; it ends with latents whatever they say.
    """
    traced = session.trace
    # Some pipelines write into the list of prompts that they are given (Z-Image puts them into a chat template).
    own = {name: list(value) if isinstance(value, list) else value for name, value in call.items()}
    with (
        scheduled(traced.pipeline, copy.deepcopy(session.sampler.scheduler)),
        standing_in(traced, answer),
        forked_random(session.device),
        guided_at(traced.pipeline, 1.0),
    ):
        return stock_call.record(traced.pipeline, own | {"output_type": "latent"})


def answer(x: Tensor) -> Tensor:
    """What stands in for the network: no two samples get the same, and rounding grows little."""
    return x.sin() / 2


def repeated(session: Session, student: Denoiser, rows: Tensor, stock: Mapping[str, Tensor]) -> Tensor:
    """The latents (len(rows), ...) that the training-time sampler makes of a recorded call's noise and random numbers.

    Args:
        rows: entries of the session's conditioning, those of the call.
        stock: what :func:`stock_call.record` returned.
    """
    traced, steps = session.trace, session.sampler.steps
    cond = plain_conditions(traced, [session.conditioning.entries[i] for i in rows.tolist()], steps)
    noise = [session.sampler.seen(one.to(session.device)) for one in stepped_in(traced, stock, "noise")]
    with forked_random(session.device):
        torch_of(session.device).set_rng_state(stock["random_state"])
        return session.sampler.sample(
            lambda x, t: student(x, t, cond),
            free_part(traced, noise),
            lambda: free_part(traced, [torch.randn_like(one) for one in noise]),
        )


def stepped_in(traced: Trace, stock: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """What :func:`stock_call.record` returned as "noise" or "latents": a sample, or its frames or parts."""
    joint = traced.denoiser.spec.joint
    if traced.frames is not None:
        return [stock[f"{name} {number + 1}"] for number in range(traced.latent_shape[traced.frames - 1])]
    count = 1 if joint is None else len(joint.parts)
    return [stock[f"{name} {number}" if number else name] for number in range(count)]


def free_part(traced: Trace, samples: Sequence[Tensor]) -> Tensor:
    """The latents (N, *latent_shape) in what schedulers step."""
    joint = traced.denoiser.spec.joint
    if joint is not None:
        return joint.packed([part.inside(one) for part, one in zip(joint.parts, samples, strict=True)])
    sample = samples[0] if traced.frames is None else torch.stack([*samples], traced.frames)
    return sample if traced.free is None else traced.free.inside(sample)


def call_elsewhere(request: dict[str, Any]) -> dict[str, Tensor]:
    """What :mod:`stepdistill.pipeline.stock_call` reports, run by a Python that cannot import stepdistill.

    Raises:
        ExportError: the export cannot be loaded or called there.
    """
    # As a string, so that the folder of that file, whose names shadow the standard library's, is not on its path.
    program = Path(stock_call.__file__).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        request_file, result_file = Path(place) / "request.json", Path(place) / "result.safetensors"
        request_file.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-c", program, str(request_file), str(result_file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise ExportError(f"plain diffusers cannot run the export: {reason}")
        return load_file(result_file)
