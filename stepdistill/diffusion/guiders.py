"""A guider of diffusers as the teacher's rule of guidance: AutoGuidance, skipped layers, CFG-Zero*, APG of the output.

Its own code says how many passes there are, changes the network for some of them (layers that are skipped), and
combines their outputs. A training sample has a time and no step, so a guider works at all times or is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
from diffusers.guiders import BaseGuidance
from diffusers.utils import logging
from torch import Tensor, nn

from stepdistill.diffusion.denoiser import Conditions, Denoiser, innermost
from stepdistill.diffusion.schedule import Prediction
from stepdistill.errors import InputError, in_a_line

KEY = "teacher.guidance.guider"
STEPLESS = {"start": 0.0, "stop": 1.0, "start_step": 0, "zero_init_steps": 0, "momentum": None}
"""Endings of settings that depend on a step, and what they must be."""


@dataclass(frozen=True)
class Guider:
    """A class of guiders with its settings; the scale is guidance's own.

    Args:
        name: of a class of diffusers, such as AutoGuidance.
        settings: its arguments besides ``guidance_scale``.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def made(self, scale: float) -> BaseGuidance:
        """The guider at a scale, between the first step and the last.

        Raises:
            InputError: there is no such class, it takes no such settings, or it depends on the step.
        """
        kind = getattr(diffusers, self.name, None)
        if not (isinstance(kind, type) and issubclass(kind, BaseGuidance)) or kind is BaseGuidance:
            raise InputError(f"{KEY}.name: expected a guider of diffusers, such as AutoGuidance, found {self.name!r}")
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # each new one warns that all of them are experimental
        try:
            guider = kind(**{**self.settings, "guidance_scale": scale})
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{KEY}: {self.name}: {in_a_line(error)}") from error
        finally:
            logging.set_verbosity(before)
        for name, value in guider.config.items():
            ending = next((one for one in STEPLESS if name == one or name.endswith(f"_{one}")), None)
            if ending and value != STEPLESS[ending]:
                why = "a training sample has a time and no step"
                raise InputError(f"{KEY}.{name}: expected {STEPLESS[ending]}, as {why}; found {value}")
        guider.set_state(step=1, num_inference_steps=3, timestep=None)
        return guider

    @property
    def passes(self) -> int:
        """How often an image goes through the network at a guided step."""
        return self.made(2.0).num_conditions

    def outputs(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Conditions, null: Conditions | None, scale: float
    ) -> tuple[Prediction, Tensor]:
        """(the conditional prediction, the guided output (B, ...)) in at least float32.

        Raises:
            InputError: the network has no layers that the guider knows, or a pass needs an empty condition.
        """
        if isinstance(scale, Tensor):
            raise InputError(f"{KEY}: expected null for a method or teacher with a scale for each sample")
        guider, network, predictions = self.made(scale), innermost(denoiser.network), []
        passes = guider.prepare_inputs({"empty": (False, True)})
        for one in passes:
            if one.empty and null is None:
                raise InputError(f"{KEY}: {self.name} needs an empty condition, and this teacher has none")
            try:
                _prepare(guider, network)
                predictions.append(denoiser(x_t, t, null if one.empty else cond))
            finally:
                guider.cleanup_models(network)
            one.noise_pred = predictions[-1].raw.float()
        return predictions[0], guider(passes).pred


def _prepare(guider: BaseGuidance, network: nn.Module) -> None:
    """Change the network for the guider's next pass."""
    try:
        guider.prepare_models(network)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        name, kind, reason = type(guider).__name__, type(network).__name__, in_a_line(error)
        raise InputError(f"{KEY}: {name} cannot change a {kind}: {reason}") from error
