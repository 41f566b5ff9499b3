"""The analytic test bed: schedules, stand-ins for the players and a float64 batch, shared by the oracles."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.samplers import DDIM, Renoise, Sampler, Step
from stepdistill.diffusion.schedule import KINDS as ALL_KINDS
from stepdistill.diffusion.schedule import EDMSchedule, FlowSchedule, Kind, Schedule, VPSchedule

SD_TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
SCHEDULES: dict[str, Schedule] = {"vp": VPSchedule(SD_TABLE), "flow": FlowSchedule(), "edm": EDMSchedule()}
KINDS: tuple[Kind, ...] = tuple(kind for kind in ALL_KINDS if kind != "inverted flow")
"""Of predictions; "inverted flow" is flow's with the other sign."""

# Bed M1 (mixture) and bed G1 (Gaussian): see test_analytic.py for their golden numbers.
M1 = ([0.4, 0.6], [-1.5, 1.0], [0.3, 0.5])
G1 = (0.7, 0.5)


class Map(nn.Module):
    """A network that means x_0 = scale * function(x_t, t, class_labels) + shift, emitted in any prediction kind.

    ``scale`` and ``shift`` are its parameters; at (1, 0) the network is ``function`` itself, so that a vanishing
    gradient says that ``function`` is stationary.
    """

    def __init__(self, function: Callable[..., Tensor], schedule: Schedule, kind: Kind, scale=1.0, shift=0.0):
        super().__init__()
        self.function, self.schedule, self.kind = function, schedule, kind
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        t = self.schedule.time(timestep)
        x0 = self.scale * self.function(x, t, class_labels) + self.shift
        # At flow's sigma = 0 what a network emits is irrelevant, but finite.
        t = t.clamp_min(1e-6) if self.schedule.name == "flow" else t
        return self.schedule.from_x0(x0, x, t, self.kind)


def player(function: Callable[..., Tensor], schedule: Schedule, kind: Kind, scale=1.0, shift=0.0) -> Denoiser:
    """A trainable stand-in behind the library's own Denoiser."""
    spec = CallSpec("x", "timestep", timestep_dtype=torch.float64)
    return Denoiser(Map(function, schedule, kind, scale, shift), spec, schedule, kind)


def generator(schedule: Schedule, kind: Kind, scale: float, shift: float) -> Denoiser:
    """The affine generator x = scale z + shift, whatever the time."""
    return player(lambda x, t, labels: x, schedule, kind, scale, shift)


def gradients(loss: Tensor, denoiser: Denoiser) -> tuple[float, float]:
    """d loss / d scale and d loss / d shift."""
    scale, shift = torch.autograd.grad(loss, list(denoiser.network.parameters()))
    return scale.item(), shift.item()


class OnGrid(Sampler):
    """A sampler on given times, for schedules that no stock scheduler runs."""

    def __init__(self, schedule: Schedule, times: list[float], like: type[Sampler] = Renoise):
        self.schedule, self.times, self.steps, self.like = schedule, times, len(times), like

    def stock(self, steps):
        return None

    def grid(self, steps: int | None = None) -> list[Step]:
        return [Step(t, r) for t, r in zip(self.times, [*self.times[1:], None], strict=True)]

    def advance(self, prediction, step, noise):
        return self.like.advance(self, prediction, step, noise)


class EvenGrid(OnGrid):
    """Any number of even steps from noise to the clean end, on schedules that no stock scheduler runs."""

    def __init__(self, schedule: Schedule, steps: int, like: type[Sampler] = DDIM):
        super().__init__(schedule, [], like)
        self.steps = steps

    def grid(self, steps: int | None = None) -> list[Step]:
        times = self.schedule.snap(torch.linspace(1, 0, (steps or self.steps) + 1, dtype=torch.float64)).tolist()
        return [Step(t, r or None) for t, r in itertools.pairwise(times)]


