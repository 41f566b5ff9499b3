"""An adversarial part that any method can hold: small heads on the hidden states of a network that sees samples.

latents (DMD2, SiDA, LADD):  x_s = alpha x + sigma eps,  s ~ times;  states of a denoiser at x_s
pixels (ADD):                states of a frozen image network at decode(x)

student:  minimise softplus(-heads(fake))                            or -heads(fake)
heads:    minimise softplus(heads(fake)) + softplus(-heads(real))    or the hinge loss,  + r1/2 |d heads/d states|^2
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.features import FEATURE_DEPTHS
from stepdistill.methods.parts.losses import GanLoss, discriminator_loss, generator_loss, gradient_penalty
from stepdistill.methods.parts.times import uniform_times
from stepdistill.roles.added import fourier
from stepdistill.roles.heads import Heads, ImageFeatures, image_features, pooled

Times = Callable[[Batch, str], Tensor]


class Discriminator(ABC):
    """Heads on the hidden states that :meth:`features` gives.

    Args:
        loss: "softplus" (non-saturating) or "hinge".
        r1: weight of the gradient penalty on real samples; 0 is off.
        conditional: the heads get the rows' conditions too, and not only states of a network that did.
    """

    def __init__(self, loss: GanLoss = "softplus", r1: float = 0.0, conditional: bool = False):
        self.loss, self.r1, self.conditional = loss, r1, conditional
        self.heads: Heads | None = None

    @abstractmethod
    def features(self, x0: Tensor, batch: Batch) -> list[Tensor]:
        """Hidden states of samples (B, ...); the same randomness for every call of one turn."""

    def condition(self, batch: Batch) -> Tensor | None:
        """One vector (B, d) of what a conditional discriminator's heads get of each row beside its states, or None."""
        return pooled(batch.cond)

    def build(self, batch: Batch, width: int = 64) -> None:
        """Make the heads for the shapes of ``batch``, once."""
        if self.heads is None:
            with torch.no_grad():
                features = self.features(batch.noise("gan"), batch)
            condition = self.condition(batch) if self.conditional else None
            self.heads = Heads([f.shape[1:] for f in features], width, 0 if condition is None else condition.shape[1])
            self.heads.to(batch.device)

    def votes(self, states: list[Tensor], batch: Batch) -> Tensor:
        """(B, votes) of the heads on hidden states."""
        return self.heads(states, self.condition(batch)) if self.conditional else self.heads(states)

    def logits(self, x0: Tensor, batch: Batch) -> Tensor:
        """(B, votes)."""
        return self.votes(self.features(x0, batch), batch)

    def student_loss(self, x: Tensor, batch: Batch) -> Tensor:
        """What the student minimises; gradients reach ``x`` through the network that is read."""
        return generator_loss(self.logits(x, batch), self.loss)

    def loss_of_heads(self, fake: Tensor, real: Tensor, batch: Batch) -> Tensor:
        """What the discriminator minimises on detached samples (B, ...)."""
        states = self.features(real, batch)
        if self.r1:
            # Those of a frozen network have no graph, and the penalty is on what the heads are given; in float32, as
            # slopes have the dtype of what they are taken by.
            states = [state.float() if state.requires_grad else state.float().requires_grad_() for state in states]
        logits = self.votes(states, batch)
        loss = discriminator_loss(self.logits(fake, batch), logits, self.loss)
        return loss + self.r1 / 2 * gradient_penalty(logits, states) if self.r1 else loss


class LatentDiscriminator(Discriminator):
    """Heads on a denoiser's states of noised samples ("diffusion GAN": they never see clean ones).

    Args:
        denoiser: the critic or the teacher.
        times: draws (B,) times from a batch under a name; default uniform, with ``shift``
            (see :func:`stepdistill.methods.parts.times.uniform_times`).
        conditional: the heads get the time as well.
        depths: of the states that are read; None: every block's.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        times: Times | None = None,
        loss: GanLoss = "softplus",
        r1: float = 0.0,
        conditional: bool = False,
        depths: int | None = FEATURE_DEPTHS,
        shift: float = 1.0,
    ):
        super().__init__(loss, r1, conditional)
        self.denoiser, self.depths = denoiser, depths
        self.times = times or (lambda batch, name: uniform_times(batch, name, denoiser.schedule, shift=shift))

    def features(self, x0: Tensor, batch: Batch) -> list[Tensor]:
        t = self.times(batch, "gan time")
        x_t = self.denoiser.schedule.add_noise(x0, batch.noise("gan"), t)
        return self.denoiser.features(x_t, t, batch.cond, self.depths)

    def condition(self, batch: Batch) -> Tensor:
        time, condition = fourier(self.times(batch, "gan time"), 64), super().condition(batch)
        return time if condition is None else torch.cat([time, condition], dim=1)


class PixelDiscriminator(Discriminator):
    """Heads on a frozen image network's states of decoded samples, real ones decoded alike.

    Args:
        decode: latents to images in [-1, 1], with graph; None where samples are images.
        network: name or folder for :func:`stepdistill.roles.heads.image_features`; loaded by :meth:`build`.
        resolution: side in pixels at which it looks.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor] | None,
        network: str,
        resolution: int,
        loss: GanLoss = "hinge",
        r1: float = 0.0,
        conditional: bool = False,
    ):
        super().__init__(loss, r1, conditional)
        self.decode, self.name, self.resolution = decode, network, resolution
        self.network: ImageFeatures | None = None

    def build(self, batch: Batch, width: int = 64) -> None:
        if self.network is None:
            self.network = image_features(self.name, self.resolution).to(batch.device)
        super().build(batch, width)

    def features(self, x0: Tensor, batch: Batch) -> list[Tensor]:
        return self.network(self.decode(x0) if self.decode else x0)
