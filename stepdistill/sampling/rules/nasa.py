"""Negative prompts without guidance: inside the cross-attention, NASA (Nguyen et al. 2024)."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.schedule import Prediction
from stepdistill.errors import InputError
from stepdistill.pipeline.components import patched
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.trace import Trace
from stepdistill.sampling.rules.steps import Step, StepRule

# The names that stock networks have for a prompt's tokens, and for which of them count.
TEXT, KEPT = "encoder_hidden_states", "encoder_attention_mask"


def away_from(trace: Trace, negative: str, scale: float) -> StepRule:
    """A rule that steers the network away from a prompt, in the same passes and without guidance.

    Every cross-attention gives softmax(Q K+) V+ - scale softmax(Q K-) V- (eq. 9) before its output's projection. The
    negative prompt's tokens follow those of the sample's, so what the network does to tokens first it does to both.

    Args:
        trace: of the network that the rule will be called with.
        scale: in the paper 0.1 for SD 1.5, 0.2 for SD 2.1, 0.5 for PixArt.

    Raises:
        InputError: the network has no cross-attention to the tokens of a prompt alone.
    """
    network = trace.denoiser.network
    blocks = [one for one in network.modules() if getattr(one, "is_cross_attention", False)]
    if TEXT not in trace.conditioning or not blocks or any(getattr(one, "add_k_proj", None) for one in blocks):
        raise InputError(
            f"negative: expected a network with cross-attention to a prompt, found {type(network).__name__}"
        )
    away = encode(trace, [negative]).to(trace.pipeline.device).cond

    def rule(denoiser: Denoiser, step: Step) -> Prediction:
        cond = dict(step.cond)
        for name in {TEXT, KEPT} & cond.keys():
            cond[name] = torch.cat([cond[name], away[name].expand(len(step.x_t), *away[name].shape[1:])], 1)
        lengths = step.cond[TEXT].shape[1], away[TEXT].shape[1]
        with ExitStack() as patches:
            for block in blocks:
                patches.enter_context(patched(block, "forward", _steered(block, lengths, scale)))
            return denoiser(step.x_t, step.t, cond)

    return rule


def _steered(attention: nn.Module, lengths: tuple[int, int], scale: float) -> Callable[..., Any]:
    """The forward of a cross-attention that is handed the tokens of both prompts."""
    original, signature = attention.forward, inspect.signature(attention.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        text, mask = given.arguments.get(TEXT), given.arguments.get("attention_mask")
        alike = isinstance(text, Tensor) and text.shape[1] == sum(lengths)
        if not alike or (mask is not None and mask.shape[-1] != sum(lengths)):
            raise InputError("negative: this network's cross-attention sees more than the tokens of one prompt")

        def attend(tokens: slice, before_projection: Callable[[nn.Module, tuple[Tensor]], Any]) -> Any:
            given.arguments[TEXT] = text[:, tokens]
            if mask is not None:
                given.arguments["attention_mask"] = mask[..., tokens]
            handle = attention.to_out[0].register_forward_pre_hook(before_projection)
            try:
                return original(*given.args, **given.kwargs)
            finally:
                handle.remove()

        negative: list[Tensor] = []
        attend(slice(lengths[0], None), lambda _, inputs: negative.append(inputs[0]))
        return attend(slice(lengths[0]), lambda _, inputs: (inputs[0] - scale * negative[0],))

    return forward
