"""LADD and ADD against closed forms: losses at equal distributions, the optimal logit, R1, inputs and plumbing."""

import math

import pytest
import torch
from torch import nn

from stepdistill.diffusion.schedule import Prediction
from stepdistill.methods import METHODS, Roles
from stepdistill.methods.adversarial import LADD
from stepdistill.methods.parts.gan import Discriminator
from stepdistill.methods.parts.losses import discriminator_loss, generator_loss, gradient_penalty
from stepdistill.roles.added import fourier
from stepdistill.roles.heads import Heads
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import (
    G1,
    KINDS,
    SCHEDULES,
    OnGrid,
    OptimalHeads,
    Spy,
    WithFeatures,
    at,
    batch,
    column,
    generator,
    gradients,
)

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
# The generator of bed G1's golden logit.
SHIFT, SCALE = 0.2, 0.7
GRID = [0.9, 0.7, 0.4, 0.2]


def adversarial(student, teacher, name="ladd", times=GRID, decode=None, **config) -> LADD:
    method = METHODS[name]
    roles = Roles(teacher=teacher, student=student, decode=decode)
    return method(method.Config(**config), roles, OnGrid(student.schedule, list(times)))


def data(size: int = 32, step: int = 0):
    """A batch with real samples of bed G1."""
    rows = batch(size, step)
    return rows.but(latents=G1[0] + G1[1] * rows.noise("real"))


class Given(Discriminator):
    """A discriminator of the samples themselves."""

    def __init__(self, heads, **config):
        super().__init__(**config)
        self.heads = heads

    def features(self, x0, batch):
        return [x0]


class Linear(nn.Module):
    """logit = w . state."""

    def __init__(self, *weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, states, condition=None):
        return (states[0] * self.weight).sum(-1, keepdim=True)


@pytest.mark.parametrize("constant", [-1.0, -0.3, 0.0, 0.8, 1.0])
def test_the_discriminator_cannot_tell_equal_distributions_apart(constant):
    logits = torch.full((6, 3), constant, dtype=torch.float64)
    assert discriminator_loss(logits, logits, "hinge").item() == pytest.approx(2)
    softplus = discriminator_loss(logits, logits, "softplus").item()
    assert softplus >= 2 * math.log(2) - 1e-12 and (softplus == pytest.approx(2 * math.log(2))) == (constant == 0)
    assert generator_loss(logits, "hinge").item() == pytest.approx(-constant)


def test_the_golden_logit_through_the_method():
    """Data N(.7, .5^2), generator N(.2, .7^2), EDM at sigma = 1, x = .8: logit .204622, gradient .322685."""
    schedule = SCHEDULES["edm"]
    real, fake = (GaussianDenoiser(*moments, schedule, "epsilon") for moments in (G1, (SHIFT, SCALE)))
    method = adversarial(generator(schedule, "epsilon", SCALE, SHIFT), WithFeatures(real))
    method.gan.heads = OptimalHeads(real, fake)
    one = batch(1).but(dtype=torch.float64)
    method.gan.times = lambda rows, name: schedule.time(torch.zeros(1))
    x = (column(0.8) - one.noise("gan")).requires_grad_()
    loss = method.gan.student_loss(x, one)
    (slope,) = torch.autograd.grad(loss, x)
    assert (round(-loss.item(), 6), round(-slope.item(), 6)) == (0.204622, 0.322685)


