"""Real images, videos and sounds as the pipeline's own latents, and back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from stepdistill.data.buckets import Bucket
from stepdistill.data.decoding import NAMES, Medium
from stepdistill.data.host_rows import HostRows
from stepdistill.data.identity import identity
from stepdistill.data.images import Item, close_tally, image_count, stream
from stepdistill.data.sample import READY, Data, Sample, Tally
from stepdistill.data.shards import Chunk, Content, Share
from stepdistill.data.store import Store, ensure
from stepdistill.errors import InputError
from stepdistill.files import digest
from stepdistill.pipeline.decode import as_pictures, at_once, decode, played
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.layout import Layout, autoencoder, layout
from stepdistill.pipeline.resting import rest
from stepdistill.pipeline.trace import Trace


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


def medium(trace: Trace, frame_rate: float | None = None) -> Medium:
    """What the pipeline makes of one sample, as its real ones are to be.

    Args:
        frame_rate: at which real videos are read; None: all frames of theirs.
    """
    ((made, _),) = played(trace, torch.zeros(1, *trace.latent_shape))
    if made.ndim == 5:
        return Medium(tuple(made.shape[1:]), frame_rate)
    if made.ndim > 3:
        return Medium(tuple(as_pictures(made, 1).shape[1:]))
    return Medium((1, *made.shape[1:])[-2:], sampling_rate(trace.pipeline))


def sampling_rate(pipeline: Any) -> int:
    """Of the sounds that a pipeline makes, in samples a second, as one of its parts states it.

    Raises:
        InputError: none does.
    """
    # The part that is last comes first; feature extractors state the rate of what a network listens to.
    chosen = dict.fromkeys(("vocoder", "vae", *pipeline.components))
    parts = [getattr(pipeline, name, None) for name in chosen if name != "feature_extractor"]
    for part in (*parts, pipeline):
        for place in (part, getattr(part, "config", None)):
            for name in ("sampling_rate", "sample_rate"):
                if isinstance(rate := getattr(place, name, None), int):
                    return rate
    raise InputError(f"{type(pipeline).__name__}: expected a part that states the sampling_rate of its sounds")


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
    vae, temporary = autoencoder(trace.pipeline), None
    if cache is None:
        temporary = TemporaryDirectory(prefix="stepdistill-", ignore_cleanup_errors=True)
        cache = Path(temporary.name)
    made = medium(trace, data.frame_rate)
    if data.frame_rate is not None and made.name != "video":
        raise InputError(f"data.frame_rate: expected null for a pipeline of {made.name}s, found {data.frame_rate:g}")
    settings = {name: str(value) for name, value in vae.config.items() if name[0] != "_"}  # wherever it was loaded from
    network = type(trace.pipeline).__name__, settings, dict(vae.named_parameters())
    source = bucket and bucket.source
    if source is None:
        source = "fashion-mnist" if data.images == "fashion-mnist" else identity(data.images)
    keys = data.caption_key, data.image_key, data.limit, data.arguments
    keys += () if bucket is None else (bucket.sizes, bucket.number, bucket.seed)
    keys += () if made.rate is None else (made.rate,)
    key = digest(network, trace.latent_shape, made.shape, source, keys)
    store = ensure(cache / f"latents-{key}", key, lambda: _content(trace, data, made, bucket), share, verify)
    store.temporary = temporary  # it goes when the store goes
    tally = Tally("data.images", data.max_rejected)
    for shard in store.index["shards"]:
        tally.add(shard["tally"])
    close_tally(tally, data, log)
    return store


def _content(trace: Trace, data: Data, kind: Medium, bucket: Bucket | None) -> Content:
    together = _together(kind.shape)

    def make(first: int, last: int) -> Iterator[Chunk]:
        every = Tally("data.images", data.max_rejected)
        part = Tally("data.images", 1.0)
        items = stream(data, kind, part, first, last, bucket)
        own = cache(lambda: layout(trace))  # only where latents were made ahead
        with _encoding(trace) as encoded:
            while chunk := list(islice(items, together)):
                usable = [item for item in chunk if item is not None]
                usable = [item for item in usable if not item.ready or _fits(own(), item, part)]
                rows = _rows(_latents(encoded, own, usable, trace), usable) if usable else {}
                yield Chunk(rows, len(usable), len(chunk), part.facts())
                every.add(part.facts())
                part.clear()

    row = 4 * torch.Size(trace.latent_shape).numel()
    return Content("images", image_count(data), together, row, make)


def _latents(
    encoded: Callable[[Tensor], Tensor], own: Callable[[], Layout], items: Sequence[Item], trace: Trace
) -> Tensor:
    """Of each item the latents (B, ...): encoded together, or those that were made ahead."""
    found = [item.image for item in items if not item.ready]
    made = iter(encoded(torch.stack(found)) if found else ())
    return torch.stack(
        [
            _laid_out(own(), item.image.reshape(1, *own().shape), trace, item.name)[0] if item.ready else next(made)
            for item in items
        ]
    )


def _fits(own: Layout, item: Item, tally: Tally) -> bool:
    """Whether latents that were made ahead have the shape of the autoencoder's, alone or as a batch of one."""
    if tuple(item.image.shape) in (own.shape, (1, *own.shape)):
        return True
    tally.reject(Sample(item.name), f"latents of another shape: {tuple(item.image.shape)}, expected {own.shape}")
    return False


