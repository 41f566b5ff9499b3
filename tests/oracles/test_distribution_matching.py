"""DMD, VSD, PG-SB, Diff-Instruct and Decoupled DMD against closed forms; see also test_dmd2.py, test_divergence.py."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stepdistill.data.batch import Batch, PathRows
from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.methods import METHODS, Roles
from stepdistill.roles.build import LoRA, build_roles
from stepdistill.testing.analytic import GaussianDenoiser, MixtureDenoiser, affine_critic
from stepdistill.testing.bed import (
    G1,
    KINDS,
    M1,
    SCHEDULES,
    OnGrid,
    Spy,
    at,
    batch,
    corners,
    generator,
    gradients,
)

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
SCALE, SHIFT = 0.9, 0.2
START = 0.9


def one_step(method: str, student, teacher, critic, scale: float = 1.0, times=(START,), **config):
    """The method of that name for a student that starts at ``times``."""
    implementation = METHODS[method]
    roles = Roles(teacher=teacher, student=student, critic=critic, scale=scale)
    return implementation(implementation.Config(**config), roles, OnGrid(student.schedule, list(times)))


def scores(schedule, x_t, t) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """alpha, sigma, and the closed-form scores of G1 and of the affine generator's samples at x_t."""
    alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
    mean, std = G1
    real = -(x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    fake = -(x_t - alpha * SHIFT) / (alpha**2 * SCALE**2 + sigma**2)
    return alpha, sigma, real, fake


class Given(Batch):
    """A batch whose draws are given by name; the rest is drawn as ever."""

    def noise(self, name):
        return self.state["given"].get(name) if name in self.state["given"] else super().noise(name)

    def uniform(self, name, low=0.0, high=1.0):
        name = self.state["given"].get(name, name)
        return super().uniform(name, low, high)


def given(rows: Batch, **draws) -> Given:
    return Given(**{**vars(rows), "state": {"given": draws}})


# Closed-form gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,kind", ALL)
def test_vsd_is_sigma_cubed_times_the_score_difference(name, kind):
    """sigma^2 (eps_real - eps_fake) = sigma^3 (s_fake - s_real) on VP; elsewhere sigma^2 is that of the same SNR."""
    schedule = SCHEDULES[name]
    teacher = Spy(GaussianDenoiser(*G1, schedule, kind))
    student = generator(schedule, kind, SCALE, SHIFT)
    method = one_step("vsd", student, teacher, affine_critic(SCALE, SHIFT, schedule, kind))
    found = gradients(method.losses("student", batch(32))["dm"], student)
    ((x_t, t),) = teacher.calls
    assert t.min() >= 0.0195 and t.max() <= 0.9805 and len(t.unique()) > 20
    alpha, sigma, real, fake = scores(schedule, x_t, t)
    weight = sigma**3 if name == "vp" else sigma**3 / (alpha**2 + sigma**2)
    slope = weight * (fake - real)
    z = batch(32).noise("start")
    assert found == pytest.approx(((slope * z).mean().item(), slope.mean().item()), rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("name,kind", ALL)
def test_diff_instruct_is_the_gradient_of_the_divergence(name, kind):
    """d KL / db = alpha^2 (b - m)/V, d KL / da = alpha^2 a (1/V - 1/A), times sigma^2/alpha^2 of the x_0 form."""
    schedule, (mean, std) = SCHEDULES[name], G1
    student, teacher = generator(schedule, kind, SCALE, SHIFT), Spy(GaussianDenoiser(mean, std, schedule, kind))
    critic = affine_critic(SCALE, SHIFT, schedule, kind)
    method = one_step("diff-instruct", student, teacher, critic, noise_mean=-0.3, noise_std=1e-9)
    z, eps = corners()
    found = gradients(method.losses("student", given(batch(4), start=z, dm=eps))["dm"], student)
    (_, t) = teacher.calls[0]
    alpha, sigma = (c[0].item() for c in schedule.coefficients(t))
    assert math.log(sigma / alpha) == pytest.approx(-0.3, abs=0.01)
    v, a = alpha**2 * std**2 + sigma**2, alpha**2 * SCALE**2 + sigma**2
    divergence = (alpha**2 * SCALE * (1 / v - 1 / a), alpha**2 * (SHIFT - mean) / v)
    assert [g * alpha**2 / sigma**2 for g in found] == pytest.approx(divergence, rel=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_diff_instructs_noise_is_log_normal(name):
    schedule = SCHEDULES[name]
    student = generator(schedule, "v", 1.0, 0.0)
    teacher, critic = Spy(GaussianDenoiser(*G1, schedule, "v")), Spy(generator(schedule, "v", 1.0, 0.0))
    method = one_step("diff-instruct", student, teacher, critic)
    rows = batch(4000)
    method.losses("student", rows)
    method.losses("critic", rows)
    t = teacher.calls[0][1]
    assert t.min() >= 0.0195 and t.max() <= 0.9805
    if name == "vp":
        assert torch.equal(t, schedule.snap(t))
    for times in (t, critic.calls[-1][1]):
        alpha, sigma = schedule.coefficients(times)
        ratio = (sigma / alpha).log()
        # The lower tail is cut where the schedule or t_min ends.
        middle, upper = ratio.quantile(0.5), ratio.quantile(0.841345)
        assert abs(middle + 1.2) < 0.1 and abs(upper - middle - 1.2) < 0.1


def test_dmd_is_dmd2s_gradient_and_a_regression():
    """The pairs' term: 1/4 mean |student(z).x_0 - y|^2, on noise, times and conditions of its own."""
    schedule, size = SCHEDULES["flow"], 5
    teacher, critic = GaussianDenoiser(*G1, schedule, "v"), affine_critic(SCALE, SHIFT, schedule, "v")
    student = Spy(generator(schedule, "v", SCALE, SHIFT))
    z, y = torch.randn(2, size, 1, dtype=torch.float64).unbind()
    rows = batch(size)
    cond = {"class_labels": torch.arange(size)}
    rows.path = PathRows(torch.stack([z, y], 1), torch.tensor([1.0, 0.0]), cond, None, torch.ones(size))
    losses = one_step("dmd", student, teacher, critic).losses("student", rows)
    assert set(losses) == {"dm", "pairs"}
    assert losses["pairs"].item() == pytest.approx(0.25 * (SCALE * z + SHIFT - y).square().mean().item())
    x_t, t = student.calls[-1]
    assert torch.equal(x_t, z) and torch.equal(t, at(START, size))  # the student's own start, not the pairs'
    dmd2 = one_step("dmd2", student, teacher, critic).losses("student", batch(size))
    assert losses["dm"].item() == dmd2["dm"].item()


def test_dmd_asks_for_its_pairs():
    config = METHODS["dmd"].Config(pairs=7, pair_steps=3)
    needs = METHODS["dmd"].data_needs(config)
    assert (needs.paths.count, needs.paths.steps, needs.paths.keep, needs.images) == (7, 3, "ends", False)
    assert (config.critic_steps, config.pair_weight) == (1, 0.25)


# Optima ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dmd", "vsd", "pg-sb", "diff-instruct", "decoupled-dmd"])
@pytest.mark.parametrize("name,kind", ALL)
def test_the_data_distribution_is_a_fixed_point(name, kind, method):
    schedule, (mean, std) = SCHEDULES[name], G1
    teacher = GaussianDenoiser(torch.tensor([mean, -1.0]), torch.tensor([std, 2.0]), schedule, kind)
    rows = batch(16, labels=(0, 1))
    z = rows.noise("start")
    # Not noise alone: epsilon has no x_0 at flow's t = 1.
    rows.path = PathRows(torch.stack([z, mean + std * z], 1), at(START, 2), rows.cond, None, torch.ones(16))

    def size_of(scale: float, shift: float) -> float:
        student = generator(schedule, kind, scale, shift)
        critic = GaussianDenoiser(torch.tensor([shift, -1.0]), torch.tensor([scale, 2.0]), schedule, kind)
        loss = sum(one_step(method, student, teacher, critic).losses("student", rows).values())
        return math.hypot(*gradients(loss, student))

    assert size_of(std, mean) < 1e-6 < 1e-3 < size_of(std, mean + 0.1)


def test_only_the_pairs_tell_a_mirrored_generator_apart():
    schedule, (mean, std) = SCHEDULES["vp"], G1
    student, rows = generator(schedule, "v", -std, mean), batch(16)
    z = rows.noise("pairs")
    rows.path = PathRows(torch.stack([z, mean + std * z], 1), torch.ones(2), {}, None, torch.ones(16))
    teacher = GaussianDenoiser(mean, std, schedule, "v")
    losses = one_step("dmd", student, teacher, teacher).losses("student", rows)
    assert losses["dm"].item() < 1e-12 and losses["pairs"].item() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_on_both_scores_keeps_the_data_and_guidance_on_one_does_not(kind):
    """Class 1 of bed M1, whose empty condition is the whole mixture; student and critic are exact."""
    schedule = SCHEDULES["edm"]
    _, means, stds = M1
    real = MixtureDenoiser(*M1, schedule, kind)

    def slope(method: str, scale: float) -> float:
        student = generator(schedule, kind, stds[1], means[1])
        losses = one_step(method, student, real, real, scale).losses("student", batch(64, labels=(1, 2)))
        return math.hypot(*gradients(losses["dm"], student))

    for scale in (1.0, 1.5, 4.5):
        assert slope("vsd", scale) < 1e-9 and slope("pg-sb", scale) < 1e-9
    for method in ("dmd2", "decoupled-dmd", "diff-instruct"):
        assert slope(method, 1.0) < 1e-9
        assert slope(method, 4.5) > 1e-2


@pytest.mark.parametrize("name", SCHEDULES)
def test_pg_sb_is_vsd_at_the_mean_scale_in_expectation(name):
    """The gradient is affine in w, and each sample draws its own from U[2, 5]."""
    schedule, rows = SCHEDULES[name], batch(64, labels=(1, 2))
    real, fake = (
        MixtureDenoiser(*M1, schedule, "v"),
        MixtureDenoiser([0.5, 0.5], [-1.0, 0.6], [0.4, 0.7], schedule, "v"),
    )
    student = generator(schedule, "v", 1.0, 0.0)
    x = student(rows.noise("start"), at(START, 64), {}).x0.detach()

    def vsd(scale: float) -> torch.Tensor:
        return one_step("vsd", student, real, fake, scale).gradient(x, rows)

    torch.testing.assert_close((vsd(2.0) + vsd(5.0)) / 2, vsd(3.5))
    w = rows.uniform("guidance", 2, 5)[:, None]
    expected = vsd(1.0) + (w - 1) * (vsd(2.0) - vsd(1.0))
    torch.testing.assert_close(one_step("pg-sb", student, real, fake, 1.5).gradient(x, rows), expected)
    many = batch(4000).uniform("guidance", 2, 5)
    assert abs(many.mean() - 3.5) < 0.05 and many.min() >= 2 and many.max() < 5


# Decoupled DMD ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,kind", ALL)
def test_decoupled_dmd_at_equal_noise_is_guided_dmd(name, kind):
    """(D_fake - D_w) / mean|x - D_cond|: the guided gradient, under the unguided normaliser."""
    schedule, w = SCHEDULES[name], 2.5
    real, fake = MixtureDenoiser(*M1, schedule, kind), affine_critic(SCALE, SHIFT, schedule, kind)
    student = generator(schedule, kind, SCALE, SHIFT)
    rows = batch(16, labels=(1, 2))
    same = given(rows, **{"augmentation": rows.noise("dm"), "augmentation time": "dm time"})
    x = student(rows.noise("start"), at(START, 16), {}).x0.detach()
    method = one_step("decoupled-dmd", student, real, fake, scale=w, t_max=START)
    t = schedule.snap(rows.uniform("dm time", 0.02, START))
    x_t = schedule.add_noise(x, rows.noise("dm"), t)
    cond, null = real.posterior_mean(x_t, t, rows.cond), real.posterior_mean(x_t, t, rows.null)
    expected = (fake.posterior_mean(x_t, t) - null - w * (cond - null)) / (x - cond).abs()
    torch.testing.assert_close(method.gradient(x, same), expected, rtol=1e-7, atol=1e-9)
    guided = one_step("dmd2", student, real, fake, scale=w, t_max=START).gradient(x, rows)
    assert torch.equal(guided.sign(), expected.sign())


def test_decoupled_dmd_guides_below_the_students_own_noise():
    schedule, times = SCHEDULES["flow"], [1.0, 0.75, 0.5, 0.25]
    student, teacher = generator(schedule, "v", 0.5, 0.4), Spy(MixtureDenoiser(*M1, schedule, "v"))
    critic = affine_critic(0.5, 0.4, schedule, "v")
    method = one_step("decoupled-dmd", student, teacher, critic, scale=1.5, times=times)
    highest = {}
    for step in range(40):
        teacher.calls.clear()
        rows = batch(200, step, labels=(1, 2))
        method.losses("student", rows)
        (_, matching), (_, cond), (_, null) = teacher.calls
        assert matching.max() > 0.9 and torch.equal(cond, null)
        now = times[rows.integer("k", 4)]
        assert cond.max() < min(now, 0.98) and cond.min() >= 0.02
        highest[now] = max(highest.get(now, 0), cond.max().item() / min(now, 0.98))
    assert len(highest) == 4 and min(highest.values()) > 0.95


def test_decoupled_dmd_without_guidance_is_dmd2():
    schedule, rows = SCHEDULES["vp"], batch(8)
    real, fake = GaussianDenoiser(*G1, schedule, "v"), affine_critic(SCALE, SHIFT, schedule, "v")
    x, student = torch.randn(8, 1, dtype=torch.float64), generator(schedule, "v", 1.0, 0.0)
    found, expected = (one_step(name, student, real, fake).gradient(x, rows) for name in ("decoupled-dmd", "dmd2"))
    assert torch.equal(found, expected)


# The critic ------------------------------------------------------------------------------------------------------


def test_the_vsd_critic_is_an_adapter_that_starts_as_the_teacher():
    """A full student beside a LoRA critic on the teacher's own weights: the adapter moves, in its turn."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(2, 16), nn.Linear(16, 1)

        def forward(self, x, timestep, class_labels):
            return self.outer(torch.tanh(self.inner(torch.cat([x + class_labels[:, None], timestep[:, None]], 1))))

    schedule, rows = SCHEDULES["flow"], batch(32, labels=(0, 3))
    rows.dtype = torch.float32
    teacher = Denoiser(Network(), CallSpec("x", "timestep"), schedule, "v")
    implementation = METHODS["vsd"]
    config = implementation.Config()
    roles = build_roles(teacher, {"student": "full"} | dict(implementation.role_training(config)), 2.0, LoRA(4))
    method = implementation(config, roles, OnGrid(schedule, [1.0]))
    x, t = torch.randn(32, 1), torch.rand(32)
    before = roles.teacher(x, t, rows.cond).raw
    assert torch.equal(roles.critic(x, t, rows.cond).raw, before)
    assert torch.equal(roles.student(x, t, rows.cond).raw, before)
    assert method.losses("student", rows)["dm"] == 0
    (network,) = method.modules("critic")
    names = [name for name, _ in network.named_parameters()]
    assert names and all("lora_" in name and "critic" in name for name in names)

    for player_ in ("critic", "student"):
        moving = list(method.modules(player_)[0].parameters())
        for parameter in moving:
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(moving, lr=0.3)
        # B starts at zero, so a second step is the first that moves A.
        for _ in range(2):
            sum(method.losses(player_, rows).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        for parameter in moving:
            parameter.requires_grad_(False)
        moved = {
            n
            for n in ("teacher", "student", "critic")
            if not torch.equal(getattr(roles, n)(x, t, rows.cond).raw, before)
        }
        assert moved == ({"critic"} if player_ == "critic" else {"critic", "student"})
    assert implementation.role_training(implementation.Config(critic="full")) == {"critic": "full"}


def test_the_vsd_critic_hears_an_empty_condition_one_time_in_ten():
    schedule, seen = SCHEDULES["flow"], []

    class Listening(Spy):
        def __call__(self, x_t, t, cond):
            seen.append(cond["class_labels"])
            return super().__call__(x_t, t, cond)

    critic = Listening(generator(schedule, "v", 1.0, 0.0))
    method = one_step("vsd", generator(schedule, "v", 1.0, 0.0), None, critic)
    method.losses("critic", batch(2000, labels=(4, 9)))
    labels = seen[-1]
    assert set(labels.tolist()) == {4, 9} and abs((labels == 9).double().mean() - 0.1) < 0.02
    method = one_step("vsd", generator(schedule, "v", 1.0, 0.0), None, critic, critic_dropout=0)
    method.losses("critic", batch(50, labels=(4, 9)))
    assert set(seen[-1].tolist()) == {4}


def test_a_range_of_scales_is_ascending_and_needs_an_empty_condition():
    with pytest.raises(ValidationError, match="lower end first"):
        METHODS["vsd"].Config(guidance_range=[5, 2])
    schedule = SCHEDULES["flow"]
    any_player = generator(schedule, "v", 1.0, 0.0)
    with pytest.raises(Exception, match=r"method\.guidance_range: expected null for a pipeline without guidance"):
        one_step("pg-sb", any_player, any_player, any_player).prepare(batch())


# Convergence -----------------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """A small critic of each element on its own, which must learn what the closed forms above are given."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, 48), nn.SiLU()) for width in (3, 48))
        self.last = nn.Linear(48, 1)

    def forward(self, x, timestep):
        t = (timestep / 1000)[:, None].expand_as(x)
        hidden = torch.stack([x, t, t**2], 2)
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(hidden)[..., 0]


@pytest.mark.parametrize(
    "name,config,tolerance",
    [
        ("dmd", {}, 0.06),
        ("dmd2", {"critic_steps": 1}, 0.06),
        ("f-distill", {"critic_steps": 1, "divergence": "forward-kl", "gan_critic_weight": 1.0}, 0.06),
        # Without the normaliser high noise weighs most, where a learned critic hardly sees the spread.
        ("vsd", {"critic": "full"}, 0.13),
        ("diff-instruct", {}, 0.1),
    ],
)
def test_an_affine_student_and_a_learned_critic_find_the_data(name, config, tolerance):
    """(a, b) goes from (1.3, -0.4) to (q, m)."""
    schedule, (mean, std), size = SCHEDULES["flow"], G1, 24
    student = generator(schedule, "sample", 1.3, -0.4)
    critic = Denoiser(Perceptron().double(), CallSpec("x", "timestep", timestep_dtype=torch.float64), schedule, "v")
    roles = Roles(teacher=GaussianDenoiser(mean, std, schedule, "v"), student=student, critic=critic)
    method = METHODS[name](METHODS[name].Config(**config), roles, OnGrid(schedule, [1.0]))

    def rows(step: int) -> Batch:
        made = batch(size, step)
        made.shape = (8,)
        z, made.latents = made.noise("z"), mean + std * made.noise("real")
        made.path = PathRows(torch.stack([z, mean + std * z], 1), torch.tensor([1.0, 0.0]), {}, None, torch.ones(size))
        return made

    method.prepare(rows(0))
    steps, optimizers = 120, {}
    for mover, lr in {"student": 0.05, "critic": 0.02}.items():
        parameters = [parameter for module in method.modules(mover) for parameter in module.parameters()]
        optimizers[mover] = torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.99))
    decays = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers.values()]
    for step in range(steps):
        made = rows(step)
        for made.turn, mover in enumerate(method.turns(step)):
            optimizers[mover].zero_grad()
            sum(method.losses(mover, made).values()).backward()
            optimizers[mover].step()
            method.after_update(mover)
        for decay in decays:
            decay.step()
    scale, shift = (parameter.item() for parameter in student.network.parameters())
    assert abs(abs(scale) - std) < tolerance and abs(shift - mean) < 0.05
