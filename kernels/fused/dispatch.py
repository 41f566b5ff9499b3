"""Where a fused kernel runs and where its PyTorch reference does: decided here, for every operation."""

from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

# Triton is an optional dependency and has no wheels for some systems.
HAS_TRITON = find_spec("triton") is not None

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


def on_cuda(op: CustomOpDef, module: str, name: str) -> None:
    """Give ``op``, whose body is the reference, its Triton kernel on CUDA: ``name`` of ``module`` of this package."""
    if HAS_TRITON:

        @op.register_kernel("cuda")
        def launch(*arguments: Any) -> Any:
            # Triton launches on the current device, wherever the tensors lie.
            with torch.cuda.device(next(value.device for value in arguments if isinstance(value, Tensor))):
                return getattr(import_module(f"stepdistill.kernels.{module}"), name)(*arguments)


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
