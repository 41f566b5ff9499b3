"""The hidden states of a network, by hooks on its blocks: what heads of a discriminator read."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

FEATURE_DEPTHS = 4


def hidden_states(network: nn.Module, run: Callable[[], Any], depths: int | None = FEATURE_DEPTHS) -> list[Tensor]:
    """What the feature blocks of ``network`` emit while ``run`` calls it, in order, with grad."""
    captured: list[Tensor] = []
    with ExitStack() as hooks:
        # Compiled code has no place for hooks that come later.
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for block in feature_blocks(network, depths):
            handle = block.register_forward_hook(lambda _module, _inputs, out: captured.append(_hidden(out)))
            hooks.callback(handle.remove)
        run()
    return captured


def feature_blocks(network: nn.Module, depths: int | None = FEATURE_DEPTHS) -> list[nn.Module]:
    """The blocks whose outputs are the network's features, in call order; at most ``depths``, None: all.

    Raises:
        ValueError: the network has no list of blocks.
    """
    lists: dict[str, nn.ModuleList] = {}
    middle: list[nn.Module] = []
    for name, module in network.named_modules():
        if any(name.startswith(f"{outer}.") for outer in lists):
            continue
        if isinstance(module, nn.ModuleList) and len(module):
            lists[name] = module
        elif name.split(".")[-1] == "mid_block":
            middle.append(module)
    if middle:
        down = [block for name, blocks in lists.items() if name.endswith("down_blocks") for block in blocks]
        return [*down, *middle][-(depths or 0) :]
    blocks = [block for name, blocks in lists.items() if name.endswith("blocks") for block in blocks]
    blocks = blocks or [block for blocks in lists.values() for block in blocks]
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no ModuleList of blocks to take features from")
    count = min(depths or len(blocks), len(blocks))
    return [blocks[(i + 1) * len(blocks) // count - 1] for i in range(count)]


def _hidden(output: Any) -> Tensor:
    """A block's image stream: its output, or the last tensor of a tuple (text stream first, residuals nested)."""
    if isinstance(output, Tensor):
        return output
    return [value for value in output if isinstance(value, Tensor)][-1]
