"""Weights that the processes of a run share out among themselves: torch's fully_shard (FSDP2) on the roles' networks.

Each process keeps its part of every tensor, and a block's weights are put together while it runs. Roles that stand on
one backbone share out one backbone; adapters and a method's heads are small and stay copies, as do encoders.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from stepdistill.adapters import Adapted
from stepdistill.data.batch import Batch
from stepdistill.denoiser import Denoiser, innermost
from stepdistill.errors import InputError
from stepdistill.methods.base import DistillMethod
from stepdistill.parts import is_shard


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of ``network`` whose weights are put together and let go of one at a time: the members of its outermost
    lists of modules, and a UNet's middle. What is outside of them is a part of its own."""
    found: list[nn.Module] = []
    inside: list[str] = []
    for name, module in network.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, nn.ModuleList):
            inside.append(name)
            found += module
        elif name.split(".")[-1] == "mid_block":
            inside.append(name)
            found.append(module)
    return [module for module in found if next(nn.Module.parameters(module), None) is not None]


def weights(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network without those of the adapters on it."""
    return [p for name, p in nn.Module.named_parameters(network) if ".lora_" not in name]


def is_whole(network: nn.Module) -> bool:
    """Whether a role trains all weights of the network that it stands on, and not an adapter or nothing."""
    shown = {id(parameter) for parameter in network.parameters()}
    return all(id(parameter) in shown for parameter in weights(innermost(network)))


class Shards:
    """The networks of a run whose weights are shared out; none in a run of copies, and nothing here does anything.

    Args:
        networks: what :func:`share_out` was called on.
    """

    def __init__(self, networks: Iterable[nn.Module] = ()):
        self.networks = list(networks)

    def __bool__(self) -> bool:
        return bool(self.networks)

    def settle(self) -> None:
        """Let go of weights that are still put together: they would not follow an update, or another moving player."""
        for network in self.networks:
            for module in network.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def share_out(method: DistillMethod, batch: Batch, device: torch.device) -> Shards:
    """Share out the networks that the method's roles stand on, among all processes; each keeps its parts on ``device``.

    Args:
        batch: any rows; the teacher, which has to be on ``device`` already, is called on them once.

    Raises:
        InputError: a network or torch do not allow it.
    """
    if torch.__version__ < (2, 7):  # before, it leaves no parameter out, and does not run on CPUs
        raise InputError(f"distributed.shard: expected torch 2.7 or newer, found {torch.__version__}")
    roles = [role for role in vars(method.roles).values() if isinstance(role, Denoiser)]
    if any(isinstance(role.network, Adapted) for role in roles):
        raise InputError("distributed.shard: expected false for a method that adds to its networks")
    networks = dict.fromkeys(innermost(role.network) for role in roles)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    teacher, times = method.roles.teacher, torch.full((batch.size,), 0.5, device=device)
    with _strangers(innermost(teacher.network)) as found, torch.no_grad():
        # Through another view of the same network, so that nobody counts the call.
        teacher.on(teacher.network)(batch.noise("start"), times, batch.cond)
    names = [name for name, module in innermost(teacher.network).named_modules() if module in found]
    for network in networks:
        adapters = set(nn.Module.parameters(network)) - set(weights(network))
        members = blocks(network)
        for module in (*map(network.get_submodule, names), *members, network):
            passing = module in members
            fully_shard(module, mesh=mesh, reshard_after_forward=passing, ignored_params=adapters)
            # A block is put together again when a gradient comes to its output. That of a whole network may not be
            # asked for one, where hidden states are: what is outside of blocks stays until the turn is over.
            module.set_reshard_after_backward(passing, recurse=False)
    return Shards(networks)


@contextmanager
def _strangers(network: nn.Module) -> Iterator[list[nn.Module]]:
    """Inside, the modules of blocks that are called while their block does not run, outermost ones alone.

    DiT asks its first block's embedder for the embedding of time; it has to be put together on its own.
    """
    running: set[nn.Module] = set()
    found: list[nn.Module] = []

    def look(module: nn.Module, block: nn.Module) -> None:
        known = {inner for one in found for inner in one.modules()}
        if block not in running and module not in known and weights(module):
            found.append(module)

    with ExitStack() as hooks:
        for block in blocks(network):
            hooks.callback(block.register_forward_pre_hook(lambda module, _: running.add(module)).remove)
            hooks.callback(block.register_forward_hook(lambda module, *_: running.discard(module)).remove)
            for module in block.modules():
                if module is not block:
                    hook = module.register_forward_pre_hook(lambda module, _, block=block: look(module, block))
                    hooks.callback(hook.remove)
        yield found


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients to a norm of at most ``most``; returns the norm () that they had, over all processes."""
    parameters = list(parameters)
    shards = [p for p in parameters if is_shard(p)]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, most)
    copies = [p.grad for p in parameters if not is_shard(p) and p.grad is not None]
    parts = [p.grad.to_local() for p in shards if p.grad is not None]
    squares = sum((part.float().square().sum() for part in parts), torch.zeros((), device=shards[0].device))
    torch.distributed.all_reduce(squares)
    norm = (squares + sum(copy.float().square().sum() for copy in copies)).sqrt()
    scale = (most / (norm + 1e-6)).clamp_max(1)
    for gradient in (*parts, *copies):
        gradient.mul_(scale)
    return norm
