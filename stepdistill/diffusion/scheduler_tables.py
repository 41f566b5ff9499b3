"""What the tables and the config of a diffusers scheduler say of its schedule."""

from typing import Any

import torch
from torch import Tensor


def shifted(t: Tensor, shift: float) -> Tensor:
    """shift t/(1 + (shift - 1) t), which keeps 0 and 1 to the bit; 1/shift undoes it (Esser et al. 2024, eq. 23)."""
    return shift * t / (shift * t + (1 - t))


def has_log_sigma_timesteps(scheduler: Any) -> bool:
    """Whether timesteps are log(sigma)/4, as EDM tells its networks the noise."""
    sigmas, timesteps = tables(scheduler)
    if not 0 < len(timesteps) <= len(sigmas) or sigmas[0] <= 0:
        return False
    return bool((timesteps[0] - sigmas[0].log() / 4).abs() < 1e-4)


def leaves_out(scheduler: Any, shift: float, steps: int) -> bool:
    """Whether the shift is in the sigmas of the grid that was set, and not in its timesteps."""
    sigmas, timesteps = tables(scheduler)
    sigmas, timesteps = sigmas[: len(timesteps)], timesteps / steps
    if len(sigmas) < len(timesteps) or not len(sigmas) or torch.allclose(sigmas, timesteps, atol=1e-3):
        return False
    return torch.allclose(sigmas, shifted(timesteps, shift), atol=1e-4)


def tables(scheduler: Any) -> tuple[Tensor, Tensor]:
    """The sigmas and timesteps of a scheduler, empty where they are not set (PNDM's at first)."""
    tables = (getattr(scheduler, name, None) for name in ("sigmas", "timesteps"))
    sigmas, timesteps = (torch.as_tensor(() if one is None else one).double().cpu() for one in tables)
    return sigmas, timesteps


def is_flow(scheduler: Any) -> bool:
    return "shift" in scheduler.config and not hasattr(scheduler, "betas")


def is_sigma(scheduler: Any) -> bool:
    """Whether a scheduler of flow steps a sample x_0 + sigma eps (Cosmos 2): its config states a sigma above 1."""
    return is_flow(scheduler) and (scheduler.config.get("sigma_max") or 0) > 1
