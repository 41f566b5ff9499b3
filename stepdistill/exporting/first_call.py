"""Before the first step: does a plain call of the pipeline run the sampler that the student is going to be trained for?

What the export's check would find after days of training is found here in seconds. The pipeline itself is called with
the student's scheduler; a simple function stands in for its network, so no pass through a network is spent.
"""

import itertools
import time
from typing import Any

import torch

from stepdistill.errors import InputError, first_line
from stepdistill.exporting.check import (
    allowed,
    answer,
    free_part,
    repeated,
    stepped_in,
    stock_arguments,
    without_network,
)
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import deviation, same
from stepdistill.pipeline.decode import standing_in
from stepdistill.pipeline.trace import Trace
from stepdistill.progress import say
from stepdistill.training.session import Session

ROWS = 2


def check_stock_call(session: Session) -> float:
    """Compare a plain call with the training-time sampler, as :func:`stepdistill.exporting.check.check` does at last.

    Every size of the run is called.

    Returns:
        How far they are apart, relative to the largest value.

    Raises:
        InputError: the call fails, or is another sampler than the one that is trained.
    """
    errors = []
    for size in range(len(session.sizes)):
        with session.at(size):
            errors.append(_compared(session))
    return max(errors)


@torch.no_grad()
def _compared(session: Session) -> float:
    """The difference at the session's size."""
    traced, sampler, began = session.trace, session.sampler, time.perf_counter()
    rows = torch.arange(traced.at_once(ROWS)) % len(session.conditioning)
    entries = [session.conditioning.entries[i] for i in rows.tolist()]
    call = stock_arguments(traced, entries, sampler.steps, output_type="latent")
    name, calls = type(traced.pipeline).__name__, f"a plain call in {sampler.steps} steps without guidance"
    with standing_in(traced, answer), torch.compiler.set_stance("force_eager"):
        try:
            stock = without_network(session, call)
        except (InputError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = first_line(error)
            raise InputError(f"teacher.pipeline: {calls} of {name} fails: {reason}{_remedy(traced)}") from error
        ours = repeated(session, traced.denoiser.on(traced.denoiser_in(traced.pipeline)), rows, stock)
    error = deviation(free_part(traced, stepped_in(traced, stock, "latents")), ours.cpu())
    limit = allowed(session)
    if not error <= limit:
        raise InputError(
            f"teacher.pipeline: {calls} of {name} differs from sampler {sampler.name} by {error:.1e} (allowed "
            f"{limit:.0e}), so that no export of the student would repeat what is trained{_remedy(traced)}"
        )
    seconds = time.perf_counter() - began
    name += f" at {size}" if (size := session.sizes[session.size].name) else ""
    say(
        f"a plain call of {name} runs sampler {sampler.name} ({len(rows)} samples without the network, {seconds:.1f} s)"
    )
    if traced.guidance.always:
        count = len(traced.guidance.passes)
        say(f"a plain call makes {count} passes at each step, whatever its scale; the student's is the conditional one")
    return error


def _remedy(traced: Trace) -> str:
    """What is known to make a pipeline do something else between its steps, and what to do about it; may be empty."""
    arguments: dict[str, Any] = traced.arguments
    if arguments.get("eta"):
        return f"; leave teacher.arguments.eta out (found {arguments['eta']}), which adds noise at each step"
    if not _passed_on(traced):
        if "mask_image" in arguments:
            return (
                "; it puts its picture into the latents after each step, as its network takes no mask: state a white "
                "picture as teacher.arguments.mask_image, for a student that draws all of it and then takes any mask, "
                "or use an inpainting network, which takes the mask beside the latents (9 channels in Stable Diffusion)"
            )
        return "; it changes its latents between its steps"
    return ""


def _passed_on(traced: Trace) -> bool:
    """Whether the pipeline begins a step where its scheduler ended the one before."""
    try:
        with standing_in(traced, answer):
            made = traced.observe(steps=max(2, traced.fewest_steps))
    except TraceError:  # the refusal itself names that fault
        return True
    return all(same(one.previous, other.sample) for one, other in itertools.pairwise(made.steps))
