"""What a recipe takes on several GPUs that are not at hand: memory of each, traffic, and the time of an update.

The recipe's method runs on shapes alone, as in :mod:`stepdistill.plan`, with the rows that one GPU will have; how often
each network is called, with and without gradients, is counted. From there on it is arithmetic (docs/scaling.md):

    N GPUs, B bytes through a ring:
        to sum them up for all (all-reduce), every GPU sends                              2 (N-1)/N B
        to put them together (all-gather), or to sum and deal them out (reduce-scatter)     (N-1)/N B
    copies:  the gradients of the moving player are summed up, once a turn
    shards:  every network's weights are put together before each call and before its backward pass, the moving
             player's gradients summed and dealt out after it, for each micro-batch; adapters and heads stay copies
    update:  seconds on one GPU / N  +  bytes sent / bandwidth
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill.blueprint import Blueprint
from stepdistill.data.batch import Batch
from stepdistill.denoiser import first_tensor, innermost
from stepdistill.errors import InputError
from stepdistill.methods.base import DistillMethod
from stepdistill.optimizer import only_moving
from stepdistill.plan import GIB, RESERVE, FirstBatch, Plan, batch_of, blueprint_of, method_of, plan
from stepdistill.recipe import Recipe, load
from stepdistill.sharding import blocks, is_whole, weights
from stepdistill.update_time import kinds_of_steps, seconds_alone

GB = 1e9


@dataclass(frozen=True)
class Links:
    """Bandwidths in GB/s and one direction: of one GPU inside its node, and of a whole node to the others.

    The defaults are a DGX H100's by its data sheet: NVLink 900 GB/s in both directions, and eight adapters of
    400 Gb/s for eight GPUs. What nccl-tests measures as bus bandwidth is nearer to the truth.
    """

    inside: float = 450.0
    between: float = 400.0
    node: int = 8

    def rate(self, gpus: int) -> float:
        """GB/s at which a ring of so many GPUs moves on: it enters and leaves every node once."""
        return self.inside if gpus <= self.node else min(self.inside, self.between)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a mean update puts through collectives, each counted whole, before the factor of the ring.

    Args:
        gradients: of the moving players. gathered: weights, before each call and backward pass, in one micro-batch.
        scattered: gradients of shards, in one micro-batch. copied: gradients of what stays a copy beside shards.
    """

    gradients: float
    gathered: float
    scattered: float
    copied: float

    def sent(self, gpus: int, shards: bool, accumulation: int = 1) -> float:
        """Bytes that every GPU sends in an update."""
        ring = (gpus - 1) / gpus
        if not shards:
            return 2 * ring * self.gradients
        return ring * (accumulation * (self.gathered + self.scattered) + 2 * self.copied)


@dataclass(frozen=True)
class Stack:
    """The bytes of a network's parameters: all of them, those of its largest block, and those outside of blocks."""

    whole: int
    block: int
    rest: int


@dataclass(frozen=True)
class Estimate:
    """One GPU's peak in bytes, bytes it sends in an update, and seconds; ``seconds`` (None: not measured) add up
    computing and exchange, ``overlapped`` is the longer of the two."""

    gpus: int
    shards: bool
    rows: int
    memory: float
    sent: float
    exchange: float
    seconds: float | None
    overlapped: float | None


def scale(
    recipe: str | Path, overrides: Sequence[str], counts: Sequence[int], links: Links, seconds: str | None = None
) -> list[Estimate]:
    """An estimate with copies and one with shards for each number of GPUs.

    Args:
        seconds: of an update on one GPU with the recipe's whole batch: a number, or a run folder that has measured it.

    Raises:
        InputError: the recipe cannot be planned, or its batch not be divided; or ``seconds`` are not to be had.
    """
    resolved = load(recipe, overrides)
    drawn = blueprint_of(resolved)
    method = method_of(resolved, drawn)
    kinds = kinds_of_steps(method, resolved.train.steps)
    alone = None if seconds is None else seconds_alone(seconds, kinds, resolved.train.batch_size)
    traffic, stacks = traffic_of(resolved, drawn, method, kinds), stacks_of(method).values()
    whole = [name for name in _role_names(method) if is_whole(getattr(method.roles, name).network)]
    found = []
    for gpus in counts:
        rows, rest = divmod(resolved.train.batch_size, gpus)
        if rest or rows % resolved.train.accumulation:
            raise InputError(
                f"train.batch_size: expected a multiple of GPUs x train.accumulation ({gpus} x "
                f"{resolved.train.accumulation}), found {resolved.train.batch_size}"
            )
        local = plan(recipe, [*overrides, f"train.batch_size={rows}"])
        for shards in (False, True) if method.shards else (False,):
            sent = traffic.sent(gpus, shards, resolved.train.accumulation)
            exchange = sent / (links.rate(gpus) * GB)
            parts = None if alone is None else (alone / gpus, exchange)
            both = parts and sum(parts)
            memory = memory_of_shards(local, stacks, whole, gpus) if shards else memory_of_copies(local, gpus)
            best = parts and (max(parts) if shards else both)
            found.append(Estimate(gpus, shards, rows, memory, sent, exchange, both, best))
    return found


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
    for name in ("teacher", *_role_names(method)):
        network = innermost(getattr(method.roles, name).network)
        sizes, whole = [_bytes(block) for block in blocks(network)], _bytes(network)
        stacks[network] = Stack(whole, max(sizes, default=0), whole - sum(sizes))
    return stacks


