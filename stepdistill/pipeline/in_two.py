"""Steps that a pipeline makes in two (Cosmos 1): one for the x_0 of a prediction, one that goes on from an x_0."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from stepdistill.pipeline.recording import Step

GIVEN = "pred_original_sample"
"""The argument of a scheduler's step that is an x_0 in the place of its own."""


def as_one(first: Step, second: Step) -> Step:
    """The two steps as one, of the prediction whose x_0 the second step is given.

    It is read off the scheduler, whose x_0 is an affine function of the prediction.
    """
    sample, given = second.sample, second.model_output

    def x0(prediction: Tensor) -> Tensor:
        options = first.options | {"return_dict": False}
        with torch.random.fork_rng(devices=[]):
            scheduler = copy.deepcopy(first.scheduler)
            return scheduler.step(prediction, first.timestep, sample, **options)[1].double()

    zero = torch.zeros_like(given)
    nothing, one = x0(zero), x0(zero + 1)
    prediction = ((given.double() - nothing) / (one - nothing)).to(given)
    if first.model_output.shape == given.shape:  # what the pipeline has not changed is exact
        prediction = torch.where(x0(first.model_output) == given, first.model_output, prediction)
    options = {name: value for name, value in second.options.items() if name != GIVEN}
    made = {"model_output": prediction, "options": options, "previous": second.previous}
    return replace(first, sample=sample, in_two=True, **made)
