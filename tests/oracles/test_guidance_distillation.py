"""Guidance distillation against closed forms: targets, gradients, optima, and small students that really learn it."""

import itertools
import math

import pytest
import torch
from torch import nn

from stepdistill.data.batch import Batch, PathRows
from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.samplers import DDIM, solver_grid
from stepdistill.diffusion.schedule import per_sample
from stepdistill.errors import InputError
from stepdistill.methods import METHODS, Roles
from stepdistill.testing.analytic import MixtureDenoiser
from stepdistill.testing.bed import KINDS, M1, SCHEDULES, Map, OnGrid, at, batch, column, gradients

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
CLASS, NULL, SCALE = 1, 2, 1.5
RANGE = {"w_min": 1.0, "w_max": 4.0}
ONE_SCALE = {"score-matching": {}, "lora-guidance": {}}
CONFIGS = {"w-embed": RANGE, **ONE_SCALE, "agd": RANGE, "guide": RANGE, "gft": RANGE, "model-guidance": {}}
REGRESSIONS, ON_DATA = ("w-embed", *ONE_SCALE, "agd", "guide"), ("gft", "model-guidance")


class Told(Map):
    """A ``Map`` whose function also hears of the guidance scale; ``default`` where the call names none."""

    default = SCALE

    def forward(self, x, timestep, class_labels=None, guidance_scale=None):
        w = torch.full((len(x),), self.default, dtype=x.dtype) if guidance_scale is None else guidance_scale
        self.told, function = w, self.function
        self.function = lambda x, t, labels: function(x, t, labels, w)
        try:
            return super().forward(x, timestep, class_labels)
        finally:
            self.function = function


def told(function, schedule, kind, scale=1.0, shift=0.0) -> Denoiser:
    """A trainable stand-in that means scale * function(x, t, labels, w) + shift."""
    spec = CallSpec("x", "timestep", timestep_dtype=torch.float64)
    return Denoiser(Told(function, schedule, kind, scale, shift), spec, schedule, kind)


def mixture(schedule, kind) -> MixtureDenoiser:
    return MixtureDenoiser(*M1, schedule, kind)


def guided_mean(teacher, x, t, labels, w):
    """D + w (D_k - D); for the null label D itself."""
    plain = teacher.posterior_mean(x, t)
    return plain + per_sample(w, x) * (teacher.posterior_mean(x, t, {"class_labels": labels}) - plain)


def method_of(name: str, teacher, student, scale: float = SCALE, **config):
    cls = METHODS[name]
    roles = Roles(teacher=teacher, student=student, scale=scale)
    return cls(cls.Config(**CONFIGS[name] | config), roles, OnGrid(teacher.schedule, [1.0, 0.5], DDIM))


def trajectories(teacher, size: int, steps: int = 12) -> PathRows:
    """Guided DDIM paths with a scale each, from the formula."""
    schedule = teacher.schedule
    times = solver_grid(schedule, steps).flip(0)
    draws = torch.Generator().manual_seed(2)
    scales = 1 + 3 * torch.rand(size, generator=draws, dtype=torch.float64)
    x = schedule.sigma(times[:1]) * torch.randn(size, 1, generator=draws, dtype=torch.float64)
    points, labels = [x], torch.full((size,), CLASS)
    for t, r in itertools.pairwise(times):
        x0 = guided_mean(teacher, x, t.expand(size), labels, scales)
        (alpha, sigma), (alpha_r, sigma_r) = schedule.coefficients(t), schedule.coefficients(r)
        x = x0 if r == 0 else alpha_r * x0 + sigma_r * (x - alpha * x0) / sigma
        points.append(x)
    rows = ({"class_labels": torch.full((size,), label)} for label in (CLASS, NULL))
    return PathRows(torch.stack(points, 1), times, *rows, scales)


def rows_of(teacher, size: int = 64, step: int = 0) -> Batch:
    label = {"class_labels": torch.full((size,), CLASS)}
    data = teacher.sample(size, (1,), label, torch.Generator().manual_seed(3 + step))
    rows = batch(size, step, data, (CLASS, NULL))
    rows.path = trajectories(teacher, size)
    return rows


