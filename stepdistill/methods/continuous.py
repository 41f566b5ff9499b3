"""Continuous-time consistency: sCM (Lu & Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency
Models") and TBCM, which trains on the teacher's own trajectories (image-free).

    a is TrigFlow's angle, tan a = sigma / (alpha sd);  of a prediction x_0, eps at (x_t, t):
    f = x_0,  F = cos a sd eps - sin a x_0, which is the velocity dx/da where x = cos a x_0 + sin a sd eps
    every step:
        sCM:   ln(sigma/alpha) ~ N(mean, std^2);  x_t = alpha x_0 + sigma eps                        (x_0 real)
        TBCM:  a_0 = pi/2 > a_1 > .. > a_{n-1}, a_i uniform in interval i of a route;  x_{i+1} = DDIM step of the guided
               teacher from x_i, from pure noise;  trained on all but the first, where the tangent is 0 whatever F
        df/da = derivative of f along the guided teacher's flow, in x_t and in t                (forward-mode, no graph)
        g = (1 - r) cos^2 a (F_teacher - F) + r cos a df/da,   r = min(1, step / H);     g <- g / (|g| + .1)
        minimise  e^-v(a) |F_student - sg(F_student + g)|^2 + v(a),                                     v learned

The (1 - r) term pulls the student to the teacher; that g is the papers' -cos^2 a (F - dx/da) - r (...), rearranged.
Their weight 1/(sd tan a) and their e^-v are one factor here, which starts where it belongs for |g| = 1: at 1.
Along the flow f is constant in the end: f is then the end of the trajectory, for any schedule and prediction.
The value of the loss says nothing, |g| being about 1; the logged signal "tangent", mean |cos a df/da|, does.
"""

import itertools
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Conditions
from stepdistill.diffusion.float32 import exact, is_exact
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import Prediction, per_sample
from stepdistill.errors import InputError
from stepdistill.methods.base import DataNeeds, DistillMethod, MethodConfig, RealConfig
from stepdistill.methods.parts.times import T_FLOOR, normal_log_snr_times, time_of_ratio
from stepdistill.methods.parts.trigflow import LogVariance, TrigFlow, derivative
from stepdistill.roles import Roles
from stepdistill.roles.added import SlowTime


class ContinuousConfig(MethodConfig):
    """Keys of ``method`` that sCM and TBCM share."""

    sigma_data: float = Field(1.0, gt=0, description="sd: standard deviation of the data; latents are scaled to 1")
    tangent_warmup: int = Field(1000, ge=0, description="H: steps until the tangent counts fully")
    jvp: Literal["auto", "forward", "finite"] = Field(
        "auto", description="forward-mode derivative, finite difference, or forward where the network can"
    )
    difference: float = Field(0.01, gt=0, lt=1, description="step in time of the finite difference")
    slow_time: float = Field(
        50, ge=0, description="damp the student's time features with periods below this many timesteps; 0 is off"
    )


class SCMConfig(RealConfig, ContinuousConfig):
    """Keys of ``method`` for sCM."""

    time_mean: float = Field(0.0, description="mean of ln(sigma/alpha) at which the student is trained")
    time_std: float = Field(1.6, gt=0, description="standard deviation of ln(sigma/alpha)")


class TBCMConfig(ContinuousConfig):
    """Keys of ``method`` for TBCM."""

    route: int = Field(8, ge=2, description="n: teacher points per trajectory; n - 1 rows are trained for each sample")
    shift: float = Field(2.5, gt=0, description="time shift of the route; more gives more points near the noise")


