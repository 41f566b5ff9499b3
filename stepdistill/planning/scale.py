"""What a recipe needs of each GPU's memory where several share the batch, with copies and with shards of the weights.

Counted on shapes alone, as in :mod:`.plan`, with the rows that one GPU will have.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from stepdistill.diffusion.denoiser import innermost
from stepdistill.errors import InputError
from stepdistill.methods.base import DistillMethod
from stepdistill.planning.plan import GIB, RESERVE, Plan, blueprint_of, method_of, plan
from stepdistill.recipe import load
from stepdistill.training.shard import blocks, is_whole, weights


@dataclass(frozen=True)
class Stack:
    """The bytes of a network's parameters: all of them, those of its largest block, and those outside of blocks."""

    whole: int
    block: int
    rest: int


@dataclass(frozen=True)
class Estimate:
    """One GPU of several: the rows of the batch that it has, and its peak memory in bytes."""

    gpus: int
    shards: bool
    rows: int
    memory: float


def scale(recipe: str | Path, overrides: Sequence[str], counts: Sequence[int]) -> list[Estimate]:
    """An estimate with copies, and one with shards where the method allows them, for each number of GPUs.

    Raises:
        InputError: the recipe cannot be planned, or its batch cannot be divided.
    """
    resolved = load(recipe, overrides)
    method = method_of(resolved, blueprint_of(resolved))
    stacks = stacks_of(method).values()
    whole = [name for name, role in method.roles.items() if name != "teacher" and is_whole(role.network)]
    estimates = []
    for gpus in counts:
        rows, rest = divmod(resolved.train.batch_size, gpus)
        if rest or rows % resolved.train.accumulation:
            raise InputError(
                f"train.batch_size: expected a multiple of GPUs x train.accumulation ({gpus} x "
                f"{resolved.train.accumulation}), found {resolved.train.batch_size}"
            )
        local = plan(recipe, [*overrides, f"train.batch_size={rows}"])
        estimates.append(Estimate(gpus, False, rows, memory_of_copies(local, gpus)))
        if method.shards:
            estimates.append(Estimate(gpus, True, rows, memory_of_shards(local, stacks, whole, gpus)))
    return estimates


def memory_of_copies(local: Plan, gpus: int) -> float:
    """Bytes at one GPU's peak: the plan's, but gradients are exchanged through two flat copies of them."""
    fixed = sum(line.weights + line.optimizer + line.average for line in local.lines)
    exchange = 2 if gpus > 1 else 0
    turns = [line.gradients + max(line.activations, exchange * line.gradients) for line in local.lines]
    return max(local.encoding, fixed + max(turns))


def memory_of_shards(local: Plan, stacks: Collection[Stack], whole: Collection[str], gpus: int) -> float:
    """Bytes at one GPU's peak: 1/N of every network and of what belongs to players that train one whole, by name."""
    away = (gpus - 1) / gpus
    fixed = sum(line.weights + line.optimizer + line.average for line in local.lines)
    fixed -= away * sum(stack.whole for stack in stacks)
    fixed -= away * sum(line.optimizer + line.average for line in local.lines if line.name in whole)
    if gpus > 1:
        fixed += sum(stack.rest for stack in stacks)
    # The block that runs, the one that is fetched meanwhile, and the gradients of one that are still whole.
    block = max(stack.block for stack in stacks) if gpus > 1 else 0
    turns = []
    for line in local.lines:
        away_too, passing = (away, 3 * block) if line.name in whole else (0, 2 * block)
        turns.append(line.gradients * (1 - away_too) + line.activations + passing)
    return max(local.encoding, fixed + max(turns))


def stacks_of(method: DistillMethod) -> dict[nn.Module, Stack]:
    """The distinct networks that the roles stand on; adapters do not belong to them."""
    stacks = {}
    for _, role in method.roles.items():
        network = innermost(role.network)
        sizes, whole = [_bytes(block) for block in blocks(network)], _bytes(network)
        stacks[network] = Stack(whole, max(sizes, default=0), whole - sum(sizes))
    return stacks


def _bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in weights(network))


def as_text(estimates: Sequence[Estimate], gpu: float | None) -> str:
    """The table for people; ``gpu`` is the memory of a device in GiB."""
    lines = [["GPUs", "weights", "rows", "GiB"] + ([] if gpu is None else [f"{gpu:g} GiB"])]
    for one in estimates:
        line = [str(one.gpus), "shards" if one.shards else "copies", str(one.rows), f"{one.memory / GIB:.2f}"]
        lines.append(line + ([] if gpu is None else ["fits" if _fits(one, gpu) else "does not fit"]))
    return "\n".join("  ".join(f"{cell:>10}" for cell in line) for line in lines) + "\n\nrows and memory of one GPU"


def as_dict(estimates: Sequence[Estimate], gpu: float | None) -> dict[str, Any]:
    """The same for scripts; bytes."""
    rows = [asdict(one) | ({} if gpu is None else {"fits": _fits(one, gpu)}) for one in estimates]
    return {"schema": 2, "estimates": rows}


def _fits(one: Estimate, gpu: float) -> bool:
    return one.memory / GIB + RESERVE <= gpu