def unit(kind, alpha, sigma):
    """|d emitted / d x_0|."""
    return {
        "epsilon": alpha / sigma,
        "v": (alpha**2 + sigma**2) / sigma,
        "edm": (alpha**2 + sigma**2) / sigma,
        "flow": (alpha + sigma) / sigma,
        "sample": torch.ones_like(sigma),
    }[kind]


class Recorder:
    """A student that remembers what it was asked, and at which w."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.schedule, self.kind = denoiser, denoiser.schedule, denoiser.kind
        self.calls = []

    def __call__(self, x_t, t, cond):
        prediction = self.denoiser(x_t, t, cond)
        self.calls.append((x_t, t, cond["class_labels"], self.denoiser.network.told))
        return prediction


def test_the_golden_numbers():
    """Class 2 of M1 at w = 3, rectified flow, t = .5, x = .8."""
    schedule = SCHEDULES["flow"]
    teacher, x, t = mixture(schedule, "flow"), column(0.8), at(0.5)
    student = told(lambda *arguments: guided_mean(teacher, *arguments), schedule, "flow")
    row = {"class_labels": torch.tensor([CLASS]), "guidance_scale": torch.tensor([3.0])}
    prediction = student(x, t, row)
    assert (round(prediction.eps.item(), 6), round(prediction.raw.item(), 6)) == (0.433005, -0.733990)
    found = method_of("w-embed", teacher, student).teacher(x, t, batch(1, labels=(CLASS, NULL)), 3.0)
    assert (round(found.eps.item(), 6), round(found.raw.item(), 6)) == (0.433005, -0.733990)


@pytest.mark.parametrize("method", REGRESSIONS)
@pytest.mark.parametrize("name,kind", ALL)
def test_loss_and_gradient_are_the_closed_form(name, kind, method):
    """(x_0 of the student - D_w)^2 in the unit of what is emitted, at the points and the w that the student saw."""
    schedule = SCHEDULES[name]
    teacher = mixture(schedule, kind)
    student = Recorder(told(lambda x, t, labels, w: 0.9 * x + 0.1 * per_sample(w, x), schedule, kind, 0.8, 0.3))
    loss = sum(method_of(method, teacher, student).losses("student", rows_of(teacher)).values())
    ((x_t, t, labels, w),) = student.calls
    assert (labels == CLASS).all()
    assert (w == SCALE).all() if method in ONE_SCALE else 1 <= w.min() < 1.5 and 3.5 < w.max() <= 4
    inner = 0.9 * x_t + 0.1 * w[:, None]
    difference = 0.8 * inner + 0.3 - guided_mean(teacher, x_t, t, labels, w)
    alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
    weight = unit(kind, alpha, sigma) ** 2
    assert loss.item() == pytest.approx((weight * difference**2).mean().item(), rel=1e-6)
    expected = ((2 * weight * difference * inner).mean().item(), (2 * weight * difference).mean().item())
    assert gradients(loss, student.denoiser) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", REGRESSIONS)
@pytest.mark.parametrize("name,kind", ALL)
def test_guided_prediction_is_the_optimum_on_any_points(name, kind, method):
    """Real images with noise, or the guided teacher's own trajectories: the same function has no loss on both."""
    schedule = SCHEDULES[name]
    teacher = mixture(schedule, kind)
    student = told(lambda *arguments: guided_mean(teacher, *arguments), schedule, kind)
    method = method_of(method, teacher, student)
    loss = method.losses("student", rows_of(teacher))["guidance"]
    assert loss.item() < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6
    student.network.shift.data += 0.05
    assert method.losses("student", rows_of(teacher))["guidance"].item() > 1e-4


def test_trajectory_points_of_every_time_are_trained_on():
    schedule = SCHEDULES["vp"]
    teacher = mixture(schedule, "v")
    student = Recorder(told(lambda x, t, labels, w: x, schedule, "v"))
    rows = rows_of(teacher, 500)
    method_of("agd", teacher, student).losses("student", rows)
    ((x_t, t, _, w),) = student.calls
    assert torch.equal(t.unique().flip(0), rows.path.times[:-1]) and torch.equal(w, rows.path.scales)
    k = [rows.path.times.tolist().index(time) for time in t.tolist()]
    assert torch.equal(x_t, rows.path.points[torch.arange(500), k])


