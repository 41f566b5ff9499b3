"""Before the first step: does a plain call of the pipeline run the sampler that the student is going to be trained for?

What the export's check would find after days of training is found here in seconds. The pipeline itself is called with
the student's scheduler; a simple function stands in for its network, so no pass through a network is spent.
"""

import copy
import time
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.exporting import stock_call
from stepdistill.exporting.export import TOLERANCE, repeated, stock_arguments
from stepdistill.generation.generate import stand_in
from stepdistill.pipeline.compare import deviation, tolerance
from stepdistill.pipeline.observe import forked_random, patched
from stepdistill.pipeline.trace import Trace
from stepdistill.progress import say
from stepdistill.session import Session

ROWS = 2


@torch.no_grad()
def check_stock_call(session: Session) -> float:
    """Compare a plain call with the training-time sampler, as :func:`stepdistill.exporting.export.verify` does at last.

    Returns:
        How far they are apart, relative to the largest value.

    Raises:
        InputError: the call fails, or is another sampler than the one that is trained.
    """
    traced, sampler, began = session.trace, session.sampler, time.perf_counter()
    rows = torch.arange(ROWS) % len(session.conditioning)
    entries = [session.conditioning.entries[i] for i in rows.tolist()]
    call = stock_arguments(traced, entries, sampler.steps, output_type="latent")
    network = getattr(traced.pipeline, traced.component)
    name, calls = type(traced.pipeline).__name__, f"a plain call in {sampler.steps} steps without guidance"
    with (
        patched(traced.pipeline, "scheduler", copy.deepcopy(sampler.scheduler)),
        patched(network, "forward", stand_in(traced, _answer)),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            with forked_random(session.device):
                stock = stock_call.record(traced.pipeline, call)
        except (InputError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"teacher.pipeline: {calls} of {name} fails: {reason}{_remedy(traced)}") from error
        ours = repeated(session, traced.denoiser.on(network), rows, stock)
    error = deviation(stock["latents"], ours.cpu())
    limit = max(TOLERANCE + sampler.rounding, tolerance(network.dtype))
    if not error <= limit:
        raise InputError(
            f"teacher.pipeline: {calls} of {name} differs from sampler {sampler.name} by {error:.1e} (allowed "
            f"{limit:.0e}), so that no export of the student would repeat what is trained{_remedy(traced)}"
        )
    seconds = time.perf_counter() - began
    say(f"a plain call of {name} runs sampler {sampler.name} ({ROWS} samples without the network, {seconds:.1f} s)")
    return error


def _answer(x: Tensor) -> Tensor:
    """What stands in for the network: no two samples get the same, and rounding grows little."""
    return x.sin() / 2


def _remedy(traced: Trace) -> str:
    """What is known to make a pipeline do something else between its steps, and what to do about it; may be empty."""
    arguments: dict[str, Any] = traced.arguments
    if arguments.get("eta"):
        return f"; leave teacher.arguments.eta out (found {arguments['eta']}), which adds noise at each step"
    if "mask_image" in arguments and traced.denoiser.spec.appended is None:
        return (
            "; it puts its picture into the latents after each step, as its network takes no mask: use an inpainting "
            "network, which takes the mask beside the latents (9 channels in Stable Diffusion)"
        )
    return ""
