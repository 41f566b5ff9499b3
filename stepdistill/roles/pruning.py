"""A student with fewer blocks than its teacher: a network of the same class whose weights are copies of kept blocks.

Which blocks a network has is stated by its own config (num_layers, layers_per_block, ...), so the student is built from
the teacher's config with changes. In each list of blocks that comes out shorter the kept ones are evenly spaced, the
first and the last among them, as in BK-SDM (Kim et al. 2023), where of a stage's layers those between are left out.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepdistill.errors import InputError, first_line, found, suggest


def pruned(teacher: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    """A network of the teacher's class and config, but for ``changes``, with the teacher's weights; in float32.

    Args:
        teacher: a diffusers network.
        changes: keys of its config, such as {"num_layers": 14}.

    Raises:
        InputError: no such key, no such network, or one that is more than the teacher with blocks left out.
    """
    config, kind = teacher.config, type(teacher).__name__
    for key in changes:
        if key not in config or key.startswith("_"):
            raise InputError(f"student.config: {kind} has no key {key!r}{suggest(key, config)}")
    try:
        student = type(teacher).from_config({**config, **changes})
    except Exception as error:
        reason = first_line(error)
        raise InputError(f"student.config: {kind} cannot be built with {found(dict(changes))}: {reason}") from error
    weights, copied = teacher.state_dict(), {}
    for name, value in student.state_dict().items():
        source = _counterpart(name, student, teacher)
        shape = tuple(weights[source].shape) if source in weights else "nothing of that name"
        if shape != tuple(value.shape):
            raise InputError(
                "student.config: expected the teacher with blocks left out; "
                f"{name} has shape {tuple(value.shape)}, the teacher's {source} {shape}"
            )
        copied[name] = weights[source]
    student.load_state_dict(copied)
    return student


def _counterpart(name: str, student: nn.Module, teacher: nn.Module) -> str:
    """The name in the teacher of the student's parameter or buffer ``name``."""
    source = []
    for part in name.split("."):
        if isinstance(student, nn.ModuleList) and isinstance(teacher, nn.ModuleList):
            here, there = len(student), len(teacher)
            if here > there:
                raise InputError(f"student.config: expected at most {there} in {'.'.join(source)}, found {here}")
            source.append(str(round(int(part) * (there - 1) / max(1, here - 1))))
        else:
            source.append(part)
        student, teacher = getattr(student, part), getattr(teacher, source[-1], None)
    return ".".join(source)
