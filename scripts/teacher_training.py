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


class Averaged:
    """Parameters in training, their moving average and AdamW's state; saved and resumed as one safetensors file."""

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
            tensors |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
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
            moments = {key: stored[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
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