def _rows(latents: Tensor, items: list[Item]) -> dict[str, Tensor]:
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
    """A function inside: images uint8 (B, C, H, W), videos uint8 (B, F, C, H, W) or sounds float (B, channels, length)
    -> latents (B, ...) float32, in the host's memory."""
    vae = autoencoder(trace.pipeline)
    own, device = layout(trace), next(trace.network.parameters()).device

    @torch.no_grad()
    def encoded(samples: Tensor) -> Tensor:
        given = samples.to(device)
        if samples.dtype == torch.uint8:
            given = given.float() / 127.5 - 1
        elif len(own.shape) > 2:
            raise InputError(
                "data.images: the autoencoder of this pipeline takes spectrograms, which the pipeline does not make of "
                f"a sound; expected latents made ahead, {READY} files"
            )
        elif (missing := own.shape[-1] * getattr(vae, "hop_length", 0) - given.shape[-1]) > 0:
            given = functional.pad(given, (0, missing))  # with silence, where the pipeline cuts its sounds
        if own.frames or (samples.ndim == 5 and len(own.shape) == 3):  # the second: of one frame
            given = given.flatten(0, 1)
        elif samples.ndim == 5:
            given = given.movedim(1, 2)
        elif len(own.shape) == 4:
            given = given.unsqueeze(2)
        made = vae.encode(given)
        # The latents themselves have two names: of autoencoders in general, and of AutoencoderTiny.
        z = made.latent_dist.mean if "latent_dist" in made else made.get("latent", made.get("latents"))
        z = z.unflatten(0, (len(samples), -1)) if own.frames else z
        return _laid_out(own, z.cpu(), trace, f"one {NAMES[samples.ndim - 1]}")

    with _in_float32(vae):
        yield encoded
    rest(trace.pipeline)


def _laid_out(own: Layout, z: Tensor, trace: Trace, of: str) -> Tensor:
    """What the autoencoder made (B, ...) as the denoiser's latents.

    Raises:
        InputError: they have another shape.
    """
    if z.shape[1:] != own.shape:
        raise InputError(
            f"data.images: this pipeline decodes latents of shape {own.shape}, found {tuple(z.shape[1:])} of {of}"
        )
    return own.from_z(z.float(), trace.latent_shape)


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
        z = learned().to_z(latents).to(vae.dtype)
        if learned().frames:
            z = z[:, z.shape[1] // 2]
        images = vae.decode(z, return_dict=False)[0]
        return images[:, :, images.shape[2] // 2] if images.ndim == 5 else images

    return decoded