@pytest.mark.parametrize("name,kind", ALL)
def test_the_optimal_logit_gives_the_distribution_matching_gradient(name, kind):
    """With l = log p_real,t - log p_fake,t the hinge generator's gradient is alpha (s_fake - s_real), that is
    (alpha / sigma)^2 (D_fake - D_real): DMD without its normaliser."""
    schedule = SCHEDULES[name]
    real, fake = (GaussianDenoiser(*moments, schedule, kind) for moments in (G1, (SHIFT, SCALE)))
    student, teacher = generator(schedule, kind, SCALE, SHIFT), WithFeatures(real)
    method = adversarial(student, teacher, inputs="rollout", times=[0.9], gan_weight=0.7)
    method.gan.heads = OptimalHeads(real, fake)
    found = gradients(method.losses("student", data())["gan"], student)
    x_t, t = teacher.calls[-1]
    alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
    score = alpha * (fake.score(x_t, t) - real.score(x_t, t))
    matching = (alpha / sigma) ** 2 * (fake(x_t, t).x0 - real(x_t, t).x0)
    z = data().noise("start")
    for slope in (score, matching):
        expected = (0.7 * (slope * z).mean().item(), 0.7 * slope.mean().item())
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_real_and_generated_samples_get_the_same_noise_at_the_same_log_normal_times(name):
    schedule = SCHEDULES[name]
    real = GaussianDenoiser(*G1, schedule, "v")
    teacher = WithFeatures(real)
    method = adversarial(generator(schedule, "v", 1.0, 0.0), teacher, noise_mean=0.4, noise_std=0.8)
    method.gan.heads = OptimalHeads(real, real)
    rows = data(4000)
    method.losses("student", rows)
    teacher.calls.clear()
    rows.turn = 1
    assert method.losses("discriminator", rows)["gan"].item() == pytest.approx(2)
    (x_real, t), (x_fake, t_fake) = teacher.calls
    alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
    torch.testing.assert_close(t, t_fake)
    torch.testing.assert_close(x_real - alpha * rows.latents, x_fake - alpha * rows.state["x"])
    log_ratio = (sigma / alpha).log()
    assert log_ratio.mean().item() == pytest.approx(0.4, abs=0.06)
    assert log_ratio.std().item() == pytest.approx(0.8, abs=0.06)


def test_the_student_denoises_real_samples_at_all_of_its_times():
    schedule = SCHEDULES["flow"]
    student = Spy(generator(schedule, "flow", 1.0, 0.0))
    method = adversarial(student, None)
    rows = data(400)
    method.denoise_data(rows)
    ((x_t, t),) = student.calls
    assert set(t.tolist()) == set(GRID)
    noised, first = schedule.add_noise(rows.latents, rows.noise("start"), t), (t == GRID[0])[:, None]
    torch.testing.assert_close(x_t, torch.where(first, rows.noise("start"), noised))


@pytest.mark.parametrize("name", ["ladd", "add"])
def test_the_student_starts_from_noise_that_knows_no_images_brightness(name):
    """Stable Diffusion's table has alpha_999 = .068: of the mean of 128 x 128 pixels, which differs by .5 among images,
    noised data show (.068 .5)^2 / ((.068 .5)^2 + sigma^2 / 16384) = 95 % of the variance."""
    schedule, times = SCHEDULES["vp"], [1.0, 0.75, 0.5, 0.25]
    student = Spy(generator(schedule, "epsilon", 1.0, 0.0))
    method = adversarial(student, None, name=name, times=times, first_share=1.0)
    rows = batch(200).but(shape=(128, 128), dtype=torch.float32)
    brightness = 0.5 * torch.randn(200, generator=torch.Generator().manual_seed(3))
    rows.latents = brightness[:, None, None] + torch.zeros(200, 128, 128)

    def seen(x_t):
        return torch.corrcoef(torch.stack([x_t.mean((1, 2)), brightness]))[0, 1].item() ** 2

    assert seen(schedule.add_noise(rows.latents, rows.noise("start"), at(1.0, 200))) == pytest.approx(0.95, abs=0.02)
    student.denoiser = lambda x_t, t, cond: schedule_prediction(schedule, x_t, t)
    method.denoise_data(rows)
    ((x_t, t),) = student.calls
    assert set(t.tolist()) == {1.0} and seen(x_t) < 0.05
    assert torch.equal(x_t, rows.noise("start"))


