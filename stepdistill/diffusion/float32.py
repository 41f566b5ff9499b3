"""Precision of float32 products: TF32 where it suffices, full float32 where nearly equal outputs are subtracted."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether float32 matrix products and convolutions run in TF32 on GPUs that have it: several times as fast, with 11
    bits of significand in what they multiply."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def passes(precision: str, guides_both: bool, device: torch.device) -> AbstractContextManager[None]:
    """What a run's float32 passes are on a GPU: TF32, but for methods that compare two guided scores."""
    on_gpu = precision == "fp32" and device.type != "cpu"
    return tf32(not guides_both) if on_gpu else nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inside, float32 stays float32 on ``device``, where that has autocast at all."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Inside, float32 is float32: no autocast and no TF32, for differences of outputs that are nearly equal."""
    with no_autocast(device), tf32(False):
        yield


def is_exact(device: torch.device) -> bool:
    """Whether passes on ``device`` run as they do inside :func:`exact`."""
    rounded = torch.get_float32_matmul_precision() != "highest" or torch.backends.cudnn.allow_tf32
    half = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return not half and not (device.type != "cpu" and rounded)
