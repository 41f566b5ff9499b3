"""A guider of diffusers as the teacher's rule: its passes, the network that it changes, what it refuses."""

import pytest
import torch

from pipeline import tiny
from stepdistill.diffusion.guidance import guided
from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.set_up import passes
from stepdistill.pipeline.trace import trace
from stepdistill.pipeline.variants import with_guider

SKIPPED = {"indices": [1], "fqn": "auto", "dropout": 1.0}
SCALE = 3.0


@pytest.fixture(scope="module")
def traced():
    return trace(tiny.tiny_dit())


@pytest.fixture(scope="module")
def point(traced):
    """x_t, t, conditions and empty conditions of two samples."""
    cond, null = encode(traced, [1, 2], None).batch(torch.arange(2))
    x_t = torch.randn(2, *traced.latent_shape, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([0.7, 0.3]), cond, null


@torch.no_grad()
def test_plain_guidance_as_a_guider_is_the_rule_itself(traced, point):
    by_rule = guided(traced.denoiser, *point, SCALE).raw
    by_guider = guided(with_guider(traced, {"name": "ClassifierFreeGuidance"}).denoiser, *point, SCALE).raw
    assert torch.allclose(by_guider, by_rule, atol=1e-5)


@torch.no_grad()
def test_auto_guidance_leads_away_from_the_network_without_a_layer(traced, point):
    x_t, t, cond, null = point
    settings = {"name": "AutoGuidance", "auto_guidance_config": SKIPPED}
    guider = with_guider(traced, settings)
    made = guided(guider.denoiser, *point, SCALE).raw
    network = traced.network
    whole, skipped = traced.denoiser(x_t, t, cond).raw, network.transformer_blocks[1]
    handle = skipped.register_forward_hook(lambda _, args, kwargs, out: [*args, *kwargs.values()][0], with_kwargs=True)
    weak = traced.denoiser(x_t, t, null).raw
    handle.remove()
    assert torch.allclose(made, weak + SCALE * (whole - weak), atol=1e-4)
    assert not torch.allclose(made, guided(traced.denoiser, *point, SCALE).raw, atol=1e-2)
    assert torch.equal(traced.denoiser(x_t, t, cond).raw, whole)  # the network is as it was


def test_passes_are_counted(traced):
    settings = {"name": "SkipLayerGuidance", "skip_layer_config": SKIPPED}
    settings |= {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    assert passes(with_guider(traced, settings), traced.pipeline.scheduler, 2, SCALE) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "Guidance"}, "name: expected a guider of diffusers"),
        ({"name": "ClassifierFreeGuidance", "strength": 1}, "unexpected keyword argument 'strength'"),
        ({"name": "ClassifierFreeZeroStarGuidance"}, "zero_init_steps: expected 0, as a training sample"),
        ({"name": "ClassifierFreeGuidance", "stop": 0.5}, "stop: expected 1.0, as a training sample"),
    ],
)
def test_guiders_that_depend_on_a_step_are_refused(traced, settings, message):
    with pytest.raises(InputError, match=message):
        with_guider(traced, settings)


@torch.no_grad()
def test_a_network_without_such_layers_is_named(traced, point):
    settings = {"name": "AutoGuidance", "auto_guidance_config": SKIPPED | {"fqn": "nowhere"}}
    with pytest.raises(InputError, match="AutoGuidance cannot change a DiTTransformer2DModel"):
        guided(with_guider(traced, settings).denoiser, *point, SCALE)
