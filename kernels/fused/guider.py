"""Fused guidance at inference: a guider for diffusers pipelines that take one (``guider=...``), nothing patched."""

from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from stepdistill.kernels import Rule, guide


class FusedGuidance(ClassifierFreeGuidance):
    """diffusers' ``ClassifierFreeGuidance`` with the same arguments and result, combined by one kernel.

    For any pipeline with a ``guider`` component: ``pipe.update_components(guider=FusedGuidance(7.5))``, or its own
    argument. With ``guidance_rescale`` the deviations come from the same two reads.
    """

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None:
            return super().forward(pred_cond)
        # The original formulation counts guidance from the conditional output.
        w = self.guidance_scale + self.use_original_formulation
        pred = guide(pred_cond, pred_uncond, w, Rule(rescale=self.guidance_rescale))
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)
