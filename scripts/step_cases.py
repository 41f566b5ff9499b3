"""What scripts/bench_step.py measures: networks at a size with a batch of theirs, and a trainer of a method on them."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel, UNet2DModel
from plan_sizes import UNETS
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.samplers import SAMPLERS
from stepdistill.diffusion.schedule import FlowSchedule
from stepdistill.recipe import load
from stepdistill.roles.build import LoRA, build_roles
from stepdistill.training.trainer import Trainer

SCALE = 2.5
CLASSES = 10
METHOD_KEYS = {"dmd2": {"critic_steps": 1}, "lcm": {"solver_steps": 50}}


@dataclass
class Case:
    """A network of random weights and everything that a step on it needs; stands in for a built session."""

    denoiser: Denoiser
    shape: tuple[int, ...]
    condition: dict[str, Tensor]
    empty: dict[str, Tensor]
    size: int
    device: torch.device
    train: str = "full"
    recipe: Any = None
    method: Any = None
    latents: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.latents = torch.randn(self.size, *self.shape, device=self.device)

    def batch(self, step: int, first: int, size: int) -> Batch:
        batch = Batch(0, step, first, size, self.shape, self.condition, self.empty, device=self.device)
        batch.latents = self.latents
        return batch


def classes(network: nn.Module, sample: str, side: int, size: int, device: torch.device) -> Case:
    """A class-conditional network whose last class is the empty one."""
    spec = CallSpec(sample, "timestep", constants={"return_dict": False})
    labels = torch.arange(size, device=device) % CLASSES
    denoiser = Denoiser(network.to(device), spec, FlowSchedule(), "flow")
    empty = torch.full_like(labels, CLASSES)
    return Case(denoiser, (4, side, side), {"class_labels": labels}, {"class_labels": empty}, size, device)


def text(network: nn.Module, side: int, size: int, device: torch.device, pooled: bool) -> Case:
    """A text-conditional UNet; adapters instead of copies where it is large."""
    width = network.config.cross_attention_dim
    rows = [{"encoder_hidden_states": torch.randn(size, 77, width, device=device)} for _ in range(2)]
    for row in rows:
        if pooled:
            row["added_cond_kwargs.text_embeds"] = torch.randn(size, 1280, device=device)
            row["added_cond_kwargs.time_ids"] = torch.full((size, 6), 1024.0, device=device)
    spec = CallSpec("sample", "timestep", constants={"return_dict": False})
    denoiser = Denoiser(network.to(device), spec, FlowSchedule(), "flow")
    return Case(denoiser, (4, side, side), *rows, size, device, train="lora" if pooled else "full")


def make_case(name: str, size: int, device: torch.device, tiny: bool) -> Case:
    """The network of that name, with ``size`` samples a step; ``tiny`` shrinks it to a few layers for a dry run."""
    torch.manual_seed(0)
    width = 16 if tiny else 64
    narrow = {"block_out_channels": (32, 64, 64), "attention_head_dim": 4} if tiny else {}
    match name:
        case "unet":
            blocks = {"block_out_channels": (width, 2 * width), "norm_num_groups": 8, "layers_per_block": 1}
            kinds = {
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            }
            channels = {"in_channels": 4, "out_channels": 4, "num_class_embeds": CLASSES + 1, "attention_head_dim": 8}
            network = UNet2DModel(sample_size=8 if tiny else 16, **blocks, **kinds, **channels)
            return classes(network, "sample", 8 if tiny else 16, size, device)
        case "dit":
            heads = {"num_attention_heads": 2, "attention_head_dim": 2 * width, "num_layers": 2 if tiny else 4}
            side = 8 if tiny else 16
            network = DiTTransformer2DModel(
                **heads, in_channels=4, out_channels=4, sample_size=side, patch_size=1, num_embeds_ada_norm=CLASSES
            )
            return classes(network.eval(), "hidden_states", side, size, device)
        case "sd15":
            small = narrow | {"cross_attention_dim": 32, "block_out_channels": (32, 32, 64, 64)} if tiny else {}
            return text(UNet2DConditionModel(**(UNETS["sd15"] | small)), 8 if tiny else 64, size, device, False)
        case "sdxl":
            small = narrow | {"transformer_layers_per_block": 1, "cross_attention_dim": 32} if tiny else {}
            return text(UNet2DConditionModel(**(UNETS["sdxl"] | small)), 8 if tiny else 128, size, device, True)
    raise ValueError(f"expected unet, dit, sd15 or sdxl, found {name!r}")


def make_trainer(case: Case, method: str, precision: str, folder: Path, compiled: bool) -> Trainer:
    """The trainer of a recipe for this method, on the case's network."""
    train = {"steps": 10, "batch_size": case.size, "lr": 1e-5, "precision": precision, "tracker": "none"}
    case.recipe = load(
        {
            "teacher": {"pipeline": "fashion-dit", "guidance": {"scale": SCALE}},
            "student": {"steps": 4, "train": case.train},
            "data": {"images": "fashion-mnist"},
            "method": {"name": method, **METHOD_KEYS[method]},
            "train": train,
            "output": str(folder),
        }
    )
    kind, config = case.recipe.method.implementation, case.recipe.method.config
    names = ("student", *kind.extra_roles)
    roles = build_roles(case.denoiser, dict.fromkeys(names, case.train), SCALE, LoRA(32))
    sampler = SAMPLERS[kind.sampler_of(config)](case.denoiser.schedule, FlowMatchEulerDiscreteScheduler(), 4)
    for name in (*names, "teacher"):
        network = getattr(roles, name).network.to(case.device)
        if compiled:
            network.compile()
    case.method = kind(config, roles, sampler)
    return Trainer(case, Accelerator(), folder)


def copied(network: nn.Module) -> nn.Module:
    """A copy, compiled where ``network`` is: deepcopy leaves that behind."""
    new = copy.deepcopy(network)
    if network._compiled_call_impl is not None:
        new.compile()
    return new


def step_of_one_rollout(case: Case) -> int:
    """A step in which DMD2's student starts at the second point of its grid: one pass of rollout."""
    return next(step for step in range(100) if case.batch(step, 0, 1).integer("k", 4) == 1)


@contextmanager
def moving(parameters: list[nn.Parameter]):
    """Inside, these parameters receive gradients, which are dropped at the end."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    yield
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)
