"""The student drafts, the teacher refines what an oracle finds weak: against SDEdit written out."""

import dataclasses
import math

import pytest
import torch
from guidance_bed import ROWS, STEPS, N, W, by_hand, conditions, traced

from pipeline import tiny
from stepdistill.diffusion.guidance import guided
from stepdistill.errors import InputError
from stepdistill.pipeline.decode import decode
from stepdistill.sampling.collaboration import TEACHERS_SEED, collaborate
from stepdistill.sampling.generate import generate, noise


@pytest.fixture(scope="module")
def teacher():
    """The student with another network."""
    network = tiny.redraw(tiny.tiny_dit().transformer, 11)
    return dataclasses.replace(traced(), denoiser=traced().denoiser.on(network))


def brightness(images, labels):
    assert len(images) == len(labels)
    return images.float().mean((1, 2, 3))


SETTINGS = {"count": N, "steps": STEPS, "teacher_steps": 2, "rollback": 0.5, "guidance": W, "seed": 1}


@torch.no_grad()
def test_weak_drafts_are_refined_and_the_others_stay(teacher):
    student, scheduler = traced(), traced().pipeline.scheduler
    drafts = generate(student, scheduler, conditions(), ROWS, steps=STEPS, guidance=1.0, seed=1)
    images = decode(student, drafts)
    scores = brightness(images, ROWS)
    threshold = float(scores.median())
    found = collaborate(student, teacher, [3, 0, 7], brightness, threshold, **SETTINGS)
    torch.testing.assert_close(found.scores, scores)
    assert found.refined.tolist() == (scores < threshold).tolist() and found.refined.sum() == 2
    assert found.nfe == STEPS + 2 * 2 * 2 / N
    assert torch.equal(found.images[~found.refined], images[~found.refined])

    # The last two of four steps, from the drafts with noise.
    cond, null = conditions().batch(ROWS)
    t = student.denoiser.schedule.time(torch.tensor([499]))
    alpha, sigma = (c.float() for c in student.denoiser.schedule.coefficients(t))

    def predict(_, x, t):
        prediction = guided(teacher.denoiser, x, t, cond, null, W)
        return prediction.x0, prediction.eps

    noised = alpha * drafts + sigma * noise(student.latent_shape, 1 + TEACHERS_SEED, range(N))
    expected = decode(student, by_hand(predict, start=2, x=noised))
    difference = (found.images.int() - expected.int()).abs()[found.refined]
    assert difference.max() <= 1
    assert (found.images != images)[found.refined].any()


def test_the_threshold_is_a_quantile_of_what_the_student_gets(teacher):
    student = traced()
    none = collaborate(student, teacher, [3, 0, 7], brightness, -math.inf, **SETTINGS)
    assert none.nfe == STEPS and not none.refined.any()
    some = collaborate(student, teacher, [3, 0, 7], brightness, float(none.scores.quantile(0.4)), **SETTINGS)
    assert some.refined.sum() == 2
    unknown = collaborate(student, teacher, [3], lambda images, _: images[:, 0, 0, 0] * math.nan, 0.0, **SETTINGS)
    assert unknown.refined.all()


@pytest.mark.parametrize(
    "wrong, problem",
    [
        ({"rollback": 0.0}, "rollback: expected a number above 0 and up to 1, found 0.0"),
        ({"oracle": lambda images, _: images.float()}, "oracle: expected 5 scores, found a tensor of shape"),
    ],
)
def test_wrong_input_is_one_line(teacher, wrong, problem):
    given = {"oracle": brightness, "threshold": 0.0} | SETTINGS | wrong
    with pytest.raises(InputError, match=problem):
        collaborate(traced(), teacher, [3, 0, 7], **given)
    other = dataclasses.replace(teacher, latent_shape=(4, 16, 16))
    with pytest.raises(InputError, match="teacher: expected latents"):
        collaborate(traced(), other, [3, 0, 7], brightness, 0.0, count=1)
