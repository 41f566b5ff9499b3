"""The facts in published.py: networks of the published sizes, and schedulers that are understood."""

import diffusers
import pytest
import torch

from published import MODELS
from stepdistill.diffusion.schedule import from_scheduler

MILLIONS = {
    "sd15": 860,
    "sd21-v": 866,
    "sdxl": 2567,
    "sd35-medium": 2243,
    "sd35-large": 8057,
    "flux-dev": 11901,
    "pixart-sigma": 611,
    "sana-1600m": 1604,
    "dit-xl-256": 750,
    "wan21-1.3b": 1419,
    "qwen-image": 20430,
    "z-image": 6155,
    "auraflow": 6859,
    "lumina2": 2610,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_network_has_the_published_size(name):
    facts = MODELS[name]
    with torch.device("meta"):
        network = getattr(diffusers, facts.network).from_config(facts.network_config)
    assert round(sum(weight.numel() for weight in network.parameters()) / 1e6) == MILLIONS[name]
    assert hasattr(diffusers, facts.pipeline)


@pytest.mark.parametrize("name", MODELS)
def test_the_scheduler_is_understood(name):
    facts = MODELS[name]
    schedule, kind = from_scheduler(getattr(diffusers, facts.scheduler)(**facts.scheduler_config))
    assert (schedule.name, kind) in {("vp_discrete", "epsilon"), ("vp_discrete", "v"), ("flow", "flow")}
    assert (kind == "v") == (name == "sd21-v")
