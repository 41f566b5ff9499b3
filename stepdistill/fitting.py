"""Pipelines that fit a protocol of classes: what a benchmark of the embedded data set can measure."""

from dataclasses import dataclass
from typing import Any

import torch

from stepdistill.errors import InputError
from stepdistill.eval.protocol import Protocol
from stepdistill.eval.row_cache import weights_digest
from stepdistill.generation.generate import decode
from stepdistill.pipeline.conditioning import Conditioning, class_count, encode
from stepdistill.pipeline.trace import Trace


@dataclass(frozen=True)
class Model:
    """A traced pipeline with the protocol's classes encoded."""

    trace: Trace
    conditioning: Conditioning
    weights: str

    @property
    def scheduler(self) -> Any:
        """A fresh copy of the pipeline's own scheduler."""
        own = self.trace.pipeline.scheduler
        return type(own).from_config(own.config)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.trace.denoiser.network.parameters())


def fit(traced: Trace, protocol: Protocol, path: str, device: torch.device) -> Model:
    """The model with the protocol's classes as conditions; raises as :func:`check_fit` does."""
    check_fit(traced, protocol, path)
    conditioning = encode(traced, range(len(protocol.labels)), None).to(device)
    return Model(traced, conditioning, weights_digest(traced.pipeline))


def check_fit(traced: Trace, protocol: Protocol, path: str) -> None:
    """Raises InputError unless the pipeline at ``path`` makes what the protocol measures.

    That is: images of the protocol's shape, conditioned on its classes.
    """
    # Not "exactly": a stock DiT folder may have lost its labels, and then counts the classes it could embed.
    if (found := class_count(traced)) < len(protocol.labels):
        kind = type(traced.pipeline).__name__
        expected = f"protocol {protocol.id} expects {len(protocol.labels)} classes, {kind} has {found}"
        raise InputError(f"{path}: {expected}; --protocol teacher-fid-5k-v1 measures any pipeline")
    device = next(traced.denoiser.network.parameters()).device
    probe = decode(traced, torch.zeros(1, *traced.latent_shape, device=device))
    if tuple(probe.shape[1:]) != protocol.image:
        found = tuple(probe.shape[1:])
        raise InputError(f"{path}: protocol {protocol.id} expects images of shape {protocol.image}, found {found}")
