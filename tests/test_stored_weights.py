"""Frozen weights in 8-bit floats or in the host's memory: adapters learn as on plain weights of the same values."""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from pipeline.tiny import save_dit, tiny_dit, tiny_sd
from stepdistill.errors import InputError
from stepdistill.exporting import export as exporting
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.open import open_teacher
from stepdistill.recipe import load
from stepdistill.roles.stored_weights import FLOAT8, Frozen, StoredWeight, scale_of, store, stored_layers
from stepdistill.roles.views import save_memory
from stepdistill.training.optimizer import only_moving
from stepdistill.training.recompute import elementwise_recomputed
from stepdistill.training.session import build
from stepdistill.training.trainer import Trainer

CPU = torch.device("cpu")
FP8, GROUP = Frozen(storage="fp8"), Frozen(offload="group")


def round_weights(network: nn.Module) -> None:
    """Give the layers' weights the values that 8-bit floats have for them."""
    for layer, eight in stored_layers(network, FP8):
        weight = layer.weight.data
        if eight:
            weight.copy_((weight * scale_of(weight)).to(FLOAT8).to(weight.dtype) / scale_of(weight))


def gradients(name: str, dtype: torch.dtype, frozen: Frozen | None, recompute: bool | str) -> list[torch.Tensor]:
    """Of adapters on a frozen transformer, or on a UNet, whose convolutions keep more for their backward pass."""
    network = tiny_dit().transformer if name == "dit" else tiny_sd().unet
    network = network.to(dtype).requires_grad_(False)
    store(network, frozen, CPU) if frozen else round_weights(network)
    layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=layers, init_lora_weights=False), network, adapter_name="a")
    adapters = [weight for name, weight in network.named_parameters() if ".lora_" in name]
    if recompute is True:
        save_memory(network)
    x, times = torch.randn(2, 4, 8, 8), torch.tensor([3, 400])
    cond = {"class_labels": times // 100} if name == "dit" else {"encoder_hidden_states": torch.randn(2, 40, 16)}
    half = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with only_moving(adapters), half, elementwise_recomputed() if recompute == "elementwise" else nullcontext():
        network(x.to(dtype), timestep=times, **cond).sample.float().square().sum().backward()
    return [adapter.grad for adapter in adapters]


@pytest.mark.parametrize("recompute", [False, True, "elementwise"])
@pytest.mark.parametrize(("name", "dtype"), [("dit", torch.float32), ("sd", torch.bfloat16)])
def test_gradients_are_those_of_the_rounded_network(name, dtype, recompute):
    expected = gradients(name, dtype, None, recompute)
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    found = gradients(name, dtype, Frozen(None, "fp8", "group"), recompute)
    assert all(map(torch.equal, found, expected))


def test_a_graph_keeps_what_is_stored():
    network, kept = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Linear(8, 8)).requires_grad_(False), []
    store(network, FP8, CPU)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = network.bfloat16()(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True))
    plain = [tensor.shape for tensor in kept if not isinstance(tensor, StoredWeight)]
    assert len(kept) - len(plain) == 2 and set(plain) <= {(2, 3, 8, 8), (3,)}
    y.sum().backward()


def recipe_of(teacher: Path, output: Path, precision: str = "fp32", how: str = "lora", **teacher_keys) -> dict:
    return {
        "teacher": {"pipeline": str(teacher), "guidance": {"scale": 2.0}, "precision": precision} | teacher_keys,
        "student": {"steps": 2, "train": how, "rank": 2},
        "data": {"conditions": ["a red shoe", "rain"] if teacher.name == "sd" else "classes"},
        "method": {"name": "dmd2", "critic_steps": 1},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-2, "precision": precision, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(output),
    }


def after_a_step(recipe: dict) -> dict[str, torch.Tensor]:
    """The weights and first moments of both players after a step in which both move."""
    session = build(load(recipe), CPU)
    trainer = Trainer(session, Accelerator(cpu=True), Path(recipe["output"]))
    trainer.step(0)
    weights = {f"{name} {i}": p for name, own in trainer.parameters.items() for i, p in enumerate(own)}
    for name, optimizer in trainer.optimizers.items():
        weights |= {f"{name} moment {i}": state["exp_avg"] for i, state in enumerate(optimizer.state.values())}
    return weights


