"""An adversarial part that any method can hold: heads on a denoiser's hidden states of noised samples.

DMD2 reads the critic's features and lets the discriminator's loss reach the critic; LADD reads the frozen teacher's.

    x_s = alpha x + sigma eps,  s ~ times                    ("diffusion GAN": the heads never see clean samples)
    logits = heads(features of the denoiser at x_s)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.discriminator import Heads
from stepdistill.methods.losses import GanLoss, discriminator_loss, generator_loss
from stepdistill.methods.times import uniform_times
from stepdistill.pipeline.denoiser import Denoiser

Times = Callable[[Batch, str], Tensor]


class LatentDiscriminator:
    """Heads on ``denoiser``'s features.

    Args:
        denoiser: the critic or the teacher. times: draws (B,) times from a batch under a name; default uniform.
        loss: "softplus" (non-saturating) or "hinge".
    """

    def __init__(self, denoiser: Denoiser, times: Times | None = None, loss: GanLoss = "softplus"):
        self.denoiser, self.loss = denoiser, loss
        self.times = times or (lambda batch, name: uniform_times(batch, name, denoiser.schedule))
        self.heads: Heads | None = None

    def build(self, batch: Batch, width: int = 64) -> None:
        """Make the heads for the shapes of ``batch``, once."""
        if self.heads is None:
            t = torch.full((batch.size,), 0.5, device=batch.device, dtype=torch.float64)
            with torch.no_grad():
                features = self.denoiser.features(batch.noise("gan"), t, batch.cond)
            self.heads = Heads([f.shape[1:] for f in features], width).to(batch.device)

    def logits(self, x0: Tensor, batch: Batch) -> Tensor:
        """(B, votes) for noised samples; the same noise and times for every call of one turn."""
        t = self.times(batch, "gan time")
        x_t = self.denoiser.schedule.add_noise(x0, batch.noise("gan"), t)
        return self.heads(self.denoiser.features(x_t, t, batch.cond))

    def student_loss(self, x: Tensor, batch: Batch) -> Tensor:
        """What the student minimises; gradients reach ``x`` through the denoiser."""
        return generator_loss(self.logits(x, batch), self.loss)

    def loss_of_heads(self, fake: Tensor, real: Tensor, batch: Batch) -> Tensor:
        """What the discriminator minimises on detached samples (B, ...)."""
        return discriminator_loss(self.logits(fake, batch), self.logits(real, batch), self.loss)
