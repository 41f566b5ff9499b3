"""The optimizers that a recipe can name: AdamW, or AdamW with its moments in 8 bits; their rate; whose turn it is."""

import importlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stepdistill.errors import InputError
from stepdistill.parts import is_shard
from stepdistill.recipe import Train


def make_optimizer(parameters: Iterable[nn.Parameter], train: Train, lr: float) -> torch.optim.Optimizer:
    """The recipe's optimizer of one player.

    Raises:
        InputError: adamw8bit without the library that has it.
    """
    options = {"lr": lr, "betas": tuple(train.betas), "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        parameters = list(parameters)
        # One call updates shards or copies; a player's heads come after its network, so their order stays.
        groups = [p for p in parameters if is_shard(p)], [p for p in parameters if not is_shard(p)]
        return torch.optim.AdamW([{"params": group} for group in groups if group], **options, fused=True)
    try:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit(parameters, **options)
    except ImportError as error:
        raise InputError(
            f"train.optimizer: adamw8bit needs bitsandbytes (pip install bitsandbytes), found: {error}"
        ) from None


def learning_rate(train: Train, step: int, peak: float) -> float:
    """The rate at ``step``: warmed up to ``peak``, then as the recipe says."""
    if step < train.lr_warmup:
        return peak * (step + 1) / train.lr_warmup
    if train.lr_decay == "constant":
        return peak
    done = (step - train.lr_warmup) / max(1, train.steps - train.lr_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def only_moving(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters and no others of the run receive gradients."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