def test_a_step_on_eight_bits_is_that_on_the_rounded_teacher(tmp_path):
    pipeline = tiny_sd()
    save_pipeline(pipeline, tmp_path / "sd")
    round_weights(pipeline.unet.to(torch.bfloat16))
    pipeline.unet.float()
    save_pipeline(pipeline, tmp_path / "rounded" / "sd")
    found = after_a_step(recipe_of(tmp_path / "sd", tmp_path / "a", "bf16", storage="fp8"))
    expected = after_a_step(recipe_of(tmp_path / "rounded" / "sd", tmp_path / "b", "bf16"))
    assert len(found) > 100 and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_step_with_weights_in_the_hosts_memory_is_the_same(tmp_path):
    """The critic is trained whole here: its start is the teacher's weights, and not a view of them."""
    save_dit(tiny_dit(), tmp_path / "dit")
    keys = {"method": {"name": "dmd2", "critic_steps": 1, "critic": "full"}}
    found = after_a_step(recipe_of(tmp_path / "dit", tmp_path / "a", offload="group") | keys)
    expected = after_a_step(recipe_of(tmp_path / "dit", tmp_path / "b") | keys)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("frozen", [FP8, GROUP])
def test_a_copy_of_a_stored_network_is_plain(frozen):
    network = tiny_dit().transformer.requires_grad_(False)
    plain = copy.deepcopy(network)
    if frozen is FP8:
        round_weights(plain)
    store(network, frozen, CPU)
    stored = [weight for weight in network.parameters() if isinstance(weight, StoredWeight)]
    assert len(stored) > 10 and {weight.dtype for weight in stored} == {torch.float32}
    other = copy.deepcopy(network).state_dict()
    assert {type(weight) for weight in other.values()} == {torch.Tensor}
    assert all(torch.equal(weight, other[name]) for name, weight in plain.state_dict().items())


def test_small_weights_keep_their_bits():
    """Without a scale 8-bit floats have one bit for a weight of .004, and none below .001."""
    layer = nn.Linear(64, 64, bias=False)
    weight = nn.init.normal_(layer.weight, std=0.004).detach().clone()
    store(nn.Sequential(layer), FP8, CPU)
    error, plain = (
        (one - weight).norm() / weight.norm() for one in (layer.weight.restored(), weight.to(FLOAT8).float())
    )
    assert error < 0.03 < 0.1 < plain


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teacher.quantize": "int8", "teacher.precision": "bf16"}, r"teacher\.quantize: expected null beside"),
        ({"train.compile": "true"}, r"train\.compile: expected false beside"),
        ({"train.channels_last": "true"}, r"train\.channels_last: expected false beside"),
        ({"distributed.shard": "true"}, r"distributed\.shard: expected false beside"),
    ],
)
@pytest.mark.parametrize("key", ["teacher.storage", "teacher.offload"])
def test_what_cannot_be_is_refused(key, keys, message):
    keys = keys | {key: "fp8" if key.endswith("storage") else "group", "student.train": "lora"}
    with pytest.raises(InputError, match=rf"{message} {key.replace('.', chr(92) + '.')}, found"):
        load("quickstart", [f"{name}={value}" for name, value in keys.items()])


def test_a_pipeline_without_such_a_network_is_named(tmp_path, monkeypatch):
    save_dit(tiny_dit(), tmp_path / "dit")
    pipeline = load_pipeline(tmp_path / "dit")
    monkeypatch.setattr("stepdistill.pipeline.open.load_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(type(pipeline), "components", {})
    with pytest.raises(InputError, match=r"teacher\.storage: expected null for DiTPipeline, which has no transformer"):
        open_teacher(tmp_path / "dit", frozen=FP8)


def test_the_export_stands_on_plain_weights(tmp_path):
    save_dit(tiny_dit(), tmp_path / "dit")
    recipe = load(recipe_of(tmp_path / "dit", tmp_path / "run", "bf16", storage="fp8", offload="group"))
    session = exporting._session(recipe, recipe.export)
    weights = session.trace.network.parameters()
    assert {(type(weight), weight.dtype) for weight in weights} == {(nn.Parameter, torch.float32)}


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [FP8, GROUP, Frozen(None, "fp8", "group")])
def test_a_gpu_gets_each_layer_in_time(frozen):
    """The layers' weights come on a stream of their own; most of them are not on the device between calls."""
    device = torch.device("cuda")
    network = nn.Sequential(*(nn.Linear(512, 512) for _ in range(16))).requires_grad_(False)
    plain = copy.deepcopy(network)
    if frozen.storage:
        round_weights(plain)
    plain, before = plain.to(device), torch.cuda.memory_allocated()
    store(network, frozen, device)
    network.to(device)
    if frozen.offload:
        assert torch.cuda.memory_allocated() - before < 2**20
    results = []
    for one in (plain, network):
        x = torch.ones(4, 512, device=device, requires_grad=True)
        for _ in range(3):
            one(x).square().sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)
