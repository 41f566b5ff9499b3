"""A student of few bits: it computes with rounded weights, gradients pass them by, and its export is on the grid."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from pipeline.no_preview import NoPreview
from pipeline.tiny import save_dit, tiny_dit
from stepdistill.errors import InputError
from stepdistill.exporting.export import export
from stepdistill.recipe import load
from stepdistill.roles.quantized import NF4, QuantizedLinear, baked, quantize_aware, rounded
from stepdistill.roles.views import plain_network
from stepdistill.run import train
from stepdistill.training.session import build

HOWS = ("int8", "int4", "nf4")
CALL = {"timestep": torch.tensor([600, 20]), "class_labels": torch.tensor([1, 2])}
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def levels(row: torch.Tensor) -> int:
    return len(row.unique())


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("columns", [20, 64, 160, 256])
def test_weights_go_to_the_nearest_level_and_stay_there(how, columns):
    weight = torch.randn(32, columns, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    found = rounded(weight, how)
    assert not found[3].any()
    torch.testing.assert_close(rounded(found, how), found, rtol=0, atol=1e-6)
    if how == "int8":
        whole = found / (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-9)
        assert torch.allclose(whole, whole.round(), atol=1e-4) and whole.abs().max() <= 127.001
        assert ((found - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 + 1e-6).all()
    if how == "int4":
        size = {20: 20, 64: 64, 160: 32, 256: 128}[columns]
        parts, near = weight.reshape(-1, size), found.reshape(-1, size)
        assert all(levels(row) <= 16 for row in near)
        step = (parts.amax(1) - parts.amin(1)) / 15
        assert ((near - parts).abs().amax(1) <= step / 2 + 1e-6).all()
    if how == "nf4" and columns == 64:
        ratios = found / found.abs().amax(1, keepdim=True).clamp_min(1e-9)
        apart = (ratios[..., None] - torch.tensor(NF4)).abs().amin(-1)
        assert apart.max() < 1e-6 and found[0].abs().max() == weight[0].abs().max()
    if how == "nf4":  # no other level of its block is nearer
        flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).reshape(-1, 64)
        levels_of = flat.abs().amax(1, keepdim=True)[..., None] * torch.tensor(NF4)
        nearest = (levels_of - flat[..., None]).abs().amin(-1).flatten()[: weight.numel()]
        assert ((found - weight).abs().flatten() <= nearest + 1e-6).all()


@pytest.mark.parametrize("how", HOWS)
def test_gradients_pass_straight_through(how):
    """The output is that of the rounded weight, to the bit; the weight's gradient is the rounded weight's own."""
    network = nn.Sequential(nn.Linear(24, 12), nn.SiLU(), nn.Linear(12, 5))
    plain = copy.deepcopy(network)
    with torch.no_grad():
        for layer in (plain[0], plain[2]):
            layer.weight.copy_(rounded(layer.weight, how))
    quantize_aware(network, how)
    assert isinstance(network[0], QuantizedLinear) and list(network.state_dict()) == list(plain.state_dict())
    x = torch.randn(7, 24)
    found, expected = network(x), plain(x)
    assert torch.equal(found, expected)
    for one, output in ((network, found), (plain, expected)):
        output.square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in one.parameters())
    for one, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert not torch.equal(network[0].weight, plain[0].weight)
    bare = baked(network)
    assert type(bare[0]) is nn.Linear and torch.equal(bare[0].weight, plain[0].weight)


def test_what_the_class_keeps_in_float32_is_left_out():
    network = tiny_dit().transformer
    network._keep_in_fp32_modules = ["attn1"]
    quantize_aware(network, "int8")
    kinds = {name: type(layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    assert {kind for name, kind in kinds.items() if ".attn1." in name} == {nn.Linear}
    assert {kind for name, kind in kinds.items() if ".attn1." not in name} == {QuantizedLinear}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("exact") / "teacher"
    save_dit(tiny_dit(), folder)
    return str(folder)


def recipe_of(teacher, output, how="int8", **method) -> dict:
    return {
        "teacher": {"pipeline": teacher, "guidance": {"scale": 2.0}},
        "student": {"steps": 2, "quantize": how, "ema": 0.5},
        "method": {"name": "dmd2"} | method,
        "train": {"steps": 3, "batch_size": 2, "lr": 1e-2, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(output),
    }


@pytest.mark.parametrize("how", HOWS)
def test_the_export_is_a_stock_folder_on_the_grid(teacher, tmp_path, monkeypatch, how):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    run = train(recipe_of(teacher, tmp_path / "run", how)).folder
    network = DiTTransformer2DModel.from_pretrained(run / "export" / "transformer")
    weights = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert len(weights) > 10
    for weight in weights:
        torch.testing.assert_close(rounded(weight, how), weight.detach(), rtol=0, atol=1e-6)
    assert export(run, tmp_path / "again").max_error <= 1e-5
    with pytest.raises(InputError, match=r"export\.dtype: expected fp32 for a student in .*, found bf16"):
        export(run, tmp_path / "half", dtype="bf16")


def test_the_student_alone_is_rounded(teacher, tmp_path):
    session = build(load(recipe_of(teacher, tmp_path)), torch.device("cpu"))
    roles = session.method.roles
    for name, rounds in (("teacher", False), ("student", True), ("critic", False)):
        network = getattr(roles, name).network
        assert any(isinstance(layer, QuantizedLinear) for layer in network.modules()) == rounds
    with torch.no_grad():
        found, written = (
            one(X, **CALL).sample for one in (roles.student.network, plain_network(roles.student.network))
        )
    assert torch.equal(found, written)
    wrong = recipe_of(teacher, tmp_path, name="lcm", w_min=1.0, w_max=3.0, real="teacher", real_rows=2, real_steps=2)
    with pytest.raises(InputError, match=r"student\.quantize: expected null for lcm, which adds to its network"):
        build(load(wrong), torch.device("cpu"))


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_diffusers_packs_it_without_a_loss(teacher, tmp_path, how):
    """Through its configuration for quanto: the packed network is the written one, and is packed when written again."""
    pytest.importorskip("optimum.quanto")
    from diffusers import QuantoConfig

    network = DiTTransformer2DModel.from_pretrained(f"{teacher}/transformer")
    quantize_aware(network, how)
    baked(network).save_pretrained(tmp_path / "grid")
    packed = DiTTransformer2DModel.from_pretrained(tmp_path / "grid", quantization_config=QuantoConfig(how))
    with torch.no_grad():
        torch.testing.assert_close(packed(X, **CALL).sample, network(X, **CALL).sample, rtol=1e-4, atol=1e-5)
    packed.save_pretrained(tmp_path / "packed")
    sizes = [sum(file.stat().st_size for file in (tmp_path / one).iterdir()) for one in ("grid", "packed")]
    assert sizes[1] < sizes[0]
