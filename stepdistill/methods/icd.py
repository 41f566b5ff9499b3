"""Invertible consistency distillation, iCD (Starodubcev et al. 2024): a few-step student and its few-step inverse.

    the trajectory is cut at the times of the k-step sampler, as in PCM; a segment goes from ``low`` to ``high``
    decoder (the student), every step:   t > r neighbors in the segment, aim = low, start = high, w ~ U[w_min, w_max]
    encoder, every step:                 t < r neighbors in the segment, aim = high, start = low, w = 1
        x_r = one DDIM step of the teacher under guidance w from x_t to r                 (x_t from real x_0)
        y = x_r where r = aim, else sg f(x_r, r, aim);    f(x, t, s) = alpha_s x_0(x, t) + sigma_s eps(x, t)
        minimise Huber( f(x_t, t, aim) - y )                                              (consistency)
               + c Huber( f( sg other(x_aim, aim, start), start, aim ) - x_aim )          (preservation, w = 1)

The decoder takes w as an input. The encoder has no guidance, and both are inverses of each other at w = 1: guidance
would move the code of a real image away from N(0, I). Editing raises w in the last steps
(stepdistill.sampling.editing). Without ``w_min`` both follow the trajectories of the recipe's own w, and are inverses
there. Each network is its own target.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Conditions, Denoiser
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import Prediction
from stepdistill.methods.consistency import SolverConfig
from stepdistill.methods.parts.losses import pseudo_huber
from stepdistill.methods.parts.times import T_FLOOR
from stepdistill.methods.pcm import PCM, pick
from stepdistill.roles import Roles


class ICDConfig(SolverConfig):
    """Keys of ``method`` for iCD."""

    preservation: float = Field(1.5, ge=0, description="weight of the losses that make the two networks inverses")

    @model_validator(mode="after")
    def _holds_no_guidance(self) -> "ICDConfig":
        if self.w_min is not None and self.w_min > 1:
            raise ValueError(f"expected w_min of at most 1, where encoder and student are inverses, got {self.w_min:g}")
        return self


class ICD(PCM):
    """Invertible consistency: student and encoder map the ends of each segment onto one another."""

    Config = ICDConfig
    config: ICDConfig
    name = "icd"
    family = "Consistency"
    paper = "iCD, Starodubcev et al. 2024"
    summary = "iCD: a deterministic few-step student and an encoder that inverts it"
    players = ("student", "encoder")
    extra_roles = ("encoder",)
    exported = ("encoder",)

    def __init__(self, config: ICDConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        # An encoder needs some noise to tell points apart, and some predictions have no eps without.
        clean = torch.zeros(1, dtype=torch.float64)
        self.lowest = 0.0 if self.schedule.sigma(clean) > 0 else T_FLOOR

    @classmethod
    def adapt(cls, config: ICDConfig, role: str, network: nn.Module, scale: float) -> nn.Module:
        return network if role == "encoder" else super().adapt(config, role, network, scale)

    def guidance(self, batch: Batch, mine: Denoiser | None = None) -> tuple[float | Tensor, Conditions]:
        if mine is self.roles.encoder and self.config.w_min is not None:
            return 1.0, batch.cond
        return super().guidance(batch)

    def unguided(self, role: Denoiser, batch: Batch) -> Conditions:
        """The conditions of ``role`` at w = 1, if it has an input for w."""
        if role is self.roles.encoder or self.config.w_min is None:
            return batch.cond
        return batch.cond | {"guidance_scale": torch.ones(batch.size, device=batch.device)}

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        points, position = self.place(batch)
        above, below, high, low = pick(points, position), pick(points, position - 1), points[:, -1], points[:, 0]
        if player == "student":
            mine, other, t, r, start, aim = self.roles.student, self.roles.encoder, above, below, high, low
        else:
            mine, other, t, r, start, aim = self.roles.encoder, self.roles.student, below, above, low, high
        losses = {"consistency": self.consistency(mine, mine, t, r, aim, batch)}
        if self.config.preservation:
            losses["preservation"] = self.config.preservation * self.preservation(mine, other, start, aim, batch)
        return losses

    def preservation(self, mine: Denoiser, other: Denoiser, start: Tensor, aim: Tensor, batch: Batch) -> Tensor:
        """Huber between real points at ``aim`` and what ``mine`` makes of where ``other`` took them; times (B,)."""
        x = self.schedule.add_noise(batch.latents, batch.noise("preservation"), aim)
        with torch.no_grad():
            away = self.jump(other(x, aim, self.unguided(other, batch)), start)
        back = self.jump(mine(away, start, self.unguided(mine, batch)), aim)
        return pseudo_huber(back - x, self.config.huber)

    def place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        points, position = super().place(batch)
        return points.clamp_min(self.lowest), position

    def jump(self, prediction: Prediction, s: Tensor) -> Tensor:
        """f(x_t, t, s); the lowest time keeps its trace of noise, for the encoder."""
        return self.schedule.add_noise(prediction.x0, prediction.eps, s)

    @torch.no_grad()
    def decode(self, noise: Tensor, batch: Batch) -> Tensor:
        """Samples (B, ...) at the lowest time from ``noise``; the sampler's last step, to clean, drops what is left."""
        for step in self.sampler.grid():
            prediction = self.student(noise, self.times(step.t, batch), batch)
            noise = self.jump(prediction, self.times(step.r or self.lowest, batch))
        return noise

    @torch.no_grad()
    def encode(self, x0: Tensor, batch: Batch) -> Tensor:
        """The noise (B, ...) that :meth:`decode` turns into ``x0``."""
        for step in reversed(self.sampler.grid()):
            prediction = self.roles.encoder(x0, self.times(step.r or self.lowest, batch), batch.cond)
            x0 = self.jump(prediction, self.times(step.t, batch))
        return x0

    def after_update(self, player: str) -> None:
        """No moving average: each network is its own target."""
