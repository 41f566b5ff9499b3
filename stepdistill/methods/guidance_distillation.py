"""Guidance distillation: one pass predicts what classifier-free guidance predicts with two.

The steps stay the teacher's.

    eps_w = eps(x_t, null) + w (eps(x_t, c) - eps(x_t, null))
    minimise | student(x_t, t, c, w) - eps_w |^2             (in whatever the network predicts)

The optimum is eps_w at every point, wherever the points come from. Methods differ in them, in w, in what learns:

    w-embed        x_t = alpha x_0 + sigma eps, x_0 real;  w ~ U[w_min, w_max], embedded  (Meng et al. 2023, stage 1)
    score-matching the same points;  w fixed;  whole weights, also of a smaller network   (Song et al. 2024, stage 1)
    lora-guidance  the same points;  w fixed;  an adapter on the teacher's own weights    (Golnari 2023)
    agd            points of the guided teacher's trajectories, each of which holds eps_w with the next;
                   w ~ U[w_min, w_max];  small adapters on the frozen network's attention (Jensen & Sadat 2025)
    guide          as agd;  a small network beside the frozen one, added to its output    (Hsiao et al. 2024)
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Conditions
from stepdistill.diffusion.schedule import per_sample
from stepdistill.errors import InputError
from stepdistill.methods.base import DataNeeds, DistillMethod, MethodConfig, PathNeeds, RealConfig
from stepdistill.methods.parts.losses import prediction_loss
from stepdistill.methods.parts.times import uniform_times
from stepdistill.roles import RoleTraining
from stepdistill.roles.added import GuidanceEmbedded
from stepdistill.roles.guidance_adapters import AttentionAdapter, GuidanceAdapter, OutputGuide, WithGuidanceAdapter

# The argument that tells an adapted network its w (B,).
SCALE = "guidance_scale"


class ScaleRange(MethodConfig):
    """Keys of ``method`` for students that take w as an input."""

    w_min: float = Field(1.0, gt=0, description="lowest guidance scale the student is trained at")
    w_max: float = Field(4.0, gt=0, description="highest one; teacher.guidance.scale lies between them")

    def check(self, scale: float) -> None:
        """Refuse to export at a scale that was never trained."""
        if not self.w_min <= scale <= self.w_max:
            expected = f"from method.w_min to method.w_max ({self.w_min:g} to {self.w_max:g})"
            raise InputError(f"teacher.guidance.scale: expected a scale {expected}, found {scale:g}")


class GuidanceMethod(DistillMethod):
    """What all of them share: the teacher's own steps, and that there is guidance to distil."""

    sampler_name = "ddim"

    def prepare(self, batch: Batch) -> None:
        if batch.null is None:
            raise InputError("method.name: distils guidance; expected a teacher with an empty condition, found none")


class EmbeddingConfig(ScaleRange, RealConfig):
    """Keys of ``method`` for the w-embedding."""


class WEmbedding(GuidanceMethod):
    """The network learns w as an input; exported at one w, as which it is a stock network again."""

    Config = EmbeddingConfig
    config: EmbeddingConfig
    name = "w-embed"
    family = "Guidance"
    paper = "Meng et al. 2023, stage 1"
    summary = "guidance distillation with w as an input (Meng et al., stage 1); one pass per step instead of two"

    @classmethod
    def data_needs(cls, config: RealConfig) -> DataNeeds:
        return config.real_needs()

    @classmethod
    def adapt(cls, config: EmbeddingConfig, role: str, network: nn.Module, scale: float) -> nn.Module:
        config.check(scale)
        return GuidanceEmbedded(network, scale)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        t = uniform_times(batch, "time", self.schedule)
        x_t = self.schedule.add_noise(batch.latents, batch.noise("forward"), t)
        w = self.scales(batch)
        target = self.teacher(x_t, t, batch, w).raw
        student = self.roles.student(x_t, t, batch.cond | self.guidance_condition(w)).raw
        return {"guidance": F.mse_loss(student.to(target.dtype), target)}

    def scales(self, batch: Batch) -> float | Tensor:
        """w of all rows, or of each, (B,)."""
        return batch.uniform("w", self.config.w_min, self.config.w_max)

    def guidance_condition(self, w: float | Tensor) -> Conditions:
        """The student's condition that carries w."""
        return {SCALE: w}


