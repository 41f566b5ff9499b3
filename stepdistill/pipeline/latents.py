"""Real images as the pipeline's own latents, and back: its packing and scaling are read off its own decoding."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stepdistill.data.buckets import Bucket
from stepdistill.data.host_rows import HostRows
from stepdistill.data.identity import identity
from stepdistill.data.images import Item, close_tally, image_count, stream
from stepdistill.data.sample import Data, Tally
from stepdistill.data.shards import Chunk, Content, Share
from stepdistill.data.store import Store, ensure
from stepdistill.diffusion.devices import DeviceTable
from stepdistill.errors import InputError
from stepdistill.files import digest
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import deviation, tolerance
from stepdistill.pipeline.components import patched
from stepdistill.pipeline.decode import at_once, decode
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.modular import free_hooks
from stepdistill.pipeline.resting import rest
from stepdistill.pipeline.trace import Trace

# Digits small enough to be exact in bfloat16.
BASE = 32


@dataclass(frozen=True)
class Layout:
    """What the pipeline makes of latents before its autoencoder: z = scale * latents[order] + shift, all flattened.

    Args:
        shape: of one z.
        order: for each element of z, the latents' element (N,).
        scale: (N,).
        shift: (N,).
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
    if trace.denoiser.spec.joint is not None:
        parts = " and ".join(part.argument for part in trace.denoiser.spec.joint.parts)
        raise TraceError("decode", f"a sample is several at once ({parts}), of which no image is more than one")
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
                free_hooks(trace.pipeline)
    z = torch.cat(seen).flatten(1) if seen else torch.empty(0, 0)
    if len(z) == len(probes):
        shift, scale = z[0], z[1] - z[0]
        order = sum(((row - shift) / scale).round().long() * BASE**k for k, row in enumerate(z[3:]))
        precision = tolerance(trace.network.dtype)
        if torch.equal(order.sort()[0], index) and deviation(scale * check[order] + shift, z[2]) <= precision:
            return Layout(tuple(seen[0].shape[1:]), order, scale, shift)
    raise TraceError(
        "decode", f"{type(trace.pipeline).__name__} does more to its latents than to scale, shift and rearrange them"
    )


def image_shape(trace: Trace) -> tuple[int, int]:
    """(channels, side) of the square images that the pipeline makes, in pixels.

    Raises:
        InputError: they are not square.
    """
    channels, height, width = picture_shape(trace)
    if height != width:
        raise InputError(f"expected a pipeline of square images, found {width} x {height} pixels")
    return channels, height


def picture_shape(trace: Trace) -> tuple[int, ...]:
    """(channels, height, width) of the images that the pipeline makes."""
    return tuple(decode(trace, torch.zeros(1, *trace.latent_shape)).shape[1:])


def encode_images(trace: Trace, images: Tensor) -> Tensor:
    """Posterior means of ``images`` uint8 (N, C, H, W), laid out and scaled as the denoiser wants them.

    Raises:
        InputError: the pipeline has no autoencoder, or its latents are not what the denoiser takes (a video's).
    """
    storage, done = HostRows(len(images)), 0
    with _encoding(trace) as encoded:
        for chunk in images.split(_together(images.shape[1:])):
            storage.write(done, {"latents": encoded(chunk)})
            done += len(chunk)
    return storage.tensors["latents"]


def store_images(
    trace: Trace,
    data: Data,
    cache: Path | None = None,
    share: Share | None = None,
    verify: bool = False,
    bucket: Bucket | None = None,
    log: bool = True,
) -> Store:
    """The latents of ``data.images`` and the caption of each, as UTF-8 bytes; only a few images are ever in memory.

    Args:
        cache: folder for the store, whose name is a hash of the source's listing and of the autoencoder; None: a
            temporary one.
        share: the processes that fill it together; None: this one.
        verify: compare the hashes of its files, however many there are.
        bucket: the images of this bucket, whose size is the trace's; None: all, their middle parts.
        log: log how many images cannot be used.

    Raises:
        InputError: the pipeline has no autoencoder, its latents are not what the denoiser takes (a video's) or not
            finite; more than ``data.max_rejected`` images cannot be used, or there are none.
    """
    vae, temporary = _autoencoder(trace.pipeline), None
    if cache is None:
        temporary = TemporaryDirectory(prefix="stepdistill-", ignore_cleanup_errors=True)
        cache = Path(temporary.name)
    shape = picture_shape(trace)
    settings = {name: str(value) for name, value in vae.config.items() if name[0] != "_"}  # wherever it was loaded from
    network = type(trace.pipeline).__name__, settings, dict(vae.named_parameters())
    source = bucket and bucket.source
    if source is None:
        source = "fashion-mnist" if data.images == "fashion-mnist" else identity(data.images)
    keys = data.caption_key, data.image_key, data.limit, data.arguments
    keys += () if bucket is None else (bucket.sizes, bucket.number, bucket.seed)
    key = digest(network, trace.latent_shape, shape, source, keys)
    store = ensure(cache / f"latents-{key}", key, lambda: _content(trace, data, shape, bucket), share, verify)
    store.temporary = temporary  # it goes when the store goes
    tally = Tally("data.images", data.max_rejected)
    for shard in store.index["shards"]:
        tally.add(shard["tally"])
    close_tally(tally, data, log)
    return store


