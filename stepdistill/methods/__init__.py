"""Distillation methods, by the name a recipe uses."""

from stepdistill.methods.base import DataNeeds, DistillMethod, MethodConfig, Roles
from stepdistill.methods.consistency import LCM, TCD
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.trajectory import TrajectoryRegression

METHODS: dict[str, type[DistillMethod]] = {
    "dmd2": DMD2,
    "lcm": LCM,
    "tcd": TCD,
    "sfd": TrajectoryRegression,
}

__all__ = ["METHODS", "DataNeeds", "DistillMethod", "MethodConfig", "Roles"]
