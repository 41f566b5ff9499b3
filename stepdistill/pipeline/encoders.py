"""Encoders after their work: once all conditions are known, training needs the memory that they take."""

from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import send_to_device
from torch import nn

from stepdistill.files import digest
from stepdistill.pipeline.complete import classes
from stepdistill.pipeline.load import load_network
from stepdistill.pipeline.trace import Trace


def release_encoders(trace: Trace, device: torch.device) -> None:
    """Free the weights of the networks that make conditions; a later call reads them from their files again.

    A preview is decoded by the pipeline's own call, which encodes the same prompt every time: it is encoded once, on
    the CPU, and the answer is sent to ``device``. Encoders that have no files of their own rest in the host's memory.
    """
    for name in trace.encoders:
        encoder, place = getattr(trace.pipeline, name), _files(trace.pipeline, name)
        remove_hook_from_module(encoder)  # of one at rest
        if place is None:
            encoder.to("cpu")
            encoder.register_forward_pre_hook(lambda _, *given: send_to_device(given, "cpu"), with_kwargs=True)
            encoder.register_forward_hook(lambda _module, _inputs, output: send_to_device(output, device))
            continue
        encoder.forward = _Reader(type(encoder), *place, encoder.dtype, device)
        for weight in encoder.parameters():
            # Of the same shape, dtype and place as a weight in the host's memory, without the memory.
            weight.data = torch.zeros((), dtype=weight.dtype).expand(weight.shape)


class _Reader:
    """The forward pass of a network that is read from ``folder`` for the call; its answers are kept."""

    def __init__(self, kind: type, folder: Path, variant: str | None, dtype: torch.dtype, device: torch.device):
        self.kind, self.folder, self.variant, self.dtype, self.device = kind, folder, variant, dtype, device
        self.answers: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (key := digest(args, kwargs)) not in self.answers:
            network = load_network(self.kind, self.folder, self.variant).to(self.dtype)
            self.answers[key] = network(*send_to_device(args, "cpu"), **send_to_device(kwargs, "cpu"))
        return send_to_device(self.answers[key], self.device)


def _files(pipeline: Any, name: str) -> tuple[Path, str | None] | None:
    """(folder, variant) of a component's own files; None for one that was not loaded with its pipeline."""
    folder, variant = getattr(pipeline, "loaded_from", (None, None))
    if folder is None or not isinstance(network := getattr(pipeline, name), nn.Module):
        return None
    own = classes(folder).get(name, ("", ""))[1] == type(network).__name__ and (folder / name).is_dir()
    return (folder / name, variant) if own else None
