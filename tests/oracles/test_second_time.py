"""A student that takes the end r of its step: a flow map, exact in any number of steps on a Gaussian."""

import pytest
import torch
from torch import Tensor, nn

from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.schedule import Schedule
from stepdistill.errors import InputError
from stepdistill.methods import DistillMethod, MethodConfig
from stepdistill.roles import Roles
from stepdistill.testing.bed import G1, SCHEDULES, EvenGrid, batch, column, player

MEAN, STD = G1


class FlowMap(nn.Module):
    """The x_0 whose DDIM step from t to r lands on the probability flow of N(MEAN, STD^2)."""

    takes_r = True

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor, timestep: Tensor, second_time: Tensor) -> Tensor:
        t = self.schedule.time(timestep)
        alpha, sigma, alpha_r, sigma_r = (
            value[:, None] for time in (t, second_time) for value in self.schedule.coefficients(time)
        )
        spread, spread_r = (a**2 * STD**2 + s**2 for a, s in ((alpha, sigma), (alpha_r, sigma_r)))
        x_r = alpha_r * MEAN + (spread_r / spread).sqrt() * (x - alpha * MEAN)
        x0 = (x_r - sigma_r / sigma * x) / (alpha_r - alpha * sigma_r / sigma)
        return self.schedule.from_x0(x0, x, t, "flow")


def flow_map() -> Denoiser:
    schedule = SCHEDULES["flow"]
    spec = CallSpec("x", "timestep", timestep_dtype=torch.float64)
    return Denoiser(FlowMap(schedule), spec, schedule, "flow")


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_sampler_passes_the_end_of_each_step(steps):
    student, z = flow_map(), column(-1.0, 0.3, 2.0)
    made = EvenGrid(student.schedule, steps).sample(lambda x, t, r: student(x, t, {}, r), z, ends=True)
    torch.testing.assert_close(made, MEAN + STD * z)


@pytest.mark.parametrize("position", [0, 2])
def test_a_methods_rollout_passes_it_too(position):
    class Rollout(DistillMethod):
        def losses(self, player, batch):
            return {}

    student, rows = flow_map(), batch(4)
    method = Rollout(MethodConfig(), Roles(student, student), EvenGrid(student.schedule, 4))
    t, x = 1 - position / 4, method.backward_simulation(rows, position)
    flowed = (1 - t) * MEAN + ((1 - t) ** 2 * STD**2 + t**2) ** 0.5 * rows.noise("start")
    torch.testing.assert_close(x, flowed)
    torch.testing.assert_close(method.generate(rows, position), MEAN + STD * rows.noise("start"))


def test_a_network_without_a_place_for_it_says_so():
    network = player(lambda x, t, labels: x, SCHEDULES["flow"], "flow")
    with pytest.raises(InputError, match=r"Map has no input for a second time r; TimeEmbedded"):
        network(column(1.0), torch.ones(1), {}, torch.zeros(1))
