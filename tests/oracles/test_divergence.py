"""f-distill: the weights of f-divergences, and their place in DMD2's gradient, against closed forms."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_distribution_matching import SCALE, SHIFT, START, one_step
from torch import nn

from stepdistill.methods import METHODS
from stepdistill.methods.parts.divergence import WEIGHTS, RatioWeight
from stepdistill.testing.analytic import GaussianDenoiser, affine_critic
from stepdistill.testing.bed import G1, SCHEDULES, WithFeatures, at, batch, generator

DIVERGENCES = {
    "reverse-kl": lambda r: -r.log(),
    "forward-kl": lambda r: r * r.log(),
    "jensen-shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened-reverse-kl": lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
    "squared-hellinger": lambda r: 1 - r.sqrt(),
    "neyman": lambda r: (1 - r) ** 2 / r,
    "jeffreys": lambda r: (r - 1) * r.log(),
}


@pytest.mark.parametrize("divergence", WEIGHTS)
def test_the_weight_is_the_second_derivative_of_f(divergence):
    r = torch.tensor([0.2, 0.7, 1.0, 3.0, 11.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(DIVERGENCES[divergence](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    expected, found = r.detach() ** 2 * second, WEIGHTS[divergence](r.detach())
    torch.testing.assert_close(found / found[2], expected / expected[2])


def test_the_forward_kl_weight_gives_the_gradient_of_the_forward_kl():
    """E_fake[r (s_fake - s_real) alpha dx/d(b, a)] = d KL(real || fake)/d(b, a), by quadrature over z and eps."""
    mean, std, scale, shift, alpha, sigma = 0.3, 0.9, 0.8, 0.1, 0.8, 0.6
    nodes, weights = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(80))
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    measure = weights[:, None] * weights / (2 * math.pi)
    x_t = alpha * (scale * z + shift) + sigma * eps
    v, a = alpha**2 * std**2 + sigma**2, alpha**2 * scale**2 + sigma**2
    gap, far = x_t - alpha * shift, x_t - alpha * mean
    logit = gap**2 / (2 * a) - far**2 / (2 * v) + 0.5 * math.log(a / v)
    slope = measure * WEIGHTS["forward-kl"](logit.exp()) * alpha * (far / v - gap / a)
    found = (slope.sum().item(), (slope * z).sum().item())
    off, spread = alpha * (shift - mean), v + alpha**2 * (shift - mean) ** 2
    exact = (alpha * off / a, alpha**2 * scale * (a - spread) / a**2)
    assert found == pytest.approx(exact, rel=1e-8)
    assert found == pytest.approx((-0.16632, -0.11618), abs=1e-5)


class Logits(nn.Module):
    """Heads that say the exact log ratio, once per "token"."""

    def __init__(self, real, fake):
        super().__init__()
        self.real, self.fake = real, fake

    def forward(self, features):
        x_t, t = features
        logit = self.real.log_density(x_t, t) - self.fake.log_density(x_t, t)
        return torch.stack([logit - 0.5, logit + 0.5], 1)


@pytest.mark.parametrize("divergence", ["forward-kl", "jensen-shannon"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_f_distill_weighs_dmd2s_gradient(name, divergence):
    schedule, rows = SCHEDULES[name], batch(64)
    real, fake = GaussianDenoiser(*G1, schedule, "v"), affine_critic(SCALE, SHIFT, schedule, "v")
    student = generator(schedule, "v", SCALE, SHIFT)
    x = student(rows.noise("start"), at(START, 64), {}).x0.detach()
    method = one_step("f-distill", student, real, WithFeatures(fake), divergence=divergence)
    assert method.gan and METHODS["f-distill"].Config().divergence == "jensen-shannon"
    method.gan.heads = Logits(real, fake)
    plain = one_step("dmd2", student, real, fake).gradient(x, rows)
    t = rows.uniform("dm time", 0.02, 0.98)
    t = schedule.snap(t)
    x_t = schedule.add_noise(x, rows.noise("dm"), t)
    r = (real.log_density(x_t, t) - fake.log_density(x_t, t)).exp().clamp(0.1, 20)
    h = {"forward-kl": r, "jensen-shannon": 2 * r / (1 + r)}[divergence]
    torch.testing.assert_close(method.gradient(x, rows), h[:, None] * plain)
    # From then on r has mean one among samples of similar times, and soon h has among all.
    method.ratio.DECAY = 0
    where = (t * 10).long()
    means = torch.stack([r[where == part].mean() for part in range(10)])
    r = r / means[where]
    h = {"forward-kl": r, "jensen-shannon": r / (1 + r)}[divergence]
    for _ in range(2):
        method.after_update("student")
        found = method.gradient(x, rows)
    torch.testing.assert_close(found, (h / h.mean())[:, None] * plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "divergence,mean,std,highest",
    [
        ("jensen-shannon", -2, 0.35, 2.2),
        ("jeffreys", -2, 0.52, None),
        ("softened-reverse-kl", -2, 0.27, 1.3),
        ("jensen-shannon", -3, 0.17, 2.0),
        ("jeffreys", -3, 0.35, None),
        ("softened-reverse-kl", -3, 0.15, 1.1),
    ],
)
def test_a_discriminator_that_wins_leaves_the_weights_their_sizes(divergence, mean, std, highest):
    """Logits N(mean, 1), as the authors' code weighs them: a ratio of mean one first, then a weight of mean one."""
    weight, random = RatioWeight(divergence), torch.Generator().manual_seed(1)
    for _ in range(120):
        weights = weight(mean + torch.randn(4096, generator=random), torch.rand(4096, generator=random))
        weight.update()
    assert weights.mean().item() == pytest.approx(1, abs=0.03)
    assert weights.std().item() == pytest.approx(std, rel=0.15)
    assert highest is None or weights.max().item() == pytest.approx(highest, rel=0.12)


def test_the_running_means_do_not_depend_on_micro_batches():
    logit, t = torch.randn(12), torch.rand(12)
    whole, parts = RatioWeight("forward-kl"), RatioWeight("forward-kl")
    weights = whole(logit, t)
    torch.testing.assert_close(torch.cat([parts(logit[i::3], t[i::3]) for i in range(3)]).sort()[0], weights.sort()[0])
    whole.update(), parts.update()
    torch.testing.assert_close(whole.mean, parts.mean)
    assert not torch.equal(whole.mean, torch.ones(11)) and not whole.seen.any()


def test_a_divergence_needs_a_discriminator():
    with pytest.raises(ValidationError, match=r"method\.gan_weight above 0"):
        METHODS["dmd2"].Config(divergence="forward-kl")
    assert METHODS["dmd2"].Config(divergence="forward-kl", gan_weight=0.1).divergence == "forward-kl"
