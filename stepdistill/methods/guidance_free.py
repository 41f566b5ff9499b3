"""Training a guidance-free model on data: one pass that is what guidance would give, with no teacher to regress on.

GFT (Chen et al. 2025, "Visual generation without guidance"): the conditional model is a mixture of a sharpened one,
with beta as an input, and the unconditional one.

    beta ~ U[1 / w_max, 1];  with probability ``drop``: c = null, beta = 1
    minimise | beta eps(x_t, c, beta) + (1 - beta) sg eps(x_t, null, 1) - eps |^2
    optimum: eps(x_t, c, beta) = eps_u + (eps_c - eps_u) / beta, guidance of w = 1 / beta

Model-guidance (Tang et al. 2025, "Diffusion models without classifier-free guidance"): the target is moved along the
model's own guidance direction. The paper's w is 1 - 1 / scale in the convention of this library.

    with probability ``drop``: c = null
    minimise | u(x_t, c) - sg(eps - x_0 + w (u(x_t, c) - u(x_t, null))) |^2
    fixed point: u_u + (u_c - u_u) / (1 - w), guidance of scale 1 / (1 - w)
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.schedule import per_sample
from stepdistill.errors import InputError
from stepdistill.methods.base import DataNeeds, RealConfig
from stepdistill.methods.guidance_distillation import SCALE, GuidanceMethod, ScaleRange
from stepdistill.methods.parts.times import uniform_times
from stepdistill.roles.added import GuidanceEmbedded


class ModelGuidanceConfig(RealConfig):
    """Keys of ``method`` for model-guidance."""

    drop: float = Field(0.1, ge=0, le=1, description="share of rows that train the unconditional model")


class ModelGuidance(GuidanceMethod):
    """The model's own guidance direction, fed back into its denoising target."""

    Config = ModelGuidanceConfig
    config: ModelGuidanceConfig
    name = "model-guidance"
    family = "Guidance"
    paper = "Model-guidance, Tang et al. 2025"
    summary = "model-guidance: fine-tuning on data towards guided targets of its own; no guidance at inference"
    guides_itself = True

    @classmethod
    def data_needs(cls, config: ModelGuidanceConfig) -> DataNeeds:
        # Guidance is what is learnt on top of the data: samples that have it already would get it twice.
        return config.real_needs(scale=1.0)

    @classmethod
    def adapt(cls, config: ModelGuidanceConfig, role: str, network: nn.Module, scale: float) -> nn.Module:
        if scale <= 0.5:
            # |1 - 1 / scale| has to be below 1 for the feedback to settle.
            raise InputError(f"teacher.guidance.scale: expected a scale above 0.5, found {scale:g}")
        return network

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        x_t, t, target = self.noised(batch)
        w = 1 - 1 / self.roles.scale
        student = self.roles.student(x_t, t, batch.partly_empty("drop", self.config.drop)[0]).raw.to(target.dtype)
        with torch.no_grad():
            target = target + w * (student - self.roles.student(x_t, t, batch.empty).raw)
        return {"guidance": F.mse_loss(student, target)}

    def noised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, what the network would have to emit to mean these very images)."""
        t = uniform_times(batch, "time", self.schedule)
        x_t = self.schedule.add_noise(batch.latents, batch.noise("forward"), t)
        return x_t, t, self.schedule.from_x0(batch.latents, x_t, t, self.roles.student.kind)


class GFTConfig(ScaleRange, ModelGuidanceConfig):
    """Keys of ``method`` for GFT."""


class GFT(ModelGuidance):
    """Guidance-free training with beta as an input, through the embedding of w = 1 / beta."""

    Config = GFTConfig
    config: GFTConfig
    name = "gft"
    family = "Guidance"
    paper = "GFT, Chen et al. 2025"
    summary = "GFT: guidance-free training on data with the sampling temperature as an input"

    @classmethod
    def adapt(cls, config: GFTConfig, role: str, network: nn.Module, scale: float) -> nn.Module:
        config.check(scale)
        return GuidanceEmbedded(network, scale)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        x_t, t, target = self.noised(batch)
        cond, drop = batch.partly_empty("drop", self.config.drop)
        beta = torch.where(drop, 1.0, batch.uniform("beta", 1 / self.config.w_max, 1 / self.config.w_min))
        with torch.no_grad():
            null = self.roles.student(x_t, t, batch.empty | {SCALE: torch.ones_like(beta)}).raw.to(target.dtype)
        student = self.roles.student(x_t, t, cond | {SCALE: 1 / beta}).raw.to(target.dtype)
        share = per_sample(beta, student)
        return {"guidance": F.mse_loss(share * student + (1 - share) * null, target)}
