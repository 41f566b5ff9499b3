"""Real images as the pipeline's own latents, and back: its packing and scaling are read off its own decoding."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.device_table import DeviceTable
from stepdistill.errors import InputError
from stepdistill.generation.generate import at_once, decode
from stepdistill.host_rows import HostRows
from stepdistill.pipeline.compare import deviation, tolerance
from stepdistill.pipeline.load import quiet
from stepdistill.pipeline.observe import TraceError, patched
from stepdistill.pipeline.trace import Trace
from stepdistill.progress import say
from stepdistill.tensor_cache import cached

# Digits small enough to be exact in bfloat16.
BASE = 32


@dataclass(frozen=True)
class Layout:
    """What the pipeline makes of latents before its autoencoder: z = scale * latents[order] + shift, all flattened.

    Args:
        shape: of one z. order: for each element of z, the latents' element (N,). scale, shift: (N,) each.
    """

    shape: tuple[int, ...]
    order: Tensor
    scale: Tensor
    shift: Tensor

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
    vae, seen = _autoencoder(trace.pipeline), []
    count = torch.Size(trace.latent_shape).numel()
    index = torch.arange(count)
    digits = [index // BASE**k % BASE for k in range(next(k for k in range(1, 9) if BASE**k >= count))]
    check = torch.randn(count, generator=torch.Generator().manual_seed(0))
    probes = torch.stack([torch.zeros(count), torch.ones(count), check, *(digit.float() for digit in digits)])

    def stop(z: Tensor, *_: Any, **__: Any) -> None:
        seen.append(z.detach().float().cpu())
        raise _Seen

    # Neither decode() nor a pipeline must hand over all probes at once: what is left goes into the next call.
    with patched(vae, "decode", stop):
        while (done := sum(map(len, seen))) < len(probes):
            try:
                decode(trace, probes[done:].reshape(-1, *trace.latent_shape), batch=len(probes))
                break  # without its autoencoder
            except _Seen:
                trace.pipeline.maybe_free_model_hooks()
    z = torch.cat(seen).flatten(1) if seen else torch.empty(0, 0)
    if len(z) == len(probes):
        shift, scale = z[0], z[1] - z[0]
        order = sum(((row - shift) / scale).round().long() * BASE**k for k, row in enumerate(z[3:]))
        precision = tolerance(trace.denoiser.network.dtype)
        if torch.equal(order.sort()[0], index) and deviation(scale * check[order] + shift, z[2]) <= precision:
            return Layout(tuple(seen[0].shape[1:]), order, scale, shift)
    raise TraceError(
        "decode", f"{type(trace.pipeline).__name__} does more to its latents than to scale, shift and rearrange them"
    )


def image_shape(trace: Trace) -> tuple[int, int]:
    """(channels, side) of the images that the pipeline makes, in pixels.

    Raises:
        InputError: they are not square.
    """
    channels, height, width = decode(trace, torch.zeros(1, *trace.latent_shape)).shape[1:]
    if height != width:
        raise InputError(f"data.images: expected a pipeline of square images, found {width} x {height} pixels")
    return channels, height


@torch.no_grad()
def encode_images(trace: Trace, images: Tensor, cache: Path | None = None) -> Tensor:
    """Posterior means of ``images`` uint8 (N, C, H, W), laid out and scaled as the denoiser wants them.

    Args:
        cache: folder; the file's name is a hash of the images and of the autoencoder's weights.

    Raises:
        InputError: the pipeline has no autoencoder, or its latents are not what the denoiser takes (a video's).
    """
    vae = _autoencoder(trace.pipeline)
    file = cache / f"latents-{_key(trace, vae, images)}.safetensors" if cache else None
    return cached(file, lambda: {"latents": _encoded(trace, vae, images)})["latents"]


def _encoded(trace: Trace, vae: Any, images: Tensor) -> Tensor:
    say(f"encoding {len(images)} images")
    own, device = layout(trace), next(vae.parameters()).device
    kept, done = HostRows(len(images)), 0
    with _in_float32(vae):
        for chunk in images.split(at_once(images.shape[1:], 2**22)):  # one of 1024 px, five of 512
            pixels = chunk.to(device).float() / 127.5 - 1
            encoded = vae.encode(pixels.unsqueeze(2) if len(own.shape) == 4 else pixels)
            # The latents themselves have two names: of autoencoders in general, and of AutoencoderTiny.
            given = encoded.get("latent", encoded.get("latents"))
            z = (encoded.latent_dist.mean if "latent_dist" in encoded else given).cpu()
            if z.shape[1:] != own.shape:
                raise InputError(
                    f"data.images: this pipeline decodes latents of shape {own.shape}, its autoencoder makes "
                    f"{tuple(z.shape[1:])} of an image"
                )
            kept.write(done, {"latents": own.from_z(z.float(), trace.latent_shape)})
            done += len(chunk)
    return kept.tensors["latents"]


@contextmanager
def _in_float32(network: nn.Module) -> Iterator[None]:
    """A network in float32 inside the block: real latents serve the whole run, and are not rounded in every layer."""
    dtype = next(network.parameters()).dtype
    if dtype == torch.float32:
        yield
        return
    with quiet():
        network.float()
    try:
        yield
    finally:
        with quiet():
            network.to(dtype)


def decoder(trace: Trace) -> Callable[[Tensor], Tensor] | None:
    """Latents (B, ...) -> images (B, C, H, W) in about [-1, 1], with graph; None for a pipeline without autoencoder.

    Of a video its middle frame.
    """
    vae = getattr(trace.pipeline, "vae", None)
    if vae is None or not hasattr(vae, "decode"):
        return None
    vae.requires_grad_(False)
    learned = cache(lambda: layout(trace))  # only for the methods that decode

    def decoded(latents: Tensor) -> Tensor:
        images = vae.decode(learned().to_z(latents).to(vae.dtype), return_dict=False)[0]
        return images[:, :, images.shape[2] // 2] if images.ndim == 5 else images

    return decoded


def _autoencoder(pipeline: Any) -> Any:
    vae = getattr(pipeline, "vae", None)
    if vae is None or not hasattr(vae, "encode"):
        raise InputError(f"data.images: {type(pipeline).__name__} has no autoencoder to encode images with")
    return vae


def _key(trace: Trace, vae: Any, images: Tensor) -> str:
    digest = hashlib.sha256(images.contiguous().numpy())
    digest.update(f"{type(trace.pipeline).__name__} {trace.latent_shape}".encode())
    if vae.dtype != torch.float32:
        digest.update(b"encoded in float32")  # earlier versions did not
    for name, parameter in sorted(vae.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
