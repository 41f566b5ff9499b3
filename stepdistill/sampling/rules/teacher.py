"""Step rules in which a teacher helps a student's generation; both networks run. Nothing is trained."""

import torch

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import Pair, guided, outputs
from stepdistill.diffusion.schedule import Prediction
from stepdistill.errors import InputError
from stepdistill.pipeline.trace import Trace
from stepdistill.sampling.rules.steps import Step, StepRule


def teacher_first(teacher: Denoiser, scale: float, steps: int = 1) -> StepRule:
    """The teacher's first steps, the student's others: the teacher's variety at a few more passes (diversity
    distillation, Gandikota and Bau 2025).

    Args:
        teacher: takes the student's samples and conditions.
        scale: its w; the student is not guided.
    """

    def rule(denoiser: Denoiser, step: Step) -> Prediction | Pair:
        if step.number >= steps:
            return denoiser(step.x_t, step.t, step.cond)
        return outputs(teacher, step.x_t, step.t, step.cond, step.null, scale)

    return rule


def teacher_refined(
    teacher: Denoiser, scale: float, weight: float, steps: int = 1, time: float | None = None
) -> StepRule:
    """The student's x_0 of its first steps moved towards the teacher's (Distillation++, Park et al. 2024, algorithm 1).

    x_0 <- (1 - weight) x_0 + weight teacher(alpha_s x_0 + sigma_s noise, s), with noise of the rule's own. Where the
    step keeps noise of its sample (DDIM), that is what the new x_0 leaves of the sample.

    Args:
        teacher: as in :func:`teacher_first`.
        scale: its w; the student is not guided.
        weight: in [0, 1].
        time: s; None: the step's next time, and none is refined where that is the end.
    """

    def rule(denoiser: Denoiser, step: Step) -> Prediction:
        student = denoiser(step.x_t, step.t, step.cond)
        s = step.r if time is None else torch.full_like(step.t, time)
        if step.number >= steps or not bool(s[0] > 0):
            return student
        shape = step.x_t.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=dice) for dice in step.dice()]).to(student.x0)
        x_s = teacher.schedule.add_noise(student.x0, noise, s)
        refined = student.x0.lerp(guided(teacher, x_s, s, step.cond, step.null, scale).x0, weight)
        raw = denoiser.schedule.from_x0(refined, step.x_t.to(refined), step.t, denoiser.kind)
        return Prediction(raw, step.x_t, step.t, denoiser.schedule, denoiser.kind)

    return rule


def check_teacher(teacher: Trace, student: Trace, name: str) -> None:
    """Whether the teacher can stand in for the student at any step.

    Raises:
        InputError: it has other latents, conditions, predictions or noise.
    """
    if (teacher.latent_shape, teacher.conditioning) != (student.latent_shape, student.conditioning):
        raise InputError(f"teacher: {name} has other latents or conditions than the student")
    times = torch.linspace(0, 1, 5)
    levels = [torch.stack(one.denoiser.schedule.coefficients(times)) for one in (teacher, student)]
    if teacher.denoiser.kind != student.denoiser.kind or not torch.allclose(*levels, atol=1e-4):
        raise InputError(f"teacher: {name} has another prediction type or noise schedule than the student")
