"""The Triton kernels: against their references in the interpreter and on a device, and compiled ahead of time."""

import pytest
import torch

from stepdistill import kernels
from stepdistill.kernels import Rule, Update

# One unit in the last place of the result's type; float32 differs by the order of its sums.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}

KERNELS = (
    "add_noise",
    "dmd_gradient",
    "dmd_gradient clamped",
    "guide",
    "pseudo_huber",
    "pseudo_huber gradient",
    "sid_loss",
    "sid_loss gradient 0",
    "sid_loss gradient 1",
    "sid_loss gradient 2",
)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_equals_its_reference(interpreted, kernel):
    rows = [row for row in interpreted if row["kernel"] == kernel]
    assert len(rows) >= 14
    for row in rows:
        assert row["error"] <= TOLERANCE[row["type"]], row


def samples(dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = (count, 3, 4, 33, 31)
    return list(torch.randn(shape, device="cuda", generator=generator).to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TOLERANCE)
def test_the_compiled_kernels_equal_their_references(name):
    dtype, close = getattr(torch, name), {"rtol": TOLERANCE[name], "atol": TOLERANCE[name]}
    cond, uncond, x, noise = samples(dtype, 4)
    w, a, b, c = torch.rand(4, 3, device="cuda")
    rule = Rule(rescale=0.5, interval=(0.2, 1.0), parallel=0.1, max_norm=20.0)
    for chosen, update in ((Rule(), None), (Rule(), Update(x, a, b)), (rule, Update(x, a, b, c))):
        given = (cond, uncond, w, chosen, torch.rand(3, device="cuda"), None, update)
        torch.testing.assert_close(kernels.guide(*given), kernels.guide_reference(*given), **close)
    for fused, reference, extra in (
        (kernels.add_noise, kernels.add_noise_reference, (w, a)),
        (kernels.sid_loss, kernels.sid_loss_reference, (noise, 1.2)),
        (kernels.dmd_gradient, kernels.dmd_gradient_reference, (noise,)),
    ):
        torch.testing.assert_close(fused(cond, uncond, *extra), reference(cond, uncond, *extra), **close)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_on_the_device_equal_those_of_the_references():
    x, real, fake = (value.requires_grad_() for value in samples(torch.float32, 3))
    alpha, sigma = torch.rand(2, 3, device="cuda")
    for fused, reference, given in (
        (kernels.add_noise, kernels.add_noise_reference, (x, real, alpha, sigma)),
        (kernels.sid_loss, kernels.sid_loss_reference, (x, real, fake, 1.2)),
        (kernels.pseudo_huber, kernels.pseudo_huber_reference, (x, 0.01)),
        (kernels.surrogate, kernels.surrogate_reference, (x, fake.detach())),
    ):
        leaves = [value for value in given if isinstance(value, torch.Tensor) and value.requires_grad]
        pairs = [torch.autograd.grad(function(*given).square().sum(), leaves) for function in (fused, reference)]
        for found, expected in zip(*pairs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_capture_guidance():
    cond, uncond, x = samples(torch.bfloat16, 3)
    expected = kernels.guide(cond, uncond, 3.0, update=Update(x, 1.1, -0.3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.guide(cond, uncond, 3.0, update=Update(x, 1.1, -0.3))
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)


def test_the_kernels_compile_for_an_h100():
    """Ahead of time, without a device: from Triton's language to machine code for sm_90."""
    pytest.importorskip("triton")
    from stepdistill.kernels import guide_triton, training_triton

    found = {name for module in (guide_triton, training_triton) for name in vars(module) if name.endswith("_kernel")}
    assert found == {case[0] for case in SIGNATURES}
    for name, types, constants in SIGNATURES:
        assert ahead_of_time(name, types, constants)["cubin"], name


def test_samples_are_read_and_written_in_sixteen_bytes():
    """What limits memory traffic on a GPU: each sample's tensor once, in the widest access that there is."""
    pytest.importorskip("triton", minversion="3.3")  # before, alignment is told in another way
    plain = PARTS | OFF | dict.fromkeys(FLAGS, False)
    for name, types, constants, reads in (
        ("guide_kernel", HALF, plain, 2),
        ("guide_kernel", HALF, {key: plain[key] for key in plain.keys() - {"x", "a", "b"}} | {"UPDATE": True}, 3),
        ("guide_kernel", HALF, {key: plain[key] for key in plain.keys() - {"sums"}} | {"RESCALE": True}, 2),
        ("add_noise_kernel", HALF, {}, 2),
        ("dmd_gradient_kernel", HALF, PARTS, 2),
    ):
        code = ahead_of_time(name, types, constants, aligned=True)["ptx"]
        assert code.count("ld.global.v4.b32") == reads, name
        assert code.count("st.global.v4.b32") == 1, name
        assert "global.b16" not in code, name


def ahead_of_time(name: str, types: dict, constants: dict, aligned: bool = False) -> dict:
    """A kernel's code for sm_90 by stage; ``aligned``: addresses and strides are multiples of 16, as is usual."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stepdistill.kernels import guide_triton, training_triton

    kernel = getattr(guide_triton, name, None) or getattr(training_triton, name)
    constants = {"BLOCK": 1024, **constants}
    given = {**types, **dict.fromkeys(constants, "constexpr")}
    signature = {argument: given.get(argument, default(argument)) for argument in kernel.arg_names}
    wide = [at for at, kind in enumerate(signature.values()) if aligned and (kind == "i32" or kind.startswith("*"))]
    source = ASTSource(
        kernel,
        signature,
        {key: constants[key] for key in kernel.arg_names if key in constants},
        {(at,): [["tt.divisibility", 16]] for at in wide} or None,
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


def default(argument: str) -> str:
    """The type of an argument of that name."""
    if argument.startswith("s_") or argument in ("stride", "elements", "total", "parts"):
        return "i32"
    numbers = ("low", "high", "rescale", "parallel", "max_norm", "momentum", "floor")
    return "fp32" if argument in numbers else "*fp32"


HALF = dict.fromkeys(("cond", "uncond", "x0", "eps", "x", "real", "fake", "difference", "out"), "*bf16")
PARTS = {"PARTS": 64}
SUMS = {**PARTS, "CHUNK": 4096}
OFF = dict.fromkeys(("x", "running", "t", "a", "b", "c", "sums"))
FLAGS = ("UPDATE", "PLUS", "LIMITED", "PROJECTS", "CLIPS", "MOMENTUM", "RESCALE")
SIGNATURES = [
    ("guide_kernel", HALF, PARTS | OFF | dict.fromkeys(FLAGS, False)),
    ("guide_kernel", HALF | {"t": "*fp64"}, PARTS | dict.fromkeys(FLAGS, True)),
    ("sums_kernel", HALF, SUMS | {"MOMENTUM": True}),
    ("add_noise_kernel", HALF, {}),
    ("gap_sums_kernel", HALF, SUMS),
    ("dmd_gradient_kernel", HALF, PARTS),
    ("sid_sums_kernel", HALF | {"alpha": "fp32"}, SUMS),
    ("sid_backward_kernel", HALF | {"alpha": "fp32"}, {}),
    ("huber_sums_kernel", HALF | {"c": "fp32"}, SUMS),
    ("huber_backward_kernel", HALF | {"c": "fp32"}, {}),
]
