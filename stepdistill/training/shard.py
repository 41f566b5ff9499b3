"""Sharding of the roles' networks over the processes of a run, by torch's fully_shard (FSDP2).

Each rank keeps a shard of every tensor; a block's weights are gathered while it runs. Roles on one backbone shard that
backbone once; adapters and a method's heads are small and stay copies, as do encoders.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import innermost
from stepdistill.errors import InputError
from stepdistill.methods.base import DistillMethod
from stepdistill.roles.added import Adapted
from stepdistill.roles.parts import is_shard


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of ``network`` that are gathered and resharded one at a time: the members of its outermost lists of
    modules, and a UNet's middle. Modules outside of them form one more part."""
    modules: list[nn.Module] = []
    inside: list[str] = []
    for name, module in network.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, nn.ModuleList):
            inside.append(name)
            modules += module
        elif name.split(".")[-1] == "mid_block":
            inside.append(name)
            modules.append(module)
    return [module for module in modules if next(nn.Module.parameters(module), None) is not None]


def weights(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network without those of the adapters on it."""
    return [p for name, p in nn.Module.named_parameters(network) if ".lora_" not in name]


def is_whole(network: nn.Module) -> bool:
    """Whether a role trains all weights of the network that it stands on, and not an adapter or nothing."""
    own = {id(parameter) for parameter in network.parameters()}
    return all(id(parameter) in own for parameter in weights(innermost(network)))


class Shards:
    """The sharded networks of a run; empty in a run whose ranks hold copies, where every call here does nothing.

    Args:
        networks: those that :func:`share_out` sharded.
    """

    def __init__(self, networks: Iterable[nn.Module] = ()):
        self.networks = list(networks)

    def __bool__(self) -> bool:
        return bool(self.networks)

    def settle(self) -> None:
        """Reshard all FSDP modules: gathered copies would be stale after an optimizer step or a change of player."""
        for network in self.networks:
            for module in network.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def share_out(method: DistillMethod, batch: Batch, device: torch.device) -> Shards:
    """Shard the networks of the method's roles over all ranks; each rank keeps its shards on ``device``.

    Args:
        batch: any rows; the teacher, which has to be on ``device`` already, is called on them once.

    Raises:
        InputError: a network or torch do not allow it.
    """
    if torch.__version__ < (2, 7):  # before, it leaves no parameter out, and does not run on CPUs
        raise InputError(f"distributed.shard: expected torch 2.7 or newer, found {torch.__version__}")
    roles = [role for _, role in method.roles.items()]
    if any(isinstance(role.network, Adapted) for role in roles):
        raise InputError("distributed.shard: expected false for a method that adds to its networks")
    if any(role.takes_turns for role in roles):  # processes that gather different weights would wait for each other
        raise InputError("distributed.shard: expected false for networks that take turns")
    networks = dict.fromkeys(innermost(role.network) for role in roles)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    teacher, times = method.roles.teacher, torch.full((batch.size,), 0.5, device=device)
    with _outside_calls(innermost(teacher.network)) as outside, torch.no_grad():
        # Through another view of the same network, which leaves the count of evaluations alone.
        teacher.on(teacher.network)(batch.noise("start"), times, batch.cond)
    names = [name for name, module in innermost(teacher.network).named_modules() if module in outside]
    for network in networks:
        adapters = set(nn.Module.parameters(network)) - set(weights(network))
        members = blocks(network)
        for module in (*map(network.get_submodule, names), *members, network):
            passing = module in members
            fully_shard(module, mesh=mesh, reshard_after_forward=passing, ignored_params=adapters)
            # A block is gathered again when a gradient reaches its output. The output of the whole network may get
            # none where hidden states do: modules outside of blocks stay gathered until the turn is over.
            module.set_reshard_after_backward(passing, recurse=False)
    for name, role in method.roles.items():
        if name != "teacher" and is_whole(role.network):
            innermost(role.network).float()  # of files in half precision, until here
    return Shards(networks)


@contextmanager
def _outside_calls(network: nn.Module) -> Iterator[list[nn.Module]]:
    """Inside, the outermost modules of blocks that are called while their block does not run.

    DiT calls the embedder of time in its first block from outside; FSDP has to gather such a module on its own.
    """
    running: set[nn.Module] = set()
    outside: list[nn.Module] = []

    def look(module: nn.Module, block: nn.Module) -> None:
        known = {inner for one in outside for inner in one.modules()}
        if block not in running and module not in known and weights(module):
            outside.append(module)

    with ExitStack() as hooks:
        for block in blocks(network):
            hooks.callback(block.register_forward_pre_hook(lambda module, _: running.add(module)).remove)
            hooks.callback(block.register_forward_hook(lambda module, *_: running.discard(module)).remove)
            for module in block.modules():
                if module is not block:
                    hook = module.register_forward_pre_hook(lambda module, _, block=block: look(module, block))
                    hooks.callback(hook.remove)
        yield outside


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