def schedule_prediction(schedule, x_t, t):
    return Prediction(x_t, x_t, t, schedule, "sample")


@pytest.mark.parametrize(
    "count,later,first", [(1, [1], [1]), (2, [0.7, 0.3], [0, 1]), (3, [0.7, 0.15, 0.15], [0, 0, 1]),
                          (4, [0.7, 0.1, 0.1, 0.1], [0, 0, 0.5, 0.5])],
)  # fmt: skip
def test_the_papers_probabilities_of_the_students_times(count, later, first):
    """LADD, four steps: p = [.7, .1, .1, .1], and [0, 0, .5, .5] while the student warms up."""
    schedule = SCHEDULES["flow"]
    student = Spy(generator(schedule, "flow", 1.0, 0.0))
    method = adversarial(student, None, times=[1.0, 0.75, 0.5, 0.25][:count], warmup=3)
    for step, shares in ((0, first), (2, first), (3, later), (100, later)):
        assert method.shares(step) == pytest.approx(shares)
        student.calls.clear()
        method.denoise_data(data(4000, step))
        ((_, t),) = student.calls
        found = [(t == one.t).float().mean().item() for one in method.sampler.grid()]
        assert found == pytest.approx(shares, abs=0.03)
        assert all(share > 0 or part == 0 for share, part in zip(shares, found, strict=True))
        rollouts = adversarial(student, None, inputs="rollout", times=[1.0, 0.75, 0.5, 0.25][:count])
        rollouts.shares, starts = (lambda _, own=method.shares(step): own), []
        for i in range(300):  # each a batch, whose rows have one time
            rollouts.continue_rollout(data(1, 1000 * step + i))
            starts.append(student.calls[-1][1].item())
        found = [starts.count(one.t) / 300 for one in method.sampler.grid()]
        assert found == pytest.approx(shares, abs=0.1)


def test_a_run_is_longer_than_its_warm_up():
    problems = METHODS["ladd"].problems
    config = METHODS["ladd"].Config(warmup=50)
    assert list(problems(config, 4, 51)) == []
    assert list(problems(config, 4, 50)) == [("method.warmup", "expected below train.steps (50), found 50")]


def test_heads_get_the_time_and_the_condition():
    """At the start they say nothing with them; a projection that has learnt tells classes and times apart."""
    schedule = SCHEDULES["flow"]
    teacher = Moments(generator(schedule, "flow", 1.0, 0.0))
    method = adversarial(generator(schedule, "flow", 1.0, 0.0), teacher)
    rows = data(6).but(cond={"class_labels": torch.tensor([0, 1, 2, 0, 1, 2])})
    method.prepare(rows)
    assert teacher.depths is None  # heads on every block
    heads = method.gan.heads
    condition = method.gan.condition(rows)
    torch.testing.assert_close(condition[:, :64], fourier(method.noise_times(rows, "gan time"), 64))
    torch.testing.assert_close(condition[0, 64:], condition[3, 64:])
    assert (condition[0, 64:] * condition[1, 64:]).mean().abs() < 0.2 and (
        condition[0, 64:] ** 2
    ).mean() == pytest.approx(1, abs=0.01)
    states = method.gan.features(rows.latents, rows)
    assert torch.equal(heads(states, condition), heads(states))
    hidden = heads.heads[0][:-1](states[0].float())
    with torch.no_grad():
        heads.projections[0].weight.normal_()
    expected = heads(states)[:, 0] + (hidden[:, 0] * (condition @ heads.projections[0].weight.T)).mean(1)
    torch.testing.assert_close(heads(states, condition)[:, 0], expected)
    pixels = adversarial(generator(schedule, "flow", 1.0, 0.0), teacher, name="add")
    torch.testing.assert_close(pixels.gan.condition(rows), condition[:, 64:])
    pixels.gan.network = lambda images: [images[..., None]]
    pixels.prepare(rows)
    with torch.no_grad():
        pixels.gan.heads.projections[0].weight.normal_()
    logits = pixels.gan.logits(torch.ones(6, 1), rows)
    torch.testing.assert_close(logits[:3], logits[3:])
    assert not torch.isclose(logits[0], logits[1])


