"""How fast the fused kernels are: beside eager PyTorch, torch.compile, and the device's own copy.

    python scripts/bench_kernels.py --json kernels.json

For each kernel, shape and type: the time of each way, and for the kernel the bytes it must move (every input read once,
every output written once) over its time, as a share of what a copy of as many bytes reaches (bandwidth_share). Medians
of rounds that take the ways in turns. Where no kernel runs (no CUDA device, or no Triton), the function is its PyTorch
reference, and each row says so ("runs": "reference"). torch.compile takes seconds a case, so it is called for the last
batch size in bfloat16 only. The file is written anew after every row.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import kernels
from stepdistill.eval.bench.sources import device_name, library_versions
from stepdistill.kernels import Rule, Update
from stepdistill.kernels.dispatch import fusible

# Latents of SDXL at 1024 px, of Flux (packed) at 1024 px, and of a short Wan video.
SHAPES = {"sdxl": (4, 128, 128), "flux": (4096, 64), "wan": (16, 13, 60, 104)}
TINY = {"sdxl": (4, 16, 16), "flux": (64, 64)}
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CALLS = {"cuda": 20, "cpu": 3}
"""Calls in a row that are timed together, by kind of device."""


def kernel_cases(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Any, Any, tuple, int]]:
    """(the function, its reference, arguments, how many tensors of that shape it must move) by name."""
    cond, uncond, x_t, noise = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    w, a, b, c = (torch.rand(len(cond), device=device) for _ in range(4))
    step, keeping = Update(x_t, a, b), Update(x_t, a, b, c)
    guide, plain = (kernels.guide, kernels.guide_reference), (cond, uncond, w)
    return {
        "cfg": (*guide, plain, 3),
        "cfg + step": (*guide, (*plain, Rule(), None, None, step), 4),
        "cfg++ + step": (*guide, (*plain, Rule(), None, None, keeping), 4),
        "cfg, rescale": (*guide, (*plain, Rule(rescale=0.7)), 3),
        "apg": (*guide, (*plain, Rule(parallel=0.0, max_norm=15.0)), 3),
        "add_noise": (kernels.add_noise, kernels.add_noise_reference, (x_t, noise, a, b), 3),
        "dmd_gradient": (kernels.dmd_gradient, kernels.dmd_gradient_reference, (x_t, cond, uncond), 4),
        "sid_loss": (kernels.sid_loss, kernels.sid_loss_reference, (x_t, cond, uncond, 1.0), 3),
        "pseudo_huber": (kernels.pseudo_huber, kernels.pseudo_huber_reference, (x_t, 1e-3), 1),
    }


def seconds(calls: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one of the ``CALLS`` that ``calls`` makes."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        calls()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / CALLS["cuda"]
    began = time.process_time()
    calls()
    return (time.process_time() - began) / CALLS["cpu"]


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``CALLS`` of ``function``, as one CUDA graph where there are any: the device's work is timed, no launches."""
    function()
    function()

    def calls() -> None:
        for _ in range(CALLS[device.type]):
            function()

    if device.type != "cuda":
        return calls
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def copy_of(total: int, device: torch.device) -> Callable[[], Any]:
    """A copy that reads and writes ``total`` bytes together."""
    source = torch.empty(max(1, total // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def row(
    name: str, case: tuple[Any, Any, tuple, int], device: torch.device, rounds: int, compiles: bool
) -> dict[str, Any]:
    function, reference, arguments, tensors = case
    sample: Tensor = arguments[0]
    total = tensors * sample.numel() * sample.element_size()
    ways = {
        "kernel": lambda: function(*arguments),
        "eager": lambda: reference(*arguments),
        "copy": copy_of(total, device),
    }
    if compiles:
        torch._dynamo.reset()
        compiled = torch.compile(reference, dynamic=False)
        ways["compiled"] = lambda: compiled(*arguments)
    with torch.no_grad():
        ways = {way: captured(call, device) for way, call in ways.items()}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, call in ways.items():
                times[way].append(seconds(call, device))
    found = {way: statistics.median(values) for way, values in times.items()}
    return {
        "case": name,
        "runs": "kernel" if fusible(sample) else "reference",
        "microseconds": {way: round(1e6 * value, 2) for way, value in found.items()},
        "bytes": total,
        "bandwidth_share": round(found["copy"] / found["kernel"], 3),
        "eager_over_kernel": round(found["eager"] / found["kernel"], 2),
        "compiled_over_kernel": round(found["compiled"] / found["kernel"], 2) if compiles else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the rows")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="small shapes: a dry run")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        print("no CUDA device: the functions are their PyTorch references here")
    rows: list[dict[str, Any]] = []
    report = {"device": device_name(device), "libraries": library_versions(), "rows": rows}
    for size in arguments.batch_sizes:
        for layout, shape in (TINY if arguments.tiny else SHAPES).items():
            for dtype, kind in TYPES.items():
                for name, case in kernel_cases((size, *shape), kind, device).items():
                    label = f"{name}, {layout} x {size}, {dtype}"
                    compiles = kind == torch.bfloat16 and size == arguments.batch_sizes[-1]
                    rows.append(row(label, case, device, arguments.rounds, compiles and not arguments.no_compile))
                    print(json.dumps(rows[-1]), flush=True)
                    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
