"""Weights that the processes of a run share out among themselves (FSDP): each keeps its part of every tensor."""

from torch import nn

from stepdistill.pipeline.denoiser import innermost


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
