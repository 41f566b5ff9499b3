"""Optimizers, the learning-rate schedule, and :func:`only_moving`, which enables gradients for one player."""

import inspect
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from stepdistill.errors import InputError, in_a_line, suggest
from stepdistill.recipe import Train
from stepdistill.roles.parts import is_shard

CLASSES = {
    "adamw": ("torch", "optim.AdamW", "torch"),
    "adamw8bit": ("bitsandbytes", "optim.AdamW8bit", "bitsandbytes"),
    "adafactor": ("torch", "optim.Adafactor", "torch"),
    "muon": ("stepdistill.training.optimizer", "Muon", "'torch>=2.9'"),
    "prodigy": ("prodigyopt", "Prodigy", "prodigyopt"),
    "schedulefree": ("schedulefree", "AdamWScheduleFree", "schedulefree"),
    "lion": ("lion_pytorch", "Lion", "lion-pytorch"),
}
"""Where each optimizer of a recipe is, and what pip calls its package."""


def make_optimizer(parameters: Iterable[nn.Parameter], train: Train, player: str) -> torch.optim.Optimizer:
    """The recipe's optimizer of one player.

    Raises:
        InputError: its package is missing, or it does not take an argument.
    """
    chosen, parameters = train.optimizer_of(player), list(parameters)
    key = "train.optimizer" if player == "student" or train.critic_optimizer is None else "train.critic_optimizer"
    module, name, package = CLASSES[chosen.name]
    try:
        kind = attrgetter(name)(import_module(module))
        takes = inspect.signature(kind).parameters
        stated = {"lr": peak_rate(train, player), "betas": tuple(train.betas), "weight_decay": train.weight_decay}
        own = {argument: tuple(v) if isinstance(v, list) else v for argument, v in (chosen.model_extra or {}).items()}
        if unknown := own.keys() - takes.keys():
            known = takes.keys() - {*stated, "params"}
            meant = suggest(min(unknown), known) or f"; {chosen.name} takes {', '.join(sorted(known)) or 'none'}"
            raise InputError(f"{key}.{min(unknown)}: unknown argument{meant}")
        options = {argument: value for argument, value in stated.items() if argument in takes} | own
        with redirect_stdout(sys.stderr):  # Prodigy prints; stdout is for --json
            if chosen.name == "adamw":
                return _adamw(parameters, options)
            optimizer = kind(parameters, **options)
    except ImportError as error:
        raise InputError(f"{key}: {chosen.name} needs {package} (pip install {package}), found: {error}") from None
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{key}: {chosen.name} refuses {own}: {in_a_line(error)}") from None
    if chosen.name == "schedulefree":
        optimizer.train()
    return optimizer


def _adamw(parameters: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.AdamW:
    # One call updates shards or copies; a player's heads come after its network, so their order stays.
    groups = [p for p in parameters if is_shard(p)], [p for p in parameters if not is_shard(p)]
    return torch.optim.AdamW([{"params": group} for group in groups if group], **({"fused": True} | options))


def check_optimizers(train: Train) -> None:
    """Make the recipe's optimizers of a small matrix, before anything is loaded.

    Raises:
        InputError: see :func:`make_optimizer`.
    """
    for player in ("student", "critic"):
        make_optimizer([nn.Parameter(torch.zeros(2, 2))], train, player)


class Muon:
    """torch's Muon (Jordan 2024) of the matrices and AdamW of everything else, as one optimizer.

    Args:
        parameters: of one player.
        lr: of both; by default Muon's updates are scaled to AdamW's size (Liu et al. 2025).
        betas: AdamW's.
        weight_decay: of both.
        momentum: Muon's, as all that follow.

    Raises:
        ImportError: this torch has none.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
    ):
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(f"torch {torch.__version__}")
        parameters = list(parameters)
        matrices, others = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            own = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
            self.parts.append(torch.optim.Muon(matrices, **options, **own))
        if others:
            self.parts.append(torch.optim.AdamW(others, **options, betas=betas, fused=True))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both, Muon's first."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[nn.Parameter, Any]:
        """By parameter."""
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizers have it: states by position, and groups."""
        first, states, groups = 0, {}, []
        for part in self.parts:
            own = part.state_dict()
            states |= {first + i: state for i, state in own["state"].items()}
            groups += own["param_groups"]
            first += _count(part)
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Take the states of :meth:`state_dict`; groups stay as they are."""
        first = 0
        for part in self.parts:
            states = {i - first: state for i, state in stored["state"].items() if first <= i < first + _count(part)}
            part.load_state_dict({"state": states, "param_groups": part.state_dict()["param_groups"]})
            first += _count(part)


def _count(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def peak_rate(train: Train, player: str) -> float:
    """The learning rate of a player before warm-up and decay."""
    return train.lr if player == "student" else train.critic_lr


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
