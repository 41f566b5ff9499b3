"""ECT against closed forms, on a Gaussian: the map from t to r, the loss, and its fixed point at every stage."""

import math

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.schedule import Schedule
from stepdistill.methods import Roles, normal_log_snr_times
from stepdistill.methods.ect import ECT, ECTConfig
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import G1, SCHEDULES, OnGrid, Spy, at, batch, column, ddim_path, gradients, player

MEAN, STD = G1


class Bed:
    """ECT at a single time t, on rows whose x_t and whose deviation from the posterior mean are independent signs."""

    def __init__(self, name: str, stage: int, kind="v", **config):
        self.schedule: Schedule = SCHEDULES[name]
        self.config = ECTConfig(time_std=0, stage_steps=1, **config)
        self.teacher = GaussianDenoiser(MEAN, STD, self.schedule, kind)
        self.t = normal_log_snr_times(batch(4), "t", self.schedule, self.config.time_mean, 0)
        self.alpha, self.sigma = (c[0].item() for c in self.schedule.coefficients(self.t))
        self.spread = math.hypot(self.alpha * STD, self.sigma)
        of_x, of_rest = column(1, 1, -1, -1), column(1, -1, 1, -1)
        x0 = MEAN + STD * (self.alpha * STD * of_x + self.sigma * of_rest) / self.spread
        self.rows = batch(4, step=stage, latents=x0)
        self.rows.noise = lambda name: (self.sigma * of_x - self.alpha * STD * of_rest) / self.spread

    def loss(self, function) -> Tensor:
        """The loss of a student that means ``function``(x, t, labels); it is kept, as are its calls."""
        self.student = Spy(player(function, self.schedule, self.teacher.kind))
        roles = Roles(teacher=self.teacher, student=self.student, scale=1.0)
        return ECT(self.config, roles, OnGrid(self.schedule, [])).losses("student", self.rows)["consistency"]

    def huber(self, difference: float) -> float:
        return math.hypot(difference, self.config.huber_c) - self.config.huber_c


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["v", "flow", "epsilon"])
def test_where_r_is_the_clean_end_a_diffusion_model_is_the_optimum(name, kind):
    bed = Bed(name, stage=0, kind=kind)  # n = 4.3 > q = 2
    loss = bed.loss(lambda x, t, labels: bed.teacher.posterior_mean(x, t))
    assert gradients(loss, bed.student) == pytest.approx((0, 0), abs=1e-12)
    assert loss.item() == pytest.approx(bed.huber(STD * bed.sigma / bed.spread) * bed.alpha / bed.sigma, rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stage", [2, 4])
def test_the_fixed_point_of_a_stage_is_the_map_after_an_euler_step(name, stage):
    """E[x_r | x_t] is the teacher's DDIM step to r, which a linear map and an even loss cannot tell from x_r."""
    bed = Bed(name, stage)

    def chained(x, t, labels):
        r = bed.student.calls[0][1]
        if torch.equal(t, bed.t):
            x = ddim_path(bed.teacher.posterior_mean, x, [t[0].item(), r[0].item()], bed.schedule)
        return bed.teacher.flow_map(x, r, at(0.0, 4))

    loss = bed.loss(chained)
    assert gradients(loss, bed.student) == pytest.approx((0, 0), abs=1e-10)
    alpha, sigma = (c[0].item() for c in bed.schedule.coefficients(bed.student.calls[0][1]))
    clean, least = (c.item() for c in bed.schedule.coefficients(at(0.0)))
    ratio, ratio_r = bed.sigma / bed.alpha, sigma / alpha
    n = 1 + 8 / (1 + math.exp(0.5 * ratio))
    assert ratio_r / ratio == pytest.approx(1 - n / 2 ** (stage + 1), rel=0.01)  # the nearest entry of a table
    slope = math.hypot(clean * STD, least) / math.hypot(alpha * STD, sigma)
    rest = (alpha * bed.sigma - sigma * bed.alpha) * STD / bed.spread
    assert loss.item() == pytest.approx(bed.huber(slope * rest) / (ratio - ratio_r), rel=1e-6)


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_the_flow_map_is_the_fixed_point_of_vanishing_gaps(name):
    """The Euler step's error is of second order in the gap, by one of which the loss is divided."""

    def steepest(stage: int) -> float:
        bed = Bed(name, stage, huber_c=1e3)  # a square
        loss = bed.loss(lambda x, t, labels: bed.teacher.flow_map(x, t, at(0.0, 4)))
        return max(map(abs, gradients(loss, bed.student)))

    assert steepest(8) < 0.3 * steepest(6) < 0.09 * steepest(4)