class ContinuousConsistency(DistillMethod):
    """What sCM and TBCM share: the tangent and the loss."""

    Config = ContinuousConfig
    config: ContinuousConfig
    sampler_name = "renoise"
    shards = False

    def __init__(self, config: ContinuousConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.log_variance = LogVariance()
        self.forward_mode = config.jvp != "finite"

    @classmethod
    def adapt(cls, config: ContinuousConfig, role: str, network: nn.Module, scale: float) -> nn.Module:
        return SlowTime(network, config.slow_time) if config.slow_time else network

    def prepare(self, batch: Batch) -> None:
        self.log_variance.to(batch.device)
        if not self.forward_mode:
            return
        try:
            if not self.roles.student.spec.timestep_dtype.is_floating_point:
                raise RuntimeError("it takes whole timesteps only")
            teacher = self.teacher(batch.noise("start"), self.times(0.5, batch), batch)
            self.consistency(teacher, batch.cond, batch)
        except RuntimeError as error:
            problem = f"the student has no forward-mode derivative ({str(error).splitlines()[0]})"
            if self.config.jvp == "forward":
                raise InputError(f"method.jvp: expected finite, as {problem}; found forward") from error
            from stepdistill.progress import say  # rich is slow to import

            say(f"{problem}; using finite differences")
            self.forward_mode = False

    def modules(self, player: str) -> list[nn.Module]:
        return [*super().modules(player), self.log_variance]

    def extra_modules(self) -> dict[str, nn.Module]:
        return {"log_variance": self.log_variance}

    def consistency(self, teacher: Prediction, cond: Conditions, batch: Batch) -> dict[str, Tensor]:
        """The loss at the points (x_t, t) of the guided teacher's prediction, with their conditions."""
        trig = TrigFlow(self.schedule, teacher.t, self.config.sigma_data)
        student = self.roles.student(teacher.x_t, teacher.t, cond)
        velocity = trig.velocity(student)
        with torch.no_grad():
            along_flow = self.forward_tangent if self.forward_mode else self.finite_tangent
            tangent = along_flow(trig, teacher, student, cond)
            batch.signals["tangent"] = tangent.flatten(1).norm(dim=1).mean()
            g = self.direction(trig, teacher, velocity, tangent, self.warmth(batch.step))
            target = velocity + g / per_sample(g.flatten(1).norm(dim=1) + 0.1, g)
        log_variance = self.log_variance(trig.angle)
        distance = (velocity - target).square().flatten(1).sum(1)
        return {"consistency": ((-log_variance).exp() * distance + log_variance).mean()}

    def warmth(self, step: int) -> float:
        """r: how far the tangent counts at a training step."""
        return min(1.0, step / self.config.tangent_warmup) if self.config.tangent_warmup else 1.0

    def direction(self, trig: TrigFlow, teacher: Prediction, velocity: Tensor, tangent: Tensor, r: float) -> Tensor:
        """g (B, ...) before it is normalised, from the student's velocity F and cos a df/da."""
        return (1 - r) * per_sample(trig.cos**2, velocity) * (trig.velocity(teacher) - velocity) + r * tangent

    def forward_tangent(self, trig: TrigFlow, teacher: Prediction, student: Prediction, cond: Conditions) -> Tensor:
        """cos a df/da along the teacher's flow (B, ...), in forward mode; called without graph."""

        def f(x_t: Tensor, t: Tensor) -> Tensor:
            return self.roles.student(x_t, t, cond).x0

        # No fused attention has a forward-mode derivative, and in bf16 it would be mostly noise.
        with sdpa_kernel(SDPBackend.MATH), exact(teacher.x_t.device):
            tangent = derivative(f, (teacher.x_t, teacher.t), trig.flow(teacher))
        self.roles.student.evaluations += len(tangent)  # beside the call itself
        return tangent

    def finite_tangent(self, trig: TrigFlow, teacher: Prediction, student: Prediction, cond: Conditions) -> Tensor:
        """The same from a second call, a step towards the data.

        That step is along the teacher's velocity, not along the pair (x_0, eps): guidance changes the flow.
        """
        r = self.schedule.snap((teacher.t - self.config.difference).clamp_min(0))
        x_r = self.schedule.add_noise(teacher.x0, teacher.eps, r)
        step = trig.angle - TrigFlow(self.schedule, r, self.config.sigma_data).angle
        # Two outputs a hundredth of the time apart: in bf16 their difference would be mostly noise.
        again = not is_exact(x_r.device)
        with exact(x_r.device):
            if again:
                student = self.roles.student(teacher.x_t, teacher.t, cond)
            change = student.x0 - self.roles.student(x_r, r, cond).x0
        return per_sample(trig.cos / step, change) * change


class SCM(ContinuousConsistency):
    """sCM: the teacher's flow through noised real samples."""

    Config = SCMConfig
    config: SCMConfig
    name = "scm"
    family = "Consistency"
    paper = "sCM, Lu & Song 2024"
    summary = "sCM: continuous-time consistency distillation, 1-2 steps"

    @classmethod
    def data_needs(cls, config: SCMConfig) -> DataNeeds:
        return config.real_needs()

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        t = normal_log_snr_times(batch, "time", self.schedule, self.config.time_mean, self.config.time_std)
        x_t = self.schedule.add_noise(batch.latents, batch.noise("forward"), t)
        return self.consistency(self.teacher(x_t, t, batch), batch.cond, batch)


class TBCM(ContinuousConsistency):
    """TBCM: the points of the teacher's own guided trajectories. A batch of B trains B (n - 1) rows at once."""

    Config = TBCMConfig
    config: TBCMConfig
    name = "tbcm"
    family = "Consistency"
    paper = "TBCM (hustvl), 2025"
    summary = "TBCM: continuous-time consistency on the teacher's own trajectories (image-free), 1-2 steps"

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        points = self.points(batch)[1:]
        raw, x_t, t = (torch.cat([getattr(point, name) for point in points]) for name in ("raw", "x_t", "t"))
        cond = {name: torch.cat([rows] * len(points)) for name, rows in batch.cond.items()}
        return self.consistency(Prediction(raw, x_t, t, self.schedule, points[0].kind), cond, batch)

    @torch.no_grad()
    def points(self, batch: Batch) -> list[Prediction]:
        """The guided teacher at the n points of one trajectory per row, from pure noise on."""
        times = self.route(batch)
        alpha, sigma = self.schedule.coefficients(times[0])
        # On EDM pure noise is not of unit variance.
        x, points = per_sample((alpha**2 + sigma**2).sqrt(), batch.noise("start")) * batch.noise("start"), []
        for t, r in itertools.zip_longest(times, times[1:]):
            points.append(self.teacher(x, t, batch))
            if r is not None:
                x = self.schedule.add_noise(points[-1].x0, points[-1].eps, r)
        return points

    def route(self, batch: Batch) -> list[Tensor]:
        """n descending times (B,): 1, then one draw, uniform in the angle, in each of n - 1 intervals of the route.

        The route is a line in flow's time s from the schedule's noisiest to its cleanest: tan a = shift s / (1 - s).
        """
        ends = torch.tensor([1.0, T_FLOOR], dtype=torch.float64)
        alpha, sigma = self.schedule.coefficients(ends)
        first, last = (sigma / (sigma + self.config.shift * self.config.sigma_data * alpha)).tolist()
        s = torch.linspace(first, last, self.config.route, dtype=torch.float64)
        edges = torch.atan2(self.config.shift * s, 1 - s).tolist()
        times = [self.times(1.0, batch)]
        for i, (high, low) in enumerate(itertools.pairwise(edges)):
            angle = batch.uniform(f"point {i}", low, high)
            times.append(time_of_ratio(self.schedule, self.config.sigma_data * angle.tan()))
        return times
