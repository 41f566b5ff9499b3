"""EM distillation (Xie et al. 2024, "EM Distillation for One-step Diffusion Models"): a one-step student of maximum
likelihood, the forward KL, so that it covers the teacher's modes.

    g(z) = student(z, t_0).x0,  z ~ N(0, I);  eps ~ N(0, I);  ln(sigma/alpha) ~ N(-1.2, 1.2^2);  c = alpha/sigma
    E-step, i = 1 .. K: Langevin steps towards q_teacher(x_t) p(z | x_t),  x_t = alpha g(z) + sigma eps
        d   = D_real(x_t) - D_fake(x_t)                                 (x_0 units: sigma^2/alpha of the scores)
        m   <- (1 - gamma) m + gamma d                                  m = 0 at first
        i < K:
            eps <- eps + gamma (c d - eps) + sqrt(2 gamma) n
            z   <- z + gamma_z (c^2 (dg/dz)^T d - z) + sqrt(2 gamma_z) n'
    M-step, student:  minimise 1/2 |g(z) - sg(g(z) + m)|^2
    critic, on g of the first z:  minimise its denoising loss

The paper regresses alpha g(z) on x_t less the noise that the chain was given: n, and the first eps, decay in eps as m
does, and what is left of x_t is alpha (g(z) + m). Without it the target is noise, of which m is the mean. The last step
has no use for another z, so K = 1 is Diff-Instruct at gamma times its gradient. Levels have the weight that they have
there.
"""

import math
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.samplers import Step
from stepdistill.diffusion.schedule import per_sample
from stepdistill.methods.parts.losses import surrogate
from stepdistill.methods.vsd import DiffInstruct, DiffInstructConfig


class EMDConfig(DiffInstructConfig):
    """Keys of ``method`` for EM distillation."""

    langevin_steps: int = Field(16, ge=1, description="K: steps of the chain; each is a pass of all three networks")
    noise_step: float = Field(0.16, gt=0, le=1, description="gamma: step size of the chain in eps")
    latent_step: float = Field(1.6e-5, ge=0, le=1, description="gamma_z: its step size in z, far below that in eps")


class EMD(DiffInstruct):
    """Maximum likelihood by short Langevin chains, from conditions alone."""

    Config = EMDConfig
    config: EMDConfig
    name = "emd"
    family = "Distribution matching"
    paper = "EM distillation, Xie et al. 2024"
    summary = "EMD: maximum likelihood of a one-step student by short Langevin chains; covers modes"
    shards = False  # its losses take slopes of the student

    @classmethod
    def problems(cls, config: EMDConfig, student_steps: int, train_steps: int) -> Iterator[tuple[str, str]]:
        if student_steps != 1:
            yield "student.steps", f"expected 1 for emd, whose chain starts from pure noise, found {student_steps}"

    def student_losses(self, batch: Batch) -> dict[str, Tensor]:
        config, t = self.config, self.matching_times(batch)
        start = Step(self.sampler.grid()[0].t, None)
        z, eps = batch.noise("start"), batch.noise("dm")
        alpha, sigma = self.schedule.coefficients(t)
        ratio, moved = per_sample(alpha / sigma, z), torch.zeros_like(z)
        for i in range(config.langevin_steps):
            last = i + 1 == config.langevin_steps
            z = z.detach().requires_grad_(not last)
            x = self.student_step(z, start, batch).x0
            if i == 0:  # the critic learns samples, and the chain leaves them
                batch.state["x"] = x.detach()
            apart = self.apart(x.detach(), eps, t, batch)
            moved = torch.lerp(moved.to(apart), apart, config.noise_step)
            if not last:
                (slope,) = torch.autograd.grad(x, z, ratio**2 * apart)
                eps = langevin(eps, ratio * apart, config.noise_step, batch.noise(f"eps {i}"))
                z = langevin(z.detach(), slope, config.latent_step, batch.noise(f"z {i}"))
        return {"dm": surrogate(x, -moved)}

    @torch.no_grad()
    def apart(self, x: Tensor, eps: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """D_real - D_fake (B, ...) at the student's samples ``x`` (B, ...) with this noise."""
        x_t = self.schedule.add_noise(x, eps, t)
        return self.teacher(x_t, t, batch).x0 - self.roles.critic(x_t, t, batch.cond).x0


def langevin(x: Tensor, slope: Tensor, step: float, noise: Tensor) -> Tensor:
    """A Langevin step of ``x`` (B, ...) under a log-density of this slope times a standard normal one."""
    return x + step * (slope - x) + math.sqrt(2 * step) * noise
