"""Real images as the pipeline's own latents."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.pipeline.trace import Trace
from stepdistill.progress import say


def image_shape(pipeline: Any) -> tuple[int, int]:
    """(channels, side) of the images a latent pipeline makes, in pixels."""
    vae = _autoencoder(pipeline)
    return vae.config.in_channels, vae.config.sample_size


@torch.no_grad()
def encode_images(trace: Trace, images: Tensor, cache: Path | None = None, batch: int = 250) -> Tensor:
    """Posterior means of ``images`` uint8 (N, C, H, W), shifted and scaled as the denoiser wants them.

    Args:
        cache: folder; the file's name is a hash of the images and of the autoencoder's weights.

    Raises:
        InputError: the pipeline has no autoencoder, or its latents are not what the denoiser takes.
    """
    vae = _autoencoder(trace.pipeline)
    file = cache / f"latents-{_key(vae, images)}.safetensors" if cache else None
    if file is not None and file.exists():
        return load_file(file)["latents"]
    say(f"encoding {len(images)} images")
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    device, dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
    parts = [vae.encode(x.to(device, dtype) / 127.5 - 1).latent_dist.mean for x in images.split(batch)]
    latents = (torch.cat(parts).float().cpu() - shift) * scale
    if latents.shape[1:] != trace.latent_shape:
        raise InputError(
            f"data.images: this pipeline's denoiser takes latents of shape {tuple(trace.latent_shape)}, its "
            f"autoencoder makes {tuple(latents.shape[1:])}; packed latents are not supported with real images"
        )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".partial")
        save_file({"latents": latents}, draft)
        draft.rename(file)
    return latents


def decoder(pipeline: Any) -> Callable[[Tensor], Tensor] | None:
    """Latents (B, ...) -> images (B, C, H, W) in about [-1, 1], with graph; None for a pipeline without autoencoder."""
    vae = getattr(pipeline, "vae", None)
    if vae is None or not hasattr(vae, "decode"):
        return None
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, getattr(vae.config, "scaling_factor", 1.0)
    vae.requires_grad_(False)
    return lambda latents: vae.decode((latents / scale + shift).to(vae.dtype), return_dict=False)[0]


def _autoencoder(pipeline: Any) -> Any:
    vae = getattr(pipeline, "vae", None)
    if vae is None or not hasattr(vae, "encode"):
        raise InputError(f"data.images: {type(pipeline).__name__} has no autoencoder to encode images with")
    return vae


def _key(vae: Any, images: Tensor) -> str:
    digest = hashlib.sha256(images.numpy().tobytes())
    for name, parameter in sorted(vae.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
