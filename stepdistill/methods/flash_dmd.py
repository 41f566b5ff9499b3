"""Flash-DMD (Chen et al. 2025, "Flash-DMD: Towards High-Fidelity Few-Step Image Generation with Efficient Distillation
and Joint Reinforcement Learning"): DMD2 whose two terms keep to steps of their own, since their gradients conflict.

    k ~ U{0..K-1}, the same for the whole batch
    student at t_k >= tau:  minimise the distribution-matching term alone
    student at t_k <  tau:  minimise w_G GAN(decode(x)) alone
    critic:                 minimise its denoising loss;  the heads, on a frozen image network, theirs at t_k < tau

The paper's joint reinforcement learning is left out.
"""

from collections.abc import Callable

from pydantic import Field
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.samplers import Sampler
from stepdistill.methods.adversarial import ADDConfig
from stepdistill.methods.base import DataNeeds, RealConfig
from stepdistill.methods.distribution_matching import DistributionMatching, MatchingConfig
from stepdistill.methods.parts.gan import PixelDiscriminator
from stepdistill.methods.parts.losses import GanLoss
from stepdistill.roles import Roles


class FlashDMDConfig(RealConfig, MatchingConfig):
    """Keys of ``method`` for Flash-DMD."""

    dm_from: float = Field(0.5, ge=0, description="tau: the student's times from which distribution matching acts")
    gan: GanLoss = Field("hinge", description="the GAN loss: hinge, or softplus (non-saturating)")
    gan_weight: float = Field(1.0, gt=0, description="w_G: weight of the student's GAN term")
    gan_critic_weight: float = Field(1.0, gt=0, description="weight of the discriminator's loss in the critic")
    features: str = Field("efficientnet-lite2", description=ADDConfig.model_fields["features"].description)
    resolution: int = Field(224, gt=0, description=ADDConfig.model_fields["resolution"].description)


class FlashDMD(DistributionMatching):
    """Distribution matching where the student decides on structure, a GAN on pixels where it adds detail."""

    Config = FlashDMDConfig
    config: FlashDMDConfig
    name = "flash-dmd"
    family = "Distribution matching"
    paper = "Flash-DMD, Chen et al. 2025"
    summary = "Flash-DMD: distribution matching at noisy steps, a GAN on decoded images at clean ones"

    def __init__(self, config: FlashDMDConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.gan = PixelDiscriminator(roles.decode, config.features, config.resolution, config.gan, conditional=True)

    @classmethod
    def data_needs(cls, config: FlashDMDConfig) -> DataNeeds:
        return config.real_needs()

    def prepare(self, batch: Batch) -> None:
        self.gan.build(batch)

    def modules(self, player: str) -> list[nn.Module]:
        return super().modules(player) + ([self.gan.heads] if player == "critic" else [])

    def extra_modules(self) -> dict[str, nn.Module]:
        return {"heads": self.gan.heads}

    def at_size(self, sampler: Sampler, call: Denoiser, decode: Callable[[Tensor], Tensor] | None) -> None:
        super().at_size(sampler, call, decode)
        self.gan.decode = decode

    def detail(self, batch: Batch) -> bool:
        """Whether this step's time is one of the GAN's."""
        grid = self.sampler.grid()
        return grid[batch.integer("k", len(grid))].t < self.config.dm_from

    def sample_losses(self, x: Tensor, batch: Batch) -> dict[str, Tensor]:
        if not self.detail(batch):
            return super().sample_losses(x, batch)
        return {"gan": self.config.gan_weight * self.gan.student_loss(x, batch)}

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        losses = super().critic_losses(batch)
        if self.detail(batch):
            heads = self.gan.loss_of_heads(batch.state["x"], batch.latents, batch)
            losses["gan"] = self.config.gan_critic_weight * heads
        return losses
