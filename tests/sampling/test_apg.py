"""Adaptive Projected Guidance of a recipe: where its teacher's guidance is formed."""

import torch

from pipeline.tiny import save_dit, tiny_dit
from stepdistill.diffusion.guidance import rule_text
from stepdistill.recipe import load
from stepdistill.training.run_samples import diffuse
from stepdistill.training.session import build


def test_a_recipes_rule_is_the_teachers_everywhere(tmp_path):
    save_dit(tiny_dit(), tmp_path / "teacher")

    def session(**guidance):
        recipe = {
            "teacher": {"pipeline": str(tmp_path / "teacher"), "guidance": {"scale": 6.0, **guidance}},
            "student": {"steps": 2},
            "method": {"name": "dmd2", "critic_steps": 1},
            "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
        }
        return build(load(recipe), torch.device("cpu"))

    plain, projected = session(), session(rule="apg", eta=0.25, norm=2.0)
    batch, t = plain.batch(0, 0, 2), torch.full((2,), 0.6, dtype=torch.float64)
    found, both, unguided = (
        one.method.teacher(batch.noise("x"), t, batch, scale).x0.double().flatten(1)
        for one, scale in ((projected, None), (plain, None), (plain, 1.0))
    )
    # Plain guidance is D + 5 d: the definition, from what it says.
    difference = (both - unguided) / 5
    difference *= (2 / difference.norm(dim=1, keepdim=True)).clamp(max=1)
    along = (difference * unguided).sum(1, keepdim=True) / unguided.square().sum(1, keepdim=True) * unguided
    expected = unguided + 5 * (difference - 0.75 * along)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - both).abs().max() > 0.1
    assert not torch.allclose(diffuse(projected, "teacher", 2, seed=0), diffuse(plain, "teacher", 2, seed=0))
    assert "APG" in rule_text(projected.trace.denoiser.rule)