class ScoreMatching(WEmbedding):
    """One w: a student that predicts what the guided teacher predicts, such as the start of one with fewer blocks."""

    Config = RealConfig
    config: RealConfig
    name = "score-matching"
    family = "Guidance"
    paper = "Multi-student distillation, Song et al. 2024, stage 1"
    summary = "score matching: a whole or smaller student learns the guided teacher's prediction; a start for others"

    def prepare(self, batch: Batch) -> None:
        if self.roles.scale != 1:
            super().prepare(batch)

    @classmethod
    def adapt(cls, config: MethodConfig, role: str, network: nn.Module, scale: float) -> nn.Module:
        return network

    def scales(self, batch: Batch) -> float:
        return self.roles.scale

    def guidance_condition(self, w: float | Tensor) -> Conditions:
        return {}


class LoRAGuidance(ScoreMatching):
    """One w, learned by an adapter whose absence is the teacher: no second copy of the weights."""

    name = "lora-guidance"
    family = "Guidance"
    paper = "Meng et al. 2023, as a LoRA"
    summary = "guidance distillation of one scale into a LoRA; merged into stock weights at export"

    @classmethod
    def role_training(cls, config: MethodConfig) -> Mapping[str, RoleTraining]:
        return {"student": "lora"}


class AdapterConfig(ScaleRange):
    """Keys of ``method`` for small networks beside a frozen one."""

    width: int = Field(64, gt=0, description="of the adapter's hidden layers; its size grows in proportion")
    paths: int = Field(400, gt=0, description="guided teacher trajectories to train on")
    path_steps: int = Field(50, ge=2, description="their steps; each costs two evaluations")


class AdapterGuidance(GuidanceMethod):
    """AGD: the network stays frozen; adapters learn from the points that guided sampling really visits."""

    Config = AdapterConfig
    config: AdapterConfig
    name = "agd"
    family = "Guidance"
    paper = "AGD, Jensen & Sadat 2025"
    summary = "AGD: small adapters on a frozen network, from guided trajectories; w stays an input"
    adapter: ClassVar[type[GuidanceAdapter]] = AttentionAdapter

    @classmethod
    def data_needs(cls, config: AdapterConfig) -> DataNeeds:
        return DataNeeds(paths=PathNeeds(config.paths, config.path_steps, "all", (config.w_min, config.w_max)))

    @classmethod
    def role_training(cls, config: AdapterConfig) -> Mapping[str, RoleTraining]:
        return {"student": "frozen"}

    @classmethod
    def adapt(cls, config: AdapterConfig, role: str, network: nn.Module, scale: float) -> nn.Module:
        config.check(scale)
        return WithGuidanceAdapter(network, cls.adapter(network, scale, config.width))

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        path, last = batch.path, len(batch.path.times) - 1
        k, rows = batch.integers("k", last), torch.arange(batch.size, device=batch.device)
        x_t, x_r, t = path.points[rows, k], path.points[rows, k + 1], path.times[k]
        # A DDIM step is two equations in x_0 and eps_w; the last one ends at x_0 itself.
        (alpha, sigma), (alpha_r, sigma_r) = map(self.schedule.coefficients, (t, path.times[k + 1]))
        alpha_r, sigma_r = torch.where(k + 1 == last, 1.0, alpha_r), torch.where(k + 1 == last, 0.0, sigma_r)
        both = per_sample(sigma_r, x_t.double()) * x_t - per_sample(sigma, x_t.double()) * x_r
        x0 = both / per_sample(alpha * sigma_r - alpha_r * sigma, both)
        student = self.roles.student(x_t, t, path.cond | {SCALE: path.scales})
        return {"guidance": prediction_loss(student, x0.to(x_t.dtype))}


class Guide(AdapterGuidance):
    """A guide beside the network: it never looks inside, so it also guides a fine-tune."""

    name = "guide"
    family = "Guidance"
    paper = "Plug-and-Play guide, Hsiao et al. 2024"
    summary = "plug-and-play guide: a small network added to a frozen one's output; fits its fine-tunes too"
    adapter = OutputGuide
