"""Profile of training steps: a Chrome trace, and a table of seconds by role and by turn."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.files import cache_folder
from stepdistill.recipe import Recipe, load
from stepdistill.training.distributed import join
from stepdistill.training.layout import RunFolder
from stepdistill.training.session import build
from stepdistill.training.trainer import Trainer

WARM_UP = 2
# What the CUDA runtime calls the launches and the waits.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class HostReads(TorchDispatchMode):
    """Counts, while it is on, the numbers that Python reads from tensors; on a device each is a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def profile_training(
    recipe: str | Path | dict[str, Any] | Recipe, steps: int, overrides: Sequence[str] = ()
) -> tuple[Path, dict[str, Any]]:
    """Profile ``steps`` training steps from the teacher, after three unmeasured ones; no checkpoint is written.

    Returns:
        The folder ``profile`` in the run folder, with trace.json (chrome://tracing, Perfetto) and profile.json; and
        what profile.json says: rows of name, seconds (of the host), device_seconds and calls, a step each, for every
        role's forward passes and every player's turn; kernel launches, host syncs and host reads a step; and the MiB
        of each role's weights and each player's optimizer.

    Raises:
        InputError: the recipe, the teacher or the data are not usable.
    """
    recipe = load(recipe, overrides)
    accelerator = join()
    folder = RunFolder(recipe.output).profile
    trainer = Trainer(build(recipe, accelerator.device, cache=cache_folder()), accelerator, folder.parent)
    activities = [ProfilerActivity.CPU]
    if accelerator.device.type != "cpu":
        activities.append(getattr(ProfilerActivity, accelerator.device.type.upper()))
    with _marked(_roles(trainer)):
        for step in range(WARM_UP):
            trainer.step(step)
        with HostReads() as reads:  # not the first step: nothing is compiled under a dispatch mode
            trainer.step(WARM_UP)
        with profile(activities=activities) as profiler:
            for step in range(WARM_UP + 1, WARM_UP + 1 + steps):
                trainer.step(step)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    facts = _facts(profiler.key_averages(), trainer, steps) | {"host_reads": reads.count}
    (folder / "profile.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return folder, facts


def _roles(trainer: Trainer) -> dict[str, nn.Module]:
    return {name: role.network for name, role in trainer.method.roles.items()}


@contextmanager
def _marked(roles: dict[str, nn.Module]) -> Iterator[None]:
    """Inside, every forward pass of a role has its name in the profile; the trainer names the players' turns."""
    ranges: list[record_function] = []

    def enter(label: str) -> None:
        ranges.append(record_function(label))
        ranges[-1].__enter__()

    hooks = []
    for name, network in roles.items():
        hooks.append(network.register_forward_pre_hook(lambda *_, label=f"forward of {name}": enter(label)))
        hooks.append(network.register_forward_hook(lambda *_: ranges.pop().__exit__(None, None, None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _facts(averages: Any, trainer: Trainer, steps: int) -> dict[str, Any]:
    rows = [
        {
            "name": event.key,
            "seconds": event.cpu_time_total / 1e6 / steps,
            "device_seconds": event.device_time_total / 1e6 / steps,
            "calls": event.count / steps,
        }
        for event in averages
        # On a device every range has a second event there, without time of the host.
        if event.key.startswith(("forward of ", "turn of ")) and event.cpu_time_total
    ]

    def counted(*names: str) -> float:
        return sum(event.count for event in averages if event.key.startswith(names)) / steps

    weights = {name: _mib(network.parameters()) for name, network in _roles(trainer).items()}
    states = {
        player: _mib(v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
        for player, optimizer in trainer.optimizers.items()
    }
    return {
        "steps": steps,
        "rows": sorted(rows, key=lambda row: -row["seconds"]),
        "kernel_launches": counted(*LAUNCHES),
        "host_syncs": counted(*WAITS),
        "weights_mib": weights,
        "optimizer_mib": states,
    }


def _mib(tensors: Any) -> float:
    return round(sum(value.numel() * value.element_size() for value in tensors) / 2**20, 3)


def table(facts: dict[str, Any]) -> str:
    """What :func:`profile_training` found, as text; milliseconds and counts a step."""
    lines = [f"{'a step':24} {'host ms':>10} {'device ms':>10} {'calls':>7}"]
    for row in facts["rows"]:
        host, device = 1e3 * row["seconds"], 1e3 * row["device_seconds"]
        lines.append(f"{row['name']:24} {host:10.2f} {device:10.2f} {row['calls']:7.1f}")
    for name in ("kernel_launches", "host_syncs", "host_reads"):
        lines.append(f"{name.replace('_', ' '):24} {facts[name]:10.1f}")
    for name, mib in facts["weights_mib"].items():
        lines.append(f"{'weights of ' + name:24} {mib:10.1f} MiB")
    for name, mib in facts["optimizer_mib"].items():
        lines.append(f"{'optimizer of ' + name:24} {mib:10.1f} MiB")
    return "\n".join(lines)
