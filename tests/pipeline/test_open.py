"""A teacher is opened in one place: what the user states reaches the pipeline, the trace and the guidance."""

import pytest
import torch

from pipeline.tiny import save_dit, tiny_dit, tiny_flux
from stepdistill.errors import InputError
from stepdistill.kernels import Rule
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import pipeline_of
from stepdistill.pipeline.open import open_teacher
from stepdistill.recipe.section import Guidance


def test_guidance_inside_the_network_gets_the_scale_and_no_rule(tmp_path):
    save_pipeline(tiny_flux(), tmp_path)
    size = {"height": 16, "width": 16}
    traced = open_teacher(tmp_path, arguments=size, guidance=Guidance(scale=1.5))
    assert traced.denoiser.spec.constants["guidance"].tolist() == [1.5] and traced.arguments == size
    with pytest.raises(InputError, match=r"teacher\.guidance: .* embedded, found rescaled 0\.5"):
        open_teacher(tmp_path, arguments=size, guidance=Guidance(scale=1.5, rescale=0.5))


def test_guidance_outside_gets_the_rule(tmp_path):
    save_dit(tiny_dit(), tmp_path / "export")
    assert pipeline_of(tmp_path) == tmp_path / "export" and pipeline_of(tmp_path / "export") == tmp_path / "export"
    traced = open_teacher(tmp_path / "export", guidance=Guidance(scale=3.0, interval=[0.2, 0.8]), dtype=torch.bfloat16)
    assert traced.denoiser.rule == Rule(interval=(0.2, 0.8))
    assert traced.denoiser.network.dtype == torch.bfloat16
