"""What torch.compile sees of the operations on a CUDA device: the kernels themselves. Traced without a device."""

import contextlib
import types

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode

from stepdistill.kernels import Rule, Update, add_noise, dmd_gradient, guide, pseudo_huber, sid_loss

KERNEL = "triton_kernel_wrapper_functional"

CASES = {
    "guide": (lambda x, y, z: guide(x, y, 3.0, update=Update(z, 1.1, -0.2)), 1),
    "guide with sums": (lambda x, y, z: guide(x, y, 3.0, Rule(rescale=0.5, parallel=0.0)), 2),
    "add_noise": (lambda x, y, z: add_noise(x, y, x.flatten(1)[:, 0], y.flatten(1)[:, 0]), 1),
    "dmd_gradient": (dmd_gradient, 2),
    "sid_loss": (lambda x, y, z: sid_loss(x, y, z, 1.2), 2),
    "pseudo_huber": (lambda x, y, z: pseudo_huber(x, 0.1), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_in_the_graph_and_overwrite_no_input(monkeypatch, name):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    driver = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    function, kernels = CASES[name]
    with FakeTensorMode():
        samples = [torch.empty(2, 3, 4, 5, device="cuda") for _ in range(3)]
        graph = aot_export_joint_simple(lambda *given: (function(*given),), samples, trace_joint=False)
    found = [str(node.target) for node in graph.graph.nodes]
    assert found.count(KERNEL) == kernels and not any("stepdistill" in one for one in found)
