"""The oracle of my_method.py, as of any method: a teacher with a closed form, in float64; `pytest docs/examples`."""

import pytest
from my_method import MyConfig, MyMethod

from stepdistill.methods import Roles
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import SCHEDULES, EvenGrid, at, batch, column, ddim_path, gradients, player

TIMES = [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_fixed_point_is_where_the_teacher_lands(name):
    """One step of the student for four of the teacher: x_0 at the last of their times is the whole answer."""
    schedule = SCHEDULES[name]
    times = schedule.snap(column(*TIMES)).flatten().tolist()
    teacher = GaussianDenoiser(0.7, 0.5, schedule, "v")  # data N(0.7, 0.5^2), a network that emits v

    def lands(x, t, labels):
        x = ddim_path(teacher.posterior_mean, x, times, schedule)
        return teacher.posterior_mean(x, at(times[-1], len(x)))

    for shift in (0.0, 0.1):
        student = player(lands, schedule, "v", shift=shift)  # a network that means x_0 = 1 * lands(x, t) + shift
        method = MyMethod(
            MyConfig(substeps=4), Roles(teacher=teacher, student=student, scale=1.0), EvenGrid(schedule, 1)
        )
        loss = sum(method.losses("student", batch(6)).values())
        assert loss.item() == pytest.approx(shift**2, abs=1e-12)
        assert gradients(loss, student)[1] == pytest.approx(2 * shift, abs=1e-9)  # d loss / d shift