def on_posterior_means(method, teacher, conditional: bool) -> None:
    """From now on the method's targets are what they are on average: D_k, or D of an unconditional model."""

    def noised(rows):
        x_t, t, _ = type(method).noised(method, rows)
        x0 = teacher.posterior_mean(x_t, t, rows.cond if conditional else None)
        return x_t, t, teacher.schedule.from_x0(x0, x_t, t, teacher.kind)

    method.noised = noised


@pytest.mark.parametrize("method", ON_DATA)
@pytest.mark.parametrize("drop", [0.0, 1.0])
@pytest.mark.parametrize("name,kind", ALL)
def test_training_on_data_has_guidance_as_its_fixed_point(name, kind, drop, method):
    """GFT: eps_u + (eps_c - eps_u) / beta. Model-guidance: u_u + (u_c - u_u) / (1 - w) with w = 1 - 1 / scale."""
    schedule = SCHEDULES[name]
    teacher = mixture(schedule, kind)
    student = told(lambda *arguments: guided_mean(teacher, *arguments), schedule, kind)
    method = method_of(method, teacher, student, scale=SCALE, drop=drop)
    on_posterior_means(method, teacher, conditional=drop == 0)
    loss = method.losses("student", rows_of(teacher))["guidance"]
    assert loss.item() < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6
    function = student.network.function
    student.network.function = lambda x, t, labels, w: function(x, t, labels, w + 0.2 * (labels == CLASS))
    stronger = method.losses("student", rows_of(teacher))["guidance"].item()
    assert stronger > 1e-8 if drop == 0 else stronger < 1e-12


@pytest.mark.parametrize("method", ON_DATA)
@pytest.mark.parametrize("name,kind", ALL)
def test_loss_on_data_is_the_closed_form(name, kind, method):
    schedule = SCHEDULES[name]
    teacher = mixture(schedule, kind)
    student = Recorder(
        told(lambda x, t, labels, w: x * per_sample(w, x) + 0.2 * labels[:, None], schedule, kind, 0.8, 0.3)
    )
    rows = rows_of(teacher)
    loss = method_of(method, teacher, student, scale=2.0, drop=0.3).losses("student", rows)["guidance"]
    (x_t, t, labels, w), (_, _, null, w_null) = sorted(student.calls, key=lambda call: (call[2] == NULL).all().item())
    dropped = labels == NULL
    assert 5 < dropped.sum() < 35 and (null == NULL).all()
    alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
    torch.testing.assert_close(x_t, alpha * rows.latents + sigma * rows.noise("forward"))
    here, empty = (0.8 * (x_t * w[:, None] + 0.2 * label[:, None]) + 0.3 for label, w in ((labels, w), (null, w_null)))
    if method == "gft":
        assert (w[dropped] == 1).all() and (w_null == 1).all() and 2 < w[~dropped].max() <= 4
        beta = 1 / w[:, None]
        difference = beta * here + (1 - beta) * empty - rows.latents
        slope = beta * (x_t * w[:, None] + 0.2 * labels[:, None])
    else:
        # scale 2 is w = 1/2 in the paper's convention; dropped rows have nothing to be guided by.
        difference = here - (rows.latents + 0.5 * (here - empty))
        slope = x_t * w[:, None] + 0.2 * labels[:, None]
    weight = unit(kind, alpha, sigma) ** 2
    assert loss.item() == pytest.approx((weight * difference**2).mean().item(), rel=1e-6)
    expected = (2 * weight * difference * slope).mean().item()
    assert gradients(loss, student.denoiser)[0] == pytest.approx(expected, rel=1e-6)


class Residual(nn.Module):
    """What a small student adds to the conditional flow: nothing at first, and nothing at w = 1."""

    def __init__(self):
        super().__init__()
        widths = ((4, 48), (48, 48), (48, 1))
        first, second, last = (nn.Linear(*sizes, dtype=torch.float64) for sizes in widths)
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, x, t, w):
        return self.layers(torch.cat([x, t[:, None], w[:, None] - 1, x * t[:, None]], 1)) * (w[:, None] - 1)


