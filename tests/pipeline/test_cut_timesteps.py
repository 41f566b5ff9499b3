"""A pipeline that cuts off timesteps to integers, and so takes only schedulers whose timesteps are integers."""

from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import nn

from pipeline.tiny import redraw
from pipeline.toy import ToyNetwork, ToyPipeline
from stepdistill.diffusion.samplers import DDIM, Renoise
from stepdistill.errors import InputError
from stepdistill.pipeline.compare import deviation
from stepdistill.pipeline.components import scheduled
from stepdistill.pipeline.stock_call import record
from stepdistill.pipeline.trace import trace
from stepdistill.pipeline.variants import with_shift


class Cutting(ToyPipeline):
    def __init__(self, network: nn.Module, scheduler: Any):
        super().__init__(network, scheduler)
        self.times = lambda timesteps: timesteps.long()


def flow(kind: type) -> Any:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return kind(redraw(ToyNetwork(), 9), scheduler)


def test_the_student_is_told_integers_and_takes_exact_steps():
    found = trace(flow(Cutting))
    schedule = found.denoiser.schedule
    assert schedule.cut and with_shift(found, 2.0).denoiser.schedule.cut and found.self_test_error <= 1e-5
    assert schedule.timestep(torch.tensor([0.9376, 0.937, 1.0])).tolist() == [937, 937, 1000]
    sampler = DDIM(schedule, found.pipeline.scheduler, 3)
    assert any(1000 * step.t % 1 > 0.01 for step in sampler.grid())
    with scheduled(found.pipeline, sampler.scheduler):
        stock = record(found.pipeline, {"class_labels": [1, 2], "num_inference_steps": 3, "guidance_scale": 1.0})
    with torch.no_grad():
        cond = {"extra.what": torch.tensor([1, 2])}
        own = sampler.sample(lambda x, t: found.denoiser(x, t, cond), stock["noise"])
    assert deviation(own, stock["latents"]) <= 1e-5
    with pytest.raises(InputError, match="sampler renoise: expected ddim, the pipeline cuts off timesteps"):
        Renoise(schedule, found.pipeline.scheduler, 3)


def test_a_pipeline_that_takes_fractions_is_not_told_integers():
    assert not trace(flow(ToyPipeline)).denoiser.schedule.cut
