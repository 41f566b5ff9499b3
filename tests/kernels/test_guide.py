"""guide: its definition against the papers' formulas and diffusers' own, the operation, and torch.compile."""

import sys

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch._dynamo.backends.common import aot_autograd

from stepdistill.kernels import Rule, Update, guide, guide_reference
from stepdistill.kernels.guide import guide_op
from stepdistill.kernels.guide import operands as given


def test_w_is_the_scale_of_the_one_convention():
    cond, uncond = torch.randn(2, 2, 4)
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, torch.tensor([1.0, 4.0]))[1], uncond[1] + 4 * (cond[1] - uncond[1]))


def test_outside_the_interval_there_is_no_guidance():
    cond, uncond = torch.randn(2, 4, 5)
    t = torch.tensor([0.1, 0.2, 0.7, 0.71], dtype=torch.float64)
    found = guide(cond, uncond, 3.0, Rule(interval=(0.2, 0.7)), t)
    expected = guide(cond, uncond, torch.tensor([1.0, 3.0, 3.0, 1.0]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("phi", [0.7, 1.0])
def test_rescale_is_that_of_diffusers(phi):
    cond, uncond = torch.randn(2, 3, 4, 8, 8)
    expected = rescale_noise_cfg(guide(cond, uncond, 5.0), cond, phi)
    torch.testing.assert_close(guide(cond, uncond, 5.0, Rule(rescale=phi)), expected)


def test_apg_is_that_of_diffusers():
    """In the paper's form, whose scale is w - 1, over three steps of a trajectory."""
    buffer, running = MomentumBuffer(-0.5), torch.zeros(2, 4, 8, 8)
    rule = Rule(parallel=0.2, max_norm=15.0, momentum=-0.5)
    for _ in range(3):
        cond, uncond = torch.randn(2, 2, 4, 8, 8)
        expected = normalized_guidance(cond, uncond, 6.5, buffer, 0.2, 15.0, True)
        torch.testing.assert_close(guide(cond, uncond, 7.5, rule, running=running), expected)
    torch.testing.assert_close(running, buffer.running_average)


def test_apg_with_nothing_changed_is_plain_guidance():
    cond, uncond = torch.randn(2, 3, 40, dtype=torch.float64)
    torch.testing.assert_close(guide(cond, uncond, 4.0, Rule(max_norm=1e9)), guide(cond, uncond, 4.0))


def test_half_precision_is_computed_in_float32():
    cond, uncond, x = torch.randn(3, 2, 64).bfloat16()
    exact = guide(cond.double(), uncond.double(), 8.0, update=Update(x.double(), 14.6, -14.6))
    found = guide(cond, uncond, 8.0, update=Update(x, 14.6, -14.6))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)
    assert guide(cond, uncond, 8.0, update=Update(x.float(), 1.0, 1.0)).dtype == torch.float32


def test_gradients_flow():
    samples = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True).unbind()
    coefficients = torch.rand(4, 2, dtype=torch.float64, requires_grad=True).unbind()

    def function(cond, uncond, x, w, a, b, c):
        return guide(cond, uncond, w, Rule(rescale=0.3, parallel=0.5, max_norm=1.0), update=Update(x, a, b, c))

    assert torch.autograd.gradcheck(function, (*samples, *coefficients))


def test_apg_has_a_gradient_where_the_two_outputs_are_the_same():
    """As in the rows outside an interval."""
    cond = torch.randn(2, 4, requires_grad=True)
    found = guide(cond, cond.clone(), 3.0, Rule(parallel=0.0, max_norm=1.0))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), cond)[0], torch.ones(2, 4))


@pytest.mark.parametrize("w", [0.3, 7.5, torch.tensor([0.0, 3.0])])
def test_the_plain_rule_alone_is_one_operation_of_pytorch(monkeypatch, w):
    """On a device with Triton, where guide() would launch its own kernel for anything more."""
    monkeypatch.setattr(sys.modules[guide.__module__], "fusible", lambda *_: True)
    cond, uncond = torch.randn(2, 2, 3, 4)
    with torch.profiler.profile() as seen:
        found = guide(cond, uncond, w)
    names = {event.name for event in seen.events()}
    assert "aten::lerp" in names and "aten::sub" not in names
    torch.testing.assert_close(found, guide_reference(cond, uncond, w))


def operands() -> list[torch.Tensor]:
    return [value.to(memory_format=torch.channels_last) for value in torch.randn(3, 2, 3, 4, 5)]


def test_the_operation_is_registered_as_torch_wants_it():
    cond, uncond, x = operands()
    row, running = torch.rand(2), torch.zeros(2, 3, 4, 5)
    full = (cond, uncond, row, row.double(), running, [x, row, row, row], [0.2, 0.8, 0.5, 0.3, 2.0, 0.1])
    plain = (cond, uncond, row, None, None, [], [0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    for arguments in (full, plain):
        torch.library.opcheck(torch.ops.stepdistill.guide.default, arguments)


def test_compiled_graphs_see_what_the_operation_does():
    """No break in the graph, and the operation is not in it: what it does is."""
    pytest.importorskip("triton")
    cond, uncond, x = operands()
    running = torch.zeros_like(cond)
    rule = Rule(interval=(0.0, 0.5), momentum=0.3)
    nodes = []

    def step(cond, uncond, x, t, running):
        return guide_op(cond, uncond, *given(cond, 3.0, rule, t, running, Update(x, 1.1, t))) * 2

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    t, other = torch.tensor([0.2, 0.9]), running.clone()
    compiled = torch.compile(step, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    torch.testing.assert_close(compiled(cond, uncond, x, t, running), step(cond, uncond, x, t, other))
    assert torch.equal(running, other) and running.abs().sum() > 0
    assert "aten.where.self" in nodes and not [name for name in nodes if "stepdistill" in name]
