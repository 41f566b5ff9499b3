"""No loss waits for a copy between host and device: counted on torch's meta device, for every method and player."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.tiny import tiny_dit, tiny_sd, tiny_sd3
from stepdistill.data.batch import Batch, PathRows
from stepdistill.diffusion.samplers import SAMPLERS
from stepdistill.diffusion.schedule import FlowSchedule
from stepdistill.methods import METHODS
from stepdistill.pipeline.trace import trace
from stepdistill.recipe import load
from stepdistill.roles.heads import ImageFeatures
from stepdistill.training.make_method import make_method

SETTINGS: dict[str, dict[str, Any]] = {
    "dmd2": {"gan_weight": 1e-3, "regression_steps": 1},
    "decoupled-dmd": {"gan_weight": 1e-3},
    "senseflow": {"gan_weight": 1e-3},
    "disback": {"critic_warmup": 1, "snapshots": 1},
    "scm": {"jvp": "finite"},
    "rcm": {"jvp": "finite", "tangent_warmup": 0, "critic_steps": 2},
    "tbcm": {"jvp": "finite", "route": 3},
    "tscd": {"segments": [4, 2], "stage_steps": 1, "sampler": "ddim"},
    "pd": {"start_steps": 8, "phase_steps": 1},
    "sfd": {"paths": 4, "path_steps": 4},
    "ladd": {"r1": 1e-4},
    "emd": {"langevin_steps": 2},
    "imagine-flash": {"gan_weight": 0.1},
    "flash-diffusion": {"solver_steps": 4, "stage_steps": 1, "guidance_range": [2, 3]},
    "lcm": {"w_min": 1.0, "w_max": 4.0},
}
ON_PIXELS = ("add", "flash-dmd")
MADE = (torch.tensor, torch.as_tensor)


@cache
def seen(make: Any) -> Any:
    return trace(make())


def dit_of_one_block() -> Any:
    """Operations on the meta device take a hundred times as long as on others."""
    pipeline = tiny_dit()
    pipeline.transformer.transformer_blocks = pipeline.transformer.transformer_blocks[:1]
    return pipeline


class HostCopies(TorchDispatchMode):
    """Counts copies between the host and the meta device, by what was copied."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            if source.device != out.device:
                self.found.append(f"{tuple(source.shape)} {source.device} -> {out.device}")
        return out


@pytest.fixture
def made(monkeypatch):
    """What tensors are made of numbers for a device: copies too, which no dispatch shows."""
    found: list[Any] = []

    def counting(make: Any) -> Any:
        def wrapped(value: Any, *arguments: Any, **keywords: Any) -> Tensor:
            device = keywords.get("device")
            if device is not None and torch.device(device).type == "meta" and not isinstance(value, Tensor):
                found.append(value)
            return make(value, *arguments, **keywords)

        return wrapped

    for make in MADE:
        monkeypatch.setattr(torch, make.__name__, counting(make))
    return found


class Eye(nn.Module):
    """An image network of one block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3)])

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks[0](images)


class MetaBatch(Batch):
    """Rows on the meta device; draws, which real runs copy from pinned memory without waiting, are made there."""

    def _mine(self, rows: Tensor) -> Tensor:
        return torch.empty(rows.shape, dtype=rows.dtype, device=self.device)

    def integers(self, name: str, high: int) -> Tensor:
        return torch.empty(self.size, dtype=torch.int64, device=self.device)


def on_meta(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")


def batch_of(method: Any, traced: Any, step: int, size: int = 2) -> Batch:
    shapes = {name: (size, *shape) for name, shape in traced.conditioning.items()}
    whole = traced.entry == "class_labels"
    cond, null = ({name: on_meta(shape) for name, shape in shapes.items()} for _ in range(2))
    if whole:
        cond, null = ({name: rows.long() for name, rows in one.items()} for one in (cond, null))
    batch = MetaBatch(0, step, 0, size, traced.latent_shape, cond, null, device="meta")
    needs = method.data_needs(method.config)
    if needs.images:
        batch.latents = on_meta((size, *traced.latent_shape))
    if needs.paths is not None:
        points = needs.paths.steps + 1 if needs.paths.keep == "all" else 2
        times = torch.empty(points, dtype=torch.float64, device="meta")
        batch.path = PathRows(on_meta((size, points, *traced.latent_shape)), times, cond, null, on_meta((size,)))
    return batch


def method_on_meta(name: str, traced: Any, monkeypatch: Any, train: str = "full") -> Any:
    """The method on a traced teacher, all of it on the meta device."""
    steps = 1 if name == "emd" else 2
    images = {"images": "fashion-mnist"} if METHODS[name].data_needs(_config(name)).images else {}
    recipe = load(
        {
            "teacher": {"pipeline": "fashion-dit", "guidance": {"scale": 2.0}},
            "student": {"steps": steps, "train": train},
            "data": {"conditions": ["one"]} | images,
            "method": {"name": name} | SETTINGS.get(name, {}),
            "train": {"steps": 9, "batch_size": 2, "lr": 1e-4},
        }
    )
    method_class, config = recipe.method.implementation, recipe.method.config
    sampler = SAMPLERS[method_class.sampler_of(config)](traced.denoiser.schedule, traced.pipeline.scheduler, steps)
    method = make_method(recipe, traced, sampler, 2.0, torch.device("cpu"))
    if name in ON_PIXELS:
        method.roles.decode(torch.zeros(1, *traced.latent_shape))  # the layout is learned by a call
        traced.pipeline.vae.to("meta")
    looking = ImageFeatures(Eye(), 8, [0.5] * 3, [0.5] * 3)
    monkeypatch.setattr("stepdistill.methods.parts.gan.image_features", lambda *_: looking)
    for _, role in method.roles.items():
        role.network.to("meta")
    for module in method.extra_modules().values():
        module.to("meta") if module is not None else None
    method.prepare(batch_of(method, traced, 0))
    return method


def _config(name: str) -> Any:
    return METHODS[name].Config.model_validate(SETTINGS.get(name, {}))


def copies(method: Any, traced: Any, made: list[Any]) -> dict[str, list[str]]:
    """What is copied in a step of each player, after a first one that fills what is kept."""
    found: dict[str, list[str]] = {}
    for step in (3, 3):
        batch = batch_of(method, traced, step)
        found.clear()
        for turn, player in enumerate(method.turns(step)):
            batch.turn = turn
            made.clear()
            with HostCopies() as mode:
                method.losses(player, batch)
            found.setdefault(player, []).extend([*mode.found, *map(str, made)])
    return found


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_loss_on_a_table_of_noise_levels_copies_anything(name, made, monkeypatch):
    traced = copy.deepcopy(seen(tiny_sd if name in ON_PIXELS else dit_of_one_block))
    method = method_on_meta(name, traced, monkeypatch)
    found = copies(method, traced, made)
    assert found == {player: [] for player in method.turns(3)}


@pytest.mark.parametrize("name", ["dmd2", "lcm", "tbcm", "pcm", "ladd"])
def test_no_loss_of_an_adapter_on_a_flow_copies_anything(name, made, monkeypatch):
    traced = copy.deepcopy(seen(tiny_sd3))
    assert isinstance(traced.denoiser.schedule, FlowSchedule)
    method = method_on_meta(name, traced, monkeypatch, train="lora")
    found = copies(method, traced, made)
    assert found == {player: [] for player in method.turns(3)}


def test_the_count_sees_a_copy():
    with HostCopies() as mode:
        torch.ones(3).to("meta")
        on_meta((2,)).copy_(torch.ones(2))
    assert mode.found == ["(3,) cpu -> meta", "(2,) cpu -> meta"]
