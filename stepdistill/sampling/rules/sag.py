"""Self-attention guidance, SAG (Hong et al. 2023): away from the prediction for a sample that is blurred
where attention is highest."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import Pair
from stepdistill.diffusion.schedule import Prediction
from stepdistill.errors import InputError
from stepdistill.sampling.rules.steps import Step, StepRule

# The paper's: attention is 1 on average, and the blur is of 9 latent pixels.
THRESHOLD, KERNEL, BLUR = 1.0, 9, 1.0


def self_attention(scale: float, strength: float = 0.75) -> StepRule:
    """eps <- guided eps + strength (eps - worse eps): that of a sample whose x_0 is blurred where it is attended most.

    Args:
        scale: w of classifier-free guidance; eps, the blurred one and the attention are the unconditional ones where it
            is on, else the conditional ones.
        strength: s, 0.75 for Stable Diffusion.

    Raises:
        InputError: the network has no self-attention over image tokens alone, or its latents are no images.
    """

    def rule(denoiser: Denoiser, step: Step) -> Prediction:
        x_t, t, schedule, kind = step.x_t, step.t, denoiser.schedule, denoiser.kind
        cond = step.cond if scale == 1 else step.null
        with attention_weights(denoiser.network) as seen:
            base = denoiser(x_t, t, cond)
        blurred = torch.where(attended(seen, x_t) > THRESHOLD, gaussian_blur(base.x0), base.x0)
        worse = denoiser(schedule.add_noise(blurred, base.eps, t).to(x_t.dtype), t, cond)
        guided = base
        if scale != 1:
            guided = Pair(denoiser, denoiser(x_t, t, step.cond), base.raw, scale).prediction
        # As alpha x_0 + sigma eps is the sample in either case, sigma (eps - worse eps) = alpha (worse x_0 - blurred).
        x0 = guided.x0 + strength * (blurred - worse.x0)
        raw = schedule.from_x0(x0, x_t.to(x0), t, kind)
        return Prediction(raw, x_t, t, schedule, kind)

    return rule


@contextlib.contextmanager
def attention_weights(network: nn.Module) -> Iterator[dict[str, Tensor | int]]:
    """The queries and keys (B, tokens, width) of the middle self-attention, and its heads, once the network was called.

    That of a UNet's middle block, or of the middle one of a chain of blocks.
    """
    inside = getattr(network, "mid_block", None) or network
    own = [one for one in inside.modules() if getattr(one, "is_cross_attention", None) is False]
    own = [one for one in own if getattr(one, "add_k_proj", None) is None and getattr(one, "norm_q", None) is None]
    if not own:
        raise InputError(f"rule: sag reads the self-attention of an image, and {type(network).__name__} has none")
    attention = own[len(own) // 2]
    seen: dict[str, Tensor | int] = {"heads": attention.heads}
    handles = [
        getattr(attention, f"to_{name}").register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in ("q", "k")
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def attended(seen: dict[str, Tensor | int], x_t: Tensor) -> Tensor:
    """How much each latent pixel is looked at by all (B, 1, H, W), 1 on average, from the coarser tokens' attention."""
    q, k = (seen[name].float().unflatten(-1, (seen["heads"], -1)).transpose(1, 2) for name in ("q", "k"))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1).sum(1)
    height, width = x_t.shape[-2:]
    tokens = weights.shape[1]
    rows = round((tokens * height / width) ** 0.5)
    columns = tokens // rows
    if x_t.ndim != 4 or rows * columns != tokens or height * columns != width * rows:
        raise InputError(f"rule: sag expects images as latents, found {tuple(x_t.shape[1:])} with {tokens} tokens")
    return F.interpolate(weights.unflatten(1, (1, rows, columns)), (height, width))


def gaussian_blur(x: Tensor) -> Tensor:
    """x (B, C, H, W) under a Gaussian of deviation 1, edges mirrored."""
    reach = min(KERNEL // 2, min(x.shape[-2:]) - 1)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype) / BLUR) ** 2)
    line = (line / line.sum()).expand(x.shape[1], 1, 1, -1)
    padded = F.pad(x, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, line, groups=x.shape[1]), line.transpose(-1, -2), groups=x.shape[1])