class Table(nn.Module):
    """A trainable network that means x_0 = scale x + shift, with numbers of its own at each of ``times`` (K,).

    It starts as the Gaussian teacher N(mean, std^2), the way students do.
    """

    def __init__(self, times: Tensor, mean: float, std: float, schedule: Schedule, kind: Kind):
        super().__init__()
        self.times, self.schedule, self.kind = times, schedule, kind
        alpha, sigma = schedule.coefficients(times)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        self.scale, self.shift = nn.Parameter(gain), nn.Parameter(mean * (1 - alpha * gain))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = self.schedule.time(timestep)
        nearest = (t[:, None] - self.times).abs().argmin(1)
        x0 = self.scale[nearest][:, None] * x + self.shift[nearest][:, None]
        return self.schedule.from_x0(x0, x, t.clamp_min(1e-6), self.kind)


def table(times: Tensor, gaussian: tuple[float, float], schedule: Schedule, kind: Kind) -> Denoiser:
    """A :class:`Table` behind the library's own Denoiser."""
    spec = CallSpec("x", "timestep", timestep_dtype=torch.float64)
    return Denoiser(Table(times, *gaussian, schedule, kind), spec, schedule, kind)


def descend(method, rows_of: Callable[[int], Batch], steps: int, lr: float) -> None:
    """Train the method's student with Adam, a cosine learning rate and the method's own updates."""
    optimizer = torch.optim.Adam(method.roles.student.network.parameters(), lr)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        sum(method.losses("student", rows_of(step)).values()).backward()
        optimizer.step()
        rate.step()
        method.after_update("student")


def batch(size: int = 6, step: int = 0, latents: Tensor | None = None, labels: tuple[int, int] | None = None) -> Batch:
    """A float64 batch of samples of shape (1,); ``labels`` are the class and the null label."""
    cond = {} if labels is None else {"class_labels": torch.full((size,), labels[0])}
    null = None if labels is None else {"class_labels": torch.full((size,), labels[1])}
    return Batch(
        seed=7, step=step, first=0, size=size, shape=(1,), cond=cond, null=null, latents=latents,
        dtype=torch.float64,
    )  # fmt: skip


def corners() -> tuple[Tensor, Tensor]:
    """(z, eps), four equally likely pairs of +-1: means of quadratics over them equal those over N(0, I)."""
    z, eps = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64).T
    return z[:, None], eps[:, None]


def column(*values: float) -> Tensor:
    """A float64 batch (B, 1)."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def at(time: float, size: int = 1) -> Tensor:
    """One time for a batch, (B,) float64."""
    return torch.full((size,), time, dtype=torch.float64)


def ddim_path(x0_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: list[float], schedule: Schedule) -> Tensor:
    """x after DDIM steps through descending ``times``; written from the formula, not from the library's sampler."""
    for t, r in itertools.pairwise(times):
        (alpha, sigma), (alpha_r, sigma_r) = (schedule.coefficients(at(time)) for time in (t, r))
        x0 = x0_of(x, at(t, len(x)))
        x = alpha_r * x0 + sigma_r * (x - alpha * x0) / sigma
    return x


class Spy:
    """A denoiser that records the noisy samples and times of its calls."""

    def __init__(self, denoiser):
        self.denoiser, self.schedule, self.kind = denoiser, denoiser.schedule, denoiser.kind
        self.network = getattr(denoiser, "network", None)
        self.norm_axis, self.rule = denoiser.norm_axis, denoiser.rule
        self.takes_r = denoiser.takes_r
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond):
        self.calls.append((x_t, t))
        return self.denoiser(x_t, t, cond)


class OptimalHeads(nn.Module):
    """The Bayes discriminator: log p_real,t(x_t) - log p_fake,t(x_t) from "features" that are (x_t, t)."""

    def __init__(self, real, fake):
        super().__init__()
        self.real, self.fake = real, fake

    def forward(self, features, condition=None):
        x_t, t = features
        return (self.real.log_density(x_t, t) - self.fake.log_density(x_t, t))[:, None]


class WithFeatures(Spy):
    """A denoiser whose "features" are (x_t, t) themselves."""

    def features(self, x_t, t, cond, depths=4):
        self.calls.append((x_t, t))
        return [x_t, t]
