"""cfg_affine: its definition, its dispatch, and the Triton kernel against the definition."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepdistill.kernels import cfg_affine, cfg_affine_reference
from stepdistill.schedule import KINDS, VPSchedule

# One unit in the last place of the result's type; float32 differs by the order of a fused multiply-add.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}


def test_the_kernel_equals_the_reference_in_every_type_and_shape():
    pytest.importorskip("triton")
    program = Path(__file__).with_name("interpreted_cfg.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["rows"]) == 8 * 9 * 3
    for row in report["rows"]:
        same = row["output"] == row["sample"]
        assert row["error"] <= (TOLERANCE[row["output"]] if same else TOLERANCE["float32"]), row
    assert report["strided"] <= 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TOLERANCE)
def test_the_compiled_kernel_equals_the_reference(name):
    dtype = getattr(torch, name)
    cond, uncond, x_t = torch.randn(3, 5, 4, 33, 31, device="cuda").to(dtype)
    w, a, b = torch.rand(3, 5, device="cuda")
    torch.testing.assert_close(
        cfg_affine(cond, uncond, x_t, w, a, b),
        cfg_affine_reference(cond, uncond, x_t, w, a, b),
        rtol=TOLERANCE[name],
        atol=TOLERANCE[name],
    )


def test_w_is_the_scale_of_the_one_convention():
    cond, uncond, x_t = torch.randn(3, 2, 4)
    assert torch.equal(cfg_affine(cond, uncond, x_t, 0.0, 0.0, 1.0), uncond)
    torch.testing.assert_close(cfg_affine(cond, uncond, x_t, 1.0, 0.0, 1.0), cond)
    w = torch.tensor([1.0, 4.0])
    torch.testing.assert_close(cfg_affine(cond, uncond, x_t, w, 0.0, 1.0)[1], uncond[1] + 4 * (cond[1] - uncond[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_x0_with_the_coefficients_of_a_kind(kind):
    schedule = VPSchedule(torch.tensor([0.3, 0.8], dtype=torch.float64))
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    cond, uncond, x_t = torch.randn(3, 2, 4, dtype=torch.float64)
    alpha, sigma = schedule.coefficients(t)
    a, b = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "v": (alpha, -sigma),
        "flow": (1 / (alpha + sigma), -sigma / (alpha + sigma)),
        "sample": (0.0, 1.0),
    }[kind]
    expected = schedule.to_x0(uncond + 2.5 * (cond - uncond), x_t, t, kind)
    torch.testing.assert_close(cfg_affine(cond, uncond, x_t, 2.5, a, b), expected, rtol=1e-12, atol=1e-12)


def test_half_precision_is_computed_in_float32():
    cond, uncond, x_t = torch.randn(3, 2, 64).bfloat16()
    exact = cfg_affine_reference(cond.double(), uncond.double(), x_t.double(), 8.0, 14.6, -14.6)
    found = cfg_affine(cond, uncond, x_t, 8.0, 14.6, -14.6)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)
    assert cfg_affine(cond, uncond, x_t.float(), 8.0, 1.0, 1.0).dtype == torch.float32


def test_gradients_flow():
    cond, uncond, x_t = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True).unbind()
    coefficients = torch.rand(3, 2, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(cfg_affine, (cond, uncond, x_t, *coefficients))
