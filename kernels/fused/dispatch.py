"""Dispatch: whether an operation runs its fused kernel or its PyTorch reference."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

try:  # an optional dependency, without wheels for some systems
    import triton  # noqa: F401
except ImportError:
    HAS_TRITON = False
else:
    HAS_TRITON = True

TYPES = (torch.float32, torch.bfloat16, torch.float16)

Coefficient = Tensor | float
"""A number, or one per sample (B,)."""


def fusible(*tensors: Tensor | None) -> bool:
    """Whether a kernel may take these tensors: Triton is there, all lie on a CUDA device, none is float64."""
    return HAS_TRITON and all(value.is_cuda and value.dtype in TYPES for value in tensors if value is not None)


def differentiated(*values: Tensor | float | None) -> bool:
    """Whether autograd wants to go through any of ``values``."""
    tensors = (value for value in values if isinstance(value, Tensor))
    return torch.is_grad_enabled() and any(value.requires_grad for value in tensors)


def operation(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Makes a function the operation ``torch.ops.stepdistill.NAME``; torch.compile sees the kernels inside."""

    def made(function: Callable[..., Any]) -> CustomOpDef:
        # triton_op imports torch's compiler, 2 s of CPU; counting devices does not start CUDA.
        if HAS_TRITON and torch.cuda.device_count():
            return torch.library.triton_op(f"stepdistill::{name}", function, mutates_args=mutates_args)
        op = torch.library.custom_op(f"stepdistill::{name}", function, mutates_args=mutates_args)
        op.register_fake(function)
        return op

    return made


def launches(sample: Tensor) -> bool:
    """Whether an operation on ``sample`` launches its Triton kernel; elsewhere it is the reference."""
    return HAS_TRITON and sample.is_cuda


def broadcast(value: Coefficient, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A coefficient shaped to multiply ``like`` (B, ...)."""
    if not isinstance(value, Tensor):
        # A fill, where as_tensor would copy the number from the host and wait for it.
        value = torch.full((), value, dtype=dtype, device=like.device)
    return value.to(like.device, dtype).reshape(-1, *[1] * (like.ndim - 1))


def per_row(value: Coefficient, like: Tensor) -> Tensor:
    """A coefficient as float32 (B,) beside ``like``; a number is filled in there, which CUDA graphs can capture."""
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=torch.float32, device=like.device)
    return value.to(like.device, torch.float32).expand(len(like))


def common_type(*tensors: Tensor | None) -> torch.dtype:
    """The type that the result of an operation on ``tensors`` has."""
    return reduce(torch.promote_types, (value.dtype for value in tensors if value is not None))
