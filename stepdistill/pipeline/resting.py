"""Networks that rest in the host's memory: they come to the device when they are called, and go back on request."""

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import CpuOffload, remove_hook_from_module
from torch import nn

from stepdistill.pipeline.components import modules, patched


def place(pipeline: Any, device: torch.device, at_rest: Collection[str]) -> None:
    """Move a pipeline to a device; the networks ``at_rest`` come there when they are called."""
    resting = [network for name, network in modules(pipeline).items() if name in at_rest]
    with ExitStack() as stack:
        for network in resting:
            stack.enter_context(patched(network, "to", lambda *_, network=network, **__: network))
        pipeline.to(device)
    for network in resting:
        cpu_offload_with_hook(network, device)


def rest(pipeline: Any) -> None:
    """Send the networks that came for a call back to the host's memory."""
    for network in modules(pipeline).values():
        if isinstance(getattr(network, "_hf_hook", None), CpuOffload):
            network.to("cpu")


def stay(network: nn.Module) -> None:
    """End the rest of a network, which is on the device from now on; any other is left as it is."""
    if isinstance(hook := getattr(network, "_hf_hook", None), CpuOffload):
        remove_hook_from_module(network)
        network.to(hook.execution_device)
