"""The networks of a run by their roles, and how each gets its weights."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from stepdistill.diffusion.denoiser import Denoiser

RoleTraining = Literal["full", "lora", "frozen"]
"""A role's weights: a copy of the teacher's, an adapter on them, or the teacher's own, untouched."""


class Roles:
    """The networks of a run by their names: ``roles.student``, or ``items()`` for all.

    Args:
        teacher: the frozen pipeline's network; every run has it.
        student: the network that is trained; every run has it.
        scale: the teacher's guidance scale, the one that is distilled.
        decode: latents (B, ...) to images (B, C, H, W) in [-1, 1], with graph; None: the pipeline has no autoencoder.
        others: whatever else a method names in ``extra_roles``, such as a critic, or the student's slow copy.
    """

    teacher: Denoiser
    student: Denoiser

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        *,
        scale: float = 1.0,
        decode: Callable[[Tensor], Tensor] | None = None,
        **others: Denoiser,
    ):
        self.teacher, self.student = teacher, student
        vars(self).update(others)
        self.scale, self.decode = scale, decode

    def items(self) -> list[tuple[str, Denoiser]]:
        """Each role's name and network, the teacher first."""
        return [(name, role) for name, role in vars(self).items() if name not in ("scale", "decode")]

    def __contains__(self, name: str) -> bool:
        return name in dict(self.items())

    def __getattr__(self, name: str) -> Denoiser:
        known = ", ".join(dict(self.items()))
        raise AttributeError(f"no role {name!r}: this run has {known}; a method names others in extra_roles")
