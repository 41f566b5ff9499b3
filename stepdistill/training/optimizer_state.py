"""What an optimizer keeps: how many bytes, and as tensors for a checkpoint."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.roles.parts import shard_like
from stepdistill.training.optimizer import CLASSES

_KIND = "kind."
# Numbers of the whole run that these keep in their groups of parameters.
_RUNNING = {"Prodigy": ("d", "d_max", "d_numerator", "k"), "AdamWScheduleFree": ("k", "weight_sum", "lr_max")}


def state_bytes(name: str, shapes: Iterable[Sequence[int]], slice_p: int = 1) -> int:
    """Bytes that the optimizer of this name keeps beside float32 parameters of these shapes.

    Args:
        slice_p: Prodigy's.
    """
    return int(sum(_state_bytes(name, shape, math.prod(shape), slice_p) for shape in shapes))


def _state_bytes(name: str, shape: Sequence[int], count: int, slice_p: int) -> float:
    if name == "adafactor" and len(shape) > 1:  # means of rows and columns
        return 4 * (count // shape[-1] + count // shape[-2])
    if name in ("adafactor", "lion") or (name == "muon" and len(shape) == 2):
        return 4 * count
    if name == "prodigy":  # AdamW's, and two numbers of every slice_p-th parameter
        return 8 * count + 8 * math.ceil(count / slice_p)
    # Adam's two moments, or z and the second; in 8 bits with a scale in float32 for each 256.
    return 2 * count * (1 + 4 / 256 if name == "adamw8bit" else 4)


def state_bytes_of(optimizer: torch.optim.Optimizer) -> int:
    """The same of a recipe's optimizer, also before its first step."""
    groups, kind = optimizer.param_groups, type(optimizer).__name__
    name = next((name for name, (_, path, _) in CLASSES.items() if path.split(".")[-1] == kind), "adamw")
    return state_bytes(name, [p.shape for group in groups for p in group["params"]], groups[0].get("slice_p", 1))


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors, keyed by the parameter's position, and the running numbers of its groups;
    learning rates follow from the recipe."""
    kind = type(optimizer).__name__
    # The file of AdamW's state, the first there was, has no mark.
    tensors = {} if kind == "AdamW" else {f"{_KIND}{kind}": torch.zeros(1)}
    for i, group in enumerate(optimizer.param_groups):
        for key in _RUNNING.get(kind, ()):
            dtype = torch.int64 if isinstance(group[key], int) else torch.float64  # all digits of a Python number
            tensors[f"group-{i}.{key}"] = torch.tensor(group[key], dtype=dtype)
    for i, state in optimizer.state_dict()["state"].items():
        # bitsandbytes puts some of a parameter's state into a dict of its own, and takes it without.
        nested = (more for more in state.values() if isinstance(more, dict))
        flat = {key: value for one in (state, *nested) for key, value in one.items() if not isinstance(value, dict)}
        tensors |= {f"{i}.{key}": torch.as_tensor(value) for key, value in flat.items()}
    return tensors


def restore(
    optimizer: torch.optim.Optimizer, read: Callable[[Callable[[str], Tensor | None]], dict[str, Tensor]]
) -> None:
    """Give an optimizer the state that :func:`state_tensors` has made.

    Args:
        read: (what is to be filled, by name) -> the tensors by name.

    Raises:
        InputError: it is another optimizer's.
    """
    parameters = {str(i): p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    states: dict[int, dict[str, Tensor]] = {}
    stored, own = read(lambda key: parameters.get(key.partition(".")[0])), type(optimizer).__name__
    kind = next((key.removeprefix(_KIND) for key in stored if key.startswith(_KIND)), "AdamW")
    # Earlier versions did not mark the state of AdamW8bit.
    if kind != own and (kind, own) != ("AdamW", "AdamW8bit"):
        raise InputError(f"resume: expected a checkpoint with the state of {own}, this recipe's, found that of {kind}")
    stored.pop(f"{_KIND}{kind}", None)
    for key, value in stored.items():
        index, _, entry = key.partition(".")
        if index.startswith("group-"):
            optimizer.param_groups[int(index.removeprefix("group-"))][entry] = value.item()
        else:
            # A count of steps that is no floating tensor was a plain number (bitsandbytes').
            if value.ndim == 0 and not value.is_floating_point():
                value = value.item()
            elif entry != "step":
                value = shard_like(value, parameters.get(index))
            states.setdefault(int(index), {})[entry] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