def _content(trace: Trace, data: Data, shape: tuple[int, ...], bucket: Bucket | None) -> Content:
    together = _together(shape)

    def make(first: int, last: int) -> Iterator[Chunk]:
        every = Tally("data.images", data.max_rejected)
        part = Tally("data.images", 1.0)
        items = stream(data, shape, part, first, last, bucket)
        with _encoding(trace) as encoded:
            while chunk := list(islice(items, together)):
                usable = [item for item in chunk if item is not None]
                rows = _rows(encoded, usable) if usable else {}
                yield Chunk(rows, len(usable), len(chunk), part.facts())
                every.add(part.facts())
                part.clear()

    row = 4 * torch.Size(trace.latent_shape).numel()
    return Content("images", image_count(data), together, row, make)


def _rows(encoded: Callable[[Tensor], Tensor], items: list[Item]) -> dict[str, Tensor]:
    latents = encoded(torch.stack([item.image for item in items]))
    captions = [
        torch.frombuffer(bytearray(item.condition.encode("utf-8", "surrogatepass")), dtype=torch.uint8)
        for item in items
    ]
    finite = latents.flatten(1).isfinite().all(1)
    if not finite.all():
        wrong = items[int(finite.logical_not().nonzero()[0])]
        raise InputError(
            f"data.images: the autoencoder makes numbers that are not finite of {wrong.name} ({wrong.condition!r})"
        )
    return {"latents": latents, "caption": pad_sequence(captions, batch_first=True)}


def captions_of(store: Store) -> tuple[list[str], Tensor]:
    """The different captions of :func:`store_images` in order, and the number of each image's one (N,)."""
    known: dict[str, int] = {}
    numbers, rows = [], store.rows("")["caption"]
    for start in range(0, len(rows), 4096):
        for row in rows[start : start + 4096].numpy():
            caption = row.tobytes().rstrip(b"\0").decode("utf-8", "surrogatepass")
            numbers.append(known.setdefault(caption, len(known)))
    return list(known), torch.tensor(numbers)


def _together(shape: Sequence[int]) -> int:
    """Images (C, H, W) that are encoded at once: one of 1024 px, five of 512."""
    return at_once(tuple(shape), 2**22)


@contextmanager
def _encoding(trace: Trace) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function inside: images uint8 (B, C, H, W) -> latents (B, ...) float32, in the host's memory."""
    vae = _autoencoder(trace.pipeline)
    own, device = layout(trace), next(trace.network.parameters()).device

    @torch.no_grad()
    def encoded(images: Tensor) -> Tensor:
        pixels = images.to(device).float() / 127.5 - 1
        encoded = vae.encode(pixels.unsqueeze(2) if len(own.shape) == 4 else pixels)
        # The latents themselves have two names: of autoencoders in general, and of AutoencoderTiny.
        given = encoded.get("latent", encoded.get("latents"))
        z = (encoded.latent_dist.mean if "latent_dist" in encoded else given).cpu()
        if z.shape[1:] != own.shape:
            raise InputError(
                f"data.images: this pipeline decodes latents of shape {own.shape}, its autoencoder makes "
                f"{tuple(z.shape[1:])} of an image"
            )
        return own.from_z(z.float(), trace.latent_shape)

    with _in_float32(vae):
        yield encoded
    rest(trace.pipeline)


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