@pytest.mark.parametrize(
    "method,steps,allowed",
    [
        ("w-embed", 200, 0.2),
        ("lora-guidance", 200, 0.2),
        ("agd", 200, 0.35),
        ("gft", 300, 0.3),
        ("model-guidance", 300, 0.3),
    ],
)
def test_a_small_student_learns_guidance(method, steps, allowed):
    """The remaining error, as a share of what guidance changes; averaged over noised data of the guided class."""
    torch.manual_seed(0)
    schedule, w = SCHEDULES["flow"], 3.0
    teacher, residual = mixture(schedule, "flow"), Residual()

    def function(x, t, labels, w):
        mean = teacher.posterior_mean(x, t, {"class_labels": labels})
        return mean - t[:, None] * torch.where((labels == NULL)[:, None], 0.0, residual(x, t, w))

    student = told(function, schedule, "flow")
    student.network.default = w
    method = method_of(method, teacher, student, scale=w)
    optimizer = torch.optim.Adam(residual.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    paths = trajectories(teacher, 256, 20)
    for step in range(steps):
        rows = batch(256, step, teacher.sample(256, (1,), {"class_labels": torch.full((256,), CLASS)}), (CLASS, NULL))
        rows.path = paths
        optimizer.zero_grad()
        method.losses("student", rows)["guidance"].backward()
        optimizer.step()
        rate.step()
    rows = rows_of(teacher, 2000, 99)
    t = rows.uniform("test", 0.2, 0.95)
    x_t = schedule.add_noise(rows.latents, rows.noise("test"), t)
    labels = rows.cond["class_labels"]
    wanted, without = (guided_mean(teacher, x_t, t, labels, torch.full((2000,), scale)) for scale in (w, 1.0))
    with torch.no_grad():
        error = student(x_t, t, rows.cond).x0 - wanted
    assert error.abs().mean() < allowed * (wanted - without).abs().mean()


def test_a_scale_that_is_never_trained_is_refused():
    for name in ("w-embed", "agd", "guide", "gft"):
        config = METHODS[name].Config(w_min=1.0, w_max=2.0)
        with pytest.raises(InputError, match=r"teacher\.guidance\.scale: expected a scale .*1 to 2.*found 3"):
            METHODS[name].adapt(config, "student", nn.Linear(1, 1), 3.0)
    with pytest.raises(InputError, match=r"above 0\.5"):
        METHODS["model-guidance"].adapt(METHODS["model-guidance"].Config(), "student", nn.Linear(1, 1), 0.5)


def test_a_teacher_without_an_empty_condition_is_refused():
    schedule = SCHEDULES["flow"]
    teacher = mixture(schedule, "flow")
    for name in CONFIGS:
        with pytest.raises(InputError, match="empty condition"):
            method_of(name, teacher, teacher).prepare(batch())


def test_a_plain_teacher_is_matched_where_there_is_no_guidance():
    """Its own prediction, pointwise: it needs no empty condition, and the loss of the teacher itself is 0."""
    schedule = SCHEDULES["vp"]
    teacher = mixture(schedule, "v")
    student = told(lambda x, t, labels, w: guided_mean(teacher, x, t, labels, 1.0 + 0 * w), schedule, "v")
    method = method_of("score-matching", teacher, student, scale=1.0)
    rows = rows_of(teacher)
    rows.null = None
    method.prepare(rows)
    loss = method.losses("student", rows)["guidance"]
    assert loss.item() < 1e-20 and math.hypot(*gradients(loss, student)) < 1e-9


def test_what_the_methods_need():
    needs = {name: METHODS[name].data_needs(METHODS[name].Config(**config)) for name, config in CONFIGS.items()}
    assert {name for name, need in needs.items() if need.images} == CONFIGS.keys() - {"agd", "guide"}
    assert needs["agd"].paths.keep == "all" and needs["agd"].paths.scales == (1.0, 4.0)
    training = {name: METHODS[name].role_training(METHODS[name].Config()).get("student") for name in CONFIGS}
    assert training == {name: None for name in CONFIGS} | {"lora-guidance": "lora", "agd": "frozen", "guide": "frozen"}
