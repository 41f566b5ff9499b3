"""Cost of a block of code: wall-clock seconds and peak memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from stepdistill.diffusion.devices import torch_of

_MIB = 2**20


@dataclass
class Cost:
    """Filled when the ``metered`` block ends: seconds, and peak memory in MiB (of the GPU, or of this process)."""

    seconds: float = 0.0
    peak_memory_mib: float = 0.0


@contextmanager
def metered(device: str | torch.device) -> Iterator[Cost]:
    """Measure the block; on an accelerator the queue is drained before both readings of the clock.

    On a CPU the peak is the process's resident memory, weights and libraries included. Linux restarts its
    high-water mark for the block; Windows has one for the whole process; elsewhere it is the memory at the end.
    """
    runtime, cost = torch_of(device), Cost()
    if runtime is not torch:
        runtime.synchronize(device)
        runtime.reset_peak_memory_stats(device)
    else:
        _restart_high_water_mark()
    start = time.perf_counter()
    yield cost
    if runtime is not torch:
        runtime.synchronize(device)
    cost.seconds = time.perf_counter() - start
    cost.peak_memory_mib = _high_water_mark() if runtime is torch else runtime.max_memory_allocated(device) / _MIB


def _restart_high_water_mark() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or a sandbox that forbids it


def _high_water_mark() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss) / _MIB
