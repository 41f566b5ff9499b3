"""What the scripts that train embedded teachers share: the rate, batches, resumable state, latents of unit scale."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SAVE_EVERY = 60
"""Seconds between two checkpoints."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def log(stage: str, message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {stage}: {message}", flush=True)


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then cosine to zero."""
    warm = max(1, int(0.05 * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless index batches, reshuffled every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n - n % size].split(size)


def new_scheduler(**options: int) -> DDIMScheduler:
    """v-prediction; the scaled-linear table ends at alpha = 0.015, so pure noise is a fair start."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        **options,
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, batches: Iterator[Tensor]) -> None:
    """Fold a per-channel shift and scale into quant_conv and post_quant_conv: zero mean, unit deviation over images."""
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in batches])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = latents.shape[1]
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]


def orthogonal(gradient: Tensor) -> Tensor:
    """About the nearest half-orthogonal matrix: five Newton-Schulz steps (Jordan et al. 2024); a kernel as its rows.

    Every step multiplies x by a polynomial of x @ x.T, which is small: the polynomials are multiplied first, x last.
    """
    x = gradient.flatten(1)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    a = x @ x.T
    one = product = torch.eye(len(a), device=a.device)
    for _ in range(5):
        step = 3.4445 * one - 4.7750 * a + 2.0315 * a @ a
        product, a = step @ product, step @ a @ step
    x = product @ x
    return (x.T if tall else x).reshape(gradient.shape)


class Muon(torch.optim.AdamW):
    """AdamW, with orthogonalised momentum for ``hidden``: matrices and kernels but those of names with an ``outside``.

    Their updates have AdamW's usual size (Liu et al. 2025), so one rate serves both.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], outside: tuple[str, ...], **options: object):
        super().__init__(parameters.values(), **options)
        self.hidden = [p for name, p in parameters.items() if p.ndim > 1 and not any(part in name for part in outside)]

    @torch.no_grad()
    def step(self) -> None:
        rate, decay = (self.param_groups[0][key] for key in ("lr", "weight_decay"))
        for p in self.hidden:
            momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            size = 0.2 * max(p.shape[0], p[0].numel()) ** 0.5
            p.mul_(1 - rate * decay).sub_(orthogonal(p.grad.lerp(momentum, 0.95)), alpha=rate * size)
            p.grad = None  # AdamW passes over it
        super().step()


class Averaged:
    """Parameters in training, their moving average, the optimizer's moments; saved and resumed as one file."""

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, decay: float):
        self.parameters, self.optimizer, self.decay = parameters, optimizer, decay
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self, step: int) -> None:
        """Move the average after optimizer step ``step``; early on it follows faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), now, 1 - decay)

    def save(self, path: Path, step: int) -> None:
        tensors = {"step": torch.tensor(step)}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"weight.{name}": parameter.detach(), f"ema.{name}": self.average[name]}
            tensors |= {f"{key}.{name}": state[key] for key in MOMENTS if key in state}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)

    @torch.no_grad()
    def resume(self, path: Path) -> int:
        """The next step, 0 without a file."""
        if not path.exists():
            return 0
        stored = load_file(path)
        step = int(stored["step"])
        for name, parameter in self.parameters.items():
            parameter.copy_(stored[f"weight.{name}"])
            self.average[name].copy_(stored[f"ema.{name}"])
            moments = {key: stored.get(f"{key}.{name}") for key in MOMENTS}
            moments = {key: moment.to(parameter.device) for key, moment in moments.items() if moment is not None}
            if moments:  # none after ``unpack``: the optimizer starts afresh
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        return step


def train(
    stage: str, averaged: Averaged, loss: Callable[[int, torch.Generator], Tensor], steps: int, peak: float, work: Path
) -> None:
    """Minimise ``loss(step, its random numbers)``; goes on from the stage's checkpoint in the work folder.

    Every draw follows from the step number alone, so a resumed run continues the same sequence.
    """
    checkpoint, average = work / f"{stage}-checkpoint.safetensors", None
    first, saved = averaged.resume(checkpoint), time.monotonic()
    if first:
        log(stage, f"resumed at step {first}")
    for step in range(first, steps):
        averaged.optimizer.param_groups[0]["lr"] = one_cycle(step, steps, peak)
        value = loss(step, torch.Generator().manual_seed(step))
        averaged.optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(averaged.parameters.values(), 1.0)
        averaged.optimizer.step()
        averaged.update(step)
        average = value.detach() if average is None else average.lerp(value.detach(), 0.01)
        if step % 100 == 0 or step == steps - 1:
            log(stage, f"step {step}/{steps} loss {average.item():.4f}")
        if time.monotonic() - saved > SAVE_EVERY or step == steps - 1:
            averaged.save(checkpoint, step + 1)
            saved = time.monotonic()