def test_the_rollout_needs_no_real_sample_to_start_from():
    schedule = SCHEDULES["flow"]
    student, teacher = Spy(generator(schedule, "flow", 0.5, 0.4)), GaussianDenoiser(*G1, schedule, "flow")
    method = adversarial(student, WithFeatures(teacher), inputs="rollout")
    method.gan.heads = OptimalHeads(teacher, teacher)
    rows = data(3)
    method.losses("student", rows)
    torch.testing.assert_close(rows.state["x"], method.generate(batch(3)).detach())
    assert not rows.state["x"].requires_grad


def test_the_gradient_penalty_of_a_linear_head():
    """|d logit / d state|^2 = |w|^2, its gradient 2 w; through the loss with r1 / 2, on top of the loss itself."""
    heads = Linear(0.6, -1.1, 0.3)
    fake, real = torch.randn(2, 5, 1, 3, dtype=torch.float64)
    for graph in (False, True):  # a frozen network's states have none, a critic's have one
        states = (real * 1.0).requires_grad_(graph)
        with_r1, without = (Given(heads, r1=r1).loss_of_heads(fake, states, None) for r1 in (0.4, 0.0))
        torch.testing.assert_close(with_r1 - without, 0.2 * heads.weight.square().sum())
        (slope,) = torch.autograd.grad(with_r1 - without, heads.weight)
        torch.testing.assert_close(slope, 0.4 * heads.weight.detach())


def test_the_gradient_penalty_of_real_heads():
    """The mean over votes of the squared slope of each, by central differences."""
    torch.manual_seed(0)
    heads, states = Heads([(4, 3), (2, 2, 2)], width=5).double(), [torch.randn(2, 4, 3), torch.randn(2, 2, 2, 2)]
    heads.forward = lambda given: torch.cat(
        [
            head(state if state.ndim == 3 else state.flatten(2).transpose(1, 2))[..., 0]
            for head, state in zip(heads.heads, given, strict=True)
        ],
        dim=1,
    )
    states = [state.double().requires_grad_() for state in states]
    logits = heads(states)
    found = gradient_penalty(logits, states)
    total, h = 0.0, 1e-5
    with torch.no_grad():
        for which, state in enumerate(states):
            for place in range(state.numel()):
                step = torch.zeros_like(state).flatten()
                step[place] = h
                step = step.reshape(state.shape)
                up, down = ([s + sign * step if i == which else s for i, s in enumerate(states)] for sign in (1, -1))
                total += (((heads(up) - heads(down)) / (2 * h)) ** 2).sum().item()
    assert found.item() == pytest.approx(total / logits.numel(), rel=1e-6)
    found.backward()
    assert all(head[1].weight.grad.abs().sum() > 0 for head in heads.heads)


@pytest.mark.parametrize("name,kind", ALL)
def test_the_distance_to_the_teachers_guess(name, kind):
    """c(t) |x - sg D(x_t)|^2 with c = alpha: its gradient is 2 alpha (x - D(x_t)), none through the teacher."""
    schedule, (mean, std) = SCHEDULES[name], G1
    student, teacher = generator(schedule, kind, SCALE, SHIFT), Spy(GaussianDenoiser(mean, std, schedule, kind))
    method = adversarial(student, teacher, name="add", times=[0.9])
    rows = data()
    x = SCALE * rows.noise("start") + SHIFT
    guess = student(rows.noise("start"), at(0.9, 32), {}).x0
    found = gradients(method.distance(guess, rows), student)
    x_t, t = teacher.calls[-1]
    alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
    target = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
    slope = 2 * alpha * (x - target)
    assert found == pytest.approx(((slope * rows.noise("start")).mean().item(), slope.mean().item()), rel=1e-8)