def traffic_of(
    recipe: Recipe, drawn: Blueprint, method: DistillMethod, kinds: Mapping[tuple[str, ...], float]
) -> Traffic:
    """The mean over all steps, and over the student's first and last step as the ones that are trained."""
    stacks, steps = stacks_of(method), {}
    for step in range(recipe.train.steps):
        steps.setdefault(tuple(method.turns(step)), step)
    one = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": 1, "accumulation": 1})})
    gradients = gathered = scattered = copied = 0.0
    for turns, share in kinds.items():
        for kind in (FirstBatch, _LastBatch):
            batch, weight = batch_of(one, drawn, method, steps[turns], 0, kind), share / 2
            for turn, player in enumerate(turns):
                batch.turn = turn
                modules = method.modules(player)
                parameters = [p for module in modules for p in module.parameters()]
                half = torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16")
                with only_moving(parameters), half, _calls(stacks) as (forward, backward):
                    method.losses(player, batch)
                own = 4 * sum(p.numel() for p in parameters)
                sharded = {innermost(module) for module in modules if is_whole(module)} & stacks.keys()
                whole = 4 * sum(_count(network) for network in sharded)
                gradients += weight * own
                gathered += weight * sum(stacks[network].whole * n for network, n in (forward + backward).items())
                scattered += weight * 4 * sum(_count(network) * backward[network] for network in sharded)
                copied += weight * (own - whole)
    return Traffic(gradients, gathered, scattered, copied)


class _LastBatch(Batch):
    """A batch whose samples are the student's last step, at the end of its own rollout."""

    def integer(self, name: str, high: int) -> int:
        return high - 1

    def pick(self, name: str, shares: Sequence[float]) -> int:
        # Of the first step and this one the mean is what counts.
        return min(len(shares) - 1, round(2 * sum(position * share for position, share in enumerate(shares))))


@contextmanager
def _calls(networks: Iterable[nn.Module]) -> Iterator[tuple[Counter[nn.Module], Counter[nn.Module]]]:
    """Inside, calls of each network are counted: all of them, and those that a backward pass will go through."""
    forward: Counter[nn.Module] = Counter()
    backward: Counter[nn.Module] = Counter()

    def count(network: nn.Module, _inputs: Any, output: Any) -> None:
        forward[network] += 1
        backward[network] += first_tensor(output).requires_grad

    with ExitStack() as hooks:
        for network in networks:
            hooks.callback(network.register_forward_hook(count).remove)
        yield forward, backward


def _role_names(method: DistillMethod) -> list[str]:
    return ["student", *method.extra_roles]


def _bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in weights(network))


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in weights(network))


def links_of(text: str) -> Links:
    """Links from "inside,between,node".

    Raises:
        InputError: these are not three positive numbers.
    """
    parts = text.split(",")
    try:
        links = Links(float(parts[0]), float(parts[1]), int(parts[2]))
    except (ValueError, IndexError):
        links = None
    if links is None or len(parts) != 3 or min(asdict(links).values()) <= 0:
        raise InputError(f"--links: expected GB/s inside a node, between nodes, and GPUs of a node, found '{text}'")
    return links


def as_text(estimates: Sequence[Estimate], links: Links, gpu: float | None) -> str:
    """The table for people."""
    titles = ["GPUs", "weights", "rows", "GiB", "sent GB", "exchange s"]
    lines = []
    for one in estimates:
        line = [str(one.gpus), "shards" if one.shards else "copies", str(one.rows), f"{one.memory / GIB:.2f}"]
        line += [f"{one.sent / GB:.3f}", f"{one.exchange:.4f}"]
        if one.seconds is not None:
            line += [f"{one.seconds:.4f}", f"{one.overlapped:.4f}"]
        if gpu is not None:
            line.append("fits" if _fits(one, gpu) else "does not fit")
        lines.append(line)
    titles += [] if estimates[0].seconds is None else ["update s", "overlapped"]
    titles += [] if gpu is None else [f"{gpu:g} GiB"]
    rows = ["  ".join(f"{cell:>10}" for cell in line) for line in (titles, *lines)]
    rows += ["", "rows, memory and traffic are one GPU's; update: one after the other, overlapped: at once"]
    rows += [
        f"links: {links.inside:g} GB/s inside a node of {links.node}, {links.between:g} GB/s from a node to others"
    ]
    return "\n".join(rows)


def as_dict(estimates: Sequence[Estimate], links: Links, gpu: float | None) -> dict[str, Any]:
    """The same for scripts; bytes and seconds."""
    rows = [asdict(one) | ({} if gpu is None else {"fits": _fits(one, gpu)}) for one in estimates]
    return {"schema": 1, "links": asdict(links), "estimates": rows}


def _fits(one: Estimate, gpu: float) -> bool:
    return one.memory / GIB + RESERVE <= gpu
