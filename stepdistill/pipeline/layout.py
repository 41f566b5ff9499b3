"""How a pipeline packs, scales and shifts latents before its autoencoder: read off its own decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.devices import DeviceTable
from stepdistill.errors import InputError
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import deviation, tolerance
from stepdistill.pipeline.components import patched
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.modular import free_hooks
from stepdistill.pipeline.trace import Trace

# Digits small enough to be exact in bfloat16.
BASE = 32


@dataclass(frozen=True)
class Layout:
    """What the pipeline makes of latents before its autoencoder: z = scale * latents[order] + shift, all flattened.

    Args:
        shape: of one z; where ``frames`` of a video are decoded one by one, (F, ...).
        order: for each element of z, the latents' element (N,).
        scale: (N,).
        shift: (N,).
        frames: the autoencoder sees the frames of a video as so many pictures.
    """

    shape: tuple[int, ...]
    order: Tensor
    scale: Tensor
    shift: Tensor
    frames: bool = False

    @cached_property
    def _tables(self) -> list[DeviceTable]:
        return [DeviceTable(value) for value in (self.order, self.scale, self.shift)]

    def to_z(self, latents: Tensor) -> Tensor:
        """(B, *latent shape) -> (B, *shape), with graph."""
        order, scale, shift = (table.on(latents.device) for table in self._tables)
        return (latents.flatten(1)[:, order] * scale + shift).reshape(-1, *self.shape)

    def from_z(self, z: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        """The inverse of :meth:`to_z`."""
        latents = torch.empty_like(z.flatten(1))
        latents[:, self.order] = (z.flatten(1) - self.shift) / self.scale
        return latents.reshape(-1, *latent_shape)


class _Seen(Exception):
    """Raised in place of the autoencoder's work."""


def layout(trace: Trace) -> Layout:
    """How the pipeline hands latents to its autoencoder, from one call with latents that number their elements.

    Raises:
        InputError: the pipeline has no autoencoder.
        TraceError: it does something else than scale, shift and rearrange them.
    """
    vae = autoencoder(trace.pipeline)
    if trace.denoiser.spec.joint is not None:
        parts = " and ".join(part.argument for part in trace.denoiser.spec.joint.parts)
        raise TraceError("decode", f"a sample is several at once ({parts}), of which no image is more than one")
    count = torch.Size(trace.latent_shape).numel()
    index = torch.arange(count)
    digits = [index // BASE**k % BASE for k in range(next(k for k in range(1, 9) if BASE**k >= count))]
    check = torch.randn(count, generator=torch.Generator().manual_seed(0))
    probes = torch.stack([torch.zeros(count), torch.ones(count), check, *(digit.float() for digit in digits)])

    for together in (len(probes), 1):
        seen = _handed_over(trace, vae, probes, together)
        if found := _read(seen, probes, tolerance(trace.network.dtype), frames=together == 1):
            return found
    raise TraceError(
        "decode", f"{type(trace.pipeline).__name__} does more to its latents than to scale, shift and rearrange them"
    )


def _handed_over(trace: Trace, vae: Any, probes: Tensor, together: int) -> list[Tensor]:
    """What the autoencoder is given of ``probes`` (N, count), of so many at once; nothing where it is not called.

    Neither decode() nor a pipeline must hand over all at once: what is left goes into the next call. Of one at a time,
    what the autoencoder's first call is given counts.
    """
    seen: list[Tensor] = []

    def stop(z: Tensor, *_: Any, **__: Any) -> None:
        seen.append(z.detach().float().cpu())
        raise _Seen

    with patched(vae, "decode", stop):
        while (done := len(seen) if together == 1 else sum(map(len, seen))) < len(probes):
            chosen = probes[done : done + together]
            try:
                decode(trace, chosen.reshape(-1, *trace.latent_shape), batch=together)
                return []
            except _Seen:
                free_hooks(trace.pipeline)
    return seen


def _read(seen: Sequence[Tensor], probes: Tensor, precision: float, frames: bool) -> Layout | None:
    """The layout that ``seen`` shows of zeros, ones, random numbers and digits of numbers; None if it is another."""
    if frames:
        seen = [one.unsqueeze(0) for one in seen]
    z = torch.cat([*seen]).flatten(1) if seen else torch.empty(0, 0)
    if z.shape != probes.shape:
        return None
    shift, scale = z[0], z[1] - z[0]
    order = sum(((row - shift) / scale).round().long() * BASE**k for k, row in enumerate(z[3:]))
    right = torch.equal(order.sort()[0], torch.arange(probes.shape[1]))
    if not right or deviation(scale * probes[2, order] + shift, z[2]) > precision:
        return None
    return Layout(tuple(seen[0].shape[1:]), order, scale, shift, frames)


def autoencoder(pipeline: Any) -> Any:
    """The pipeline's, which encodes images.

    Raises:
        InputError: it has none.
    """
    vae = getattr(pipeline, "vae", None)
    if vae is None or not hasattr(vae, "encode"):
        raise InputError(f"data.images: {type(pipeline).__name__} has no autoencoder to encode images with")
    return vae