def test_pixels_are_judged_after_decoding():
    """The gradient passes the decoder: logit -3 (2 x + 1), so the hinge student's slope is -(-3) 2."""
    schedule = SCHEDULES["flow"]
    student = generator(schedule, "flow", SCALE, SHIFT)
    teacher = GaussianDenoiser(*G1, schedule, "flow")
    method = adversarial(student, teacher, name="add", inputs="rollout", times=[0.9], decode=lambda x: 2 * x + 1)
    method.gan.network, method.gan.heads = lambda images: [images], Linear(-3.0)
    rows = data()
    losses = method.losses("student", rows)
    assert set(losses) == {"gan", "distill"}
    assert gradients(losses["gan"], student) == pytest.approx((6 * rows.noise("start").mean().item(), 6.0))
    x, real = rows.state["x"], rows.latents
    expected = torch.relu(1 - 3 * (2 * x + 1)).mean() + torch.relu(1 + 3 * (2 * real + 1)).mean() + 1e-5 / 2 * 9
    torch.testing.assert_close(method.losses("discriminator", rows)["gan"], expected)


class Moments(Spy):
    """A frozen denoiser whose states are x_t's powers, one token each sample: enough for a Gaussian's logit."""

    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.network = nn.Linear(1, 1)

    def features(self, x_t, t, cond, depths=4):
        self.depths = depths
        return [torch.stack([x_t, x_t**2, torch.ones_like(x_t)], dim=-1)]


def test_only_the_moving_player_receives_gradients():
    schedule = SCHEDULES["vp"]
    student, teacher = generator(schedule, "v", 1.0, 0.0), generator(schedule, "v", 1.0, 0.3)
    reader = Moments(teacher)
    reader.network = teacher.network
    method = adversarial(student, reader, r1=0.1, distill_weight=0.5, discriminator_steps=2)
    assert method.turns(0) == ("student", "discriminator", "discriminator")
    method.prepare(data(2))
    networks = {"teacher": teacher.network, "student": student.network, "discriminator": method.gan.heads}
    rows = data()
    for mover in method.players:
        for role, network in networks.items():
            network.zero_grad(set_to_none=True)
            network.requires_grad_(role == mover)  # as the trainer does: the others still carry the graph
        sum(method.losses(mover, rows).values()).backward()
        assert {role for role, net in networks.items() if any(p.grad is not None for p in net.parameters())} == {mover}
        assert method.modules(mover) == [networks[mover]]
    assert method.extra_modules() == {"heads": method.gan.heads}


def test_small_heads_on_analytic_features_lead_the_student_to_the_data():
    """Most of the way: a GAN of this size goes on to circle around the data."""
    torch.manual_seed(0)
    schedule, (mean, std) = SCHEDULES["flow"], G1
    student = generator(schedule, "flow", 1.2, -0.3)
    teacher = Moments(GaussianDenoiser(mean, std, schedule, "flow"))
    method = adversarial(student, teacher, inputs="rollout", times=[0.9], noise_mean=-0.5, r1=0.03)
    method.prepare(data(2))
    optimizers = {
        "student": torch.optim.Adam(student.network.parameters(), 0.01, betas=(0.0, 0.99)),
        "discriminator": torch.optim.Adam(method.gan.heads.parameters(), 0.03, betas=(0.0, 0.99)),
    }
    distances = []
    for step in range(120):
        distances.append(math.hypot(student.network.scale.item() - std, student.network.shift.item() - mean))
        rows = data(128, step)
        for turn, mover in enumerate(method.players):
            rows.turn = turn
            optimizers[mover].zero_grad()
            sum(method.losses(mover, rows).values()).backward()
            optimizers[mover].step()
    assert max(distances[-20:]) < distances[0] / 3
