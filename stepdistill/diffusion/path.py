"""A network on another path than its scheduler's, or of another prediction: the pipeline converts between the two."""

from dataclasses import dataclass

from torch import Tensor

from stepdistill.diffusion.schedule import FlowSchedule, Kind, Schedule
from stepdistill.diffusion.schedule_base import per_sample

FLOW = FlowSchedule()


@dataclass(frozen=True)
class Path:
    """How a network sees what its scheduler steps.

    With ``flow`` it sees the sample on the path of rectified flow, at the same ratio of noise to data:
    x_t / (sd alpha + sigma) at the time sigma / (sd alpha + sigma), where sd is the data's deviation (Cosmos 2 under
    sigmas up to 80, Sana Sprint under TrigFlow's angles).

    Args:
        kind: what the network emits.
        flow: whether it is on that path; else on the scheduler's own.
        levels: whether the network's time is log(sigma / alpha) / 4, as EDM's are (Stable Diffusion's upscaler).
        floor: what the pipeline divides by, to make a velocity of x_0, where the time is below it (PRX in pixels).
    """

    kind: Kind
    flow: bool = False
    levels: bool = False
    floor: float = 0.0

    def time(self, schedule: Schedule, t: Tensor) -> Tensor:
        """The network's timestep at times ``t`` (B,) of the scheduler's schedule."""
        if not self.flow and not self.levels:
            return schedule.timestep(t)
        alpha, sigma = schedule.coefficients(t)
        if self.levels:
            return (sigma / alpha).log() / 4
        return sigma / (schedule.data_std * alpha + sigma)

    def sample(self, schedule: Schedule, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network sees of the scheduler's sample ``x_t`` (B, ...)."""
        return x_t / self._scale(schedule, x_t, t)

    def stepped(self, schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
        """The inverse of :meth:`sample`."""
        return x * self._scale(schedule, x, t)

    def prediction(self, raw: Tensor, schedule: Schedule, x_t: Tensor, t: Tensor, kind: Kind) -> Tensor:
        """The network's output (B, ...) at ``x_t`` as a prediction of ``kind``, which the scheduler takes.

        Channels behind those of ``x_t`` are left off.
        """
        raw, x_t = raw[:, : x_t.shape[1]].float(), x_t.float()
        if self.flow:
            inner = FLOW.to_x0(raw, self.sample(schedule, x_t, t), self.time(schedule, t), self.kind)
            x0 = schedule.data_std * inner
        else:
            x0 = schedule.to_x0(raw, x_t, t, self.kind)
            if self.floor:
                share = (t / self.floor).clamp(max=1)
                x0 = x_t + per_sample(share, x_t) * (x0 - x_t)
        return schedule.from_x0(x0, x_t, t, kind)

    def _scale(self, schedule: Schedule, x: Tensor, t: Tensor) -> Tensor | float:
        if not self.flow:
            return 1.0
        alpha, sigma = schedule.coefficients(t)
        return per_sample(schedule.data_std * alpha + sigma, x)
