"""A teacher in a student's generation: each rule against its definition written out."""

import functools

import pytest
import torch
from guidance_bed import ROWS, STEPS, N, W, by_hand, conditions, run, traced

import stepdistill
from pipeline import tiny
from stepdistill.diffusion.guidance import guided
from stepdistill.errors import InputError
from stepdistill.sampling.generate import sample_generator
from stepdistill.sampling.rules.names import RULES
from stepdistill.sampling.rules.teacher import teacher_first, teacher_refined


@functools.cache
def teacher():
    """The student's denoiser with other weights."""
    return traced().denoiser.on(tiny.redraw(tiny.tiny_dit().transformer, 11))


def test_the_teacher_makes_the_first_steps():
    found = traced()
    whole, _ = run(lambda: teacher_first(found.denoiser, W, steps=STEPS))
    torch.testing.assert_close(whole, run("cfg")[0])
    none, passes = run(lambda: teacher_first(found.denoiser, W, steps=0))
    torch.testing.assert_close(none, run(lambda: RULES["cfg"](1.0))[0])
    assert passes == STEPS
    assert run(lambda: teacher_first(found.denoiser, W, steps=1))[1] == STEPS + 1


@torch.no_grad()
@pytest.mark.parametrize("time", [None, 0.3])
def test_the_teacher_moves_the_students_x0(time):
    schedule, (cond, null) = traced().denoiser.schedule, conditions().batch(ROWS)
    next_times = schedule.time(torch.tensor([749, 499]))

    def predict(number, x, t):
        x0 = traced().denoiser(x, t, cond).x0
        if number < 2:
            s = (next_times[number] if time is None else torch.tensor(time)).expand(N)
            noise = torch.stack(
                [torch.randn(x.shape[1:], generator=sample_generator(1, i, 2 + number)) for i in range(N)]
            )
            alpha, sigma = (c.view(-1, 1, 1, 1).float() for c in schedule.coefficients(s))
            target = guided(teacher(), alpha * x0 + sigma * noise, s, cond, null, W).x0
            x0 = 0.75 * x0 + 0.25 * target
        alpha, sigma = (c.view(-1, 1, 1, 1).float() for c in schedule.coefficients(t))
        return x0, (x - alpha * x0) / sigma

    before = teacher().evaluations
    found, passes = run(lambda: teacher_refined(teacher(), W, 0.25, steps=2, time=time))
    assert passes == STEPS and teacher().evaluations - before == 2 * 2 * N
    torch.testing.assert_close(found, by_hand(predict), rtol=1e-4, atol=1e-4)
    parts, _ = run(lambda: teacher_refined(teacher(), W, 0.25, steps=2, time=time), batch=2)
    torch.testing.assert_close(found, parts, rtol=1e-4, atol=1e-4)


def test_a_weight_of_nothing_is_the_student_and_the_last_step_is_not_refined():
    alone, _ = run(lambda: RULES["cfg"](1.0))
    found, _ = run(lambda: teacher_refined(teacher(), W, 0.0, steps=STEPS))
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    before = teacher().evaluations
    run(lambda: teacher_refined(teacher(), W, 0.5, steps=STEPS))
    assert teacher().evaluations - before == 2 * (STEPS - 1) * N


def test_sampling_with_a_teacher(tmp_path):
    tiny.save_pipeline(tiny.tiny_dit(), tmp_path / "tiny")
    tiny.save_pipeline(tiny.tiny_dit(prediction_type="epsilon"), tmp_path / "other")
    both = {"path": tmp_path / "tiny", "teacher": tmp_path / "tiny"}
    settings = {"steps": 3, "guidance": 2.0, "count": 2, "conditions": [3, 5]}
    assert stepdistill.sample(**both, teacher_steps=2, **settings).nfe == 5
    assert stepdistill.sample(**both, teacher_steps=2, refine=0.5, **settings).nfe == 3 + 2 * 2
    for wrong, problem in [
        ({"rule": "icg"}, "rule: expected cfg where a teacher helps, found icg"),
        ({"interval": (0.2, 0.8)}, "interval: expected none where a teacher helps"),
        ({"refine": 2.0}, "refine: expected a teacher and a weight from 0 to 1, found 2.0"),
        ({"teacher": tmp_path / "other"}, "has another prediction type or noise schedule"),
    ]:
        with pytest.raises(InputError, match=problem):
            stepdistill.sample(**both | wrong, **settings)
