"""Complete, atomic checkpoints: safetensors and JSON only, a manifest with the SHA-256 of every file.

A checkpoint is written into a hidden folder, synced, and renamed; a folder without a matching manifest is
never taken for a checkpoint. Numbers that are not finite are not written.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.finite import NonFiniteError
from stepdistill.parts import part, part_like, shape, whole

MANIFEST = "manifest.json"
GIB = 2**30


@dataclass
class State:
    """Everything a run is: named networks, named optimizers, plain tensors' dicts, and the next step."""

    step: int
    networks: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer] = field(default_factory=dict)
    averages: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)


Files = dict[str, dict[str, Tensor]]
"""Tensors on the CPU, by the name of their file and their own."""


def save(folder: Path, state: State, keep: int) -> Path:
    """Write ``folder/step-NNNNNN``, then delete all but the newest ``keep`` checkpoints. Returns its path.

    Raises: see :func:`write`.
    """
    return write(folder, state.step, contents(state), keep)


@torch.no_grad()
def contents(state: State, kept: bool = True) -> Files:
    """What a checkpoint of this state holds; of weights that are shared out only together with the other processes.

    Args:
        kept: False in a process that gives its parts and needs nothing back.
    """
    named = {f"{name}.safetensors": dict(network.named_parameters()) for name, network in state.networks.items()}
    named |= {f"{name}.optimizer.safetensors": _optimizer_tensors(one) for name, one in state.optimizers.items()}
    named |= {f"{name}.average.safetensors": average for name, average in state.averages.items()}
    files: Files = {file: {} for file in named}
    for file, tensors in named.items():
        for key, value in tensors.items():
            gathered = whole(value)
            if kept:
                files[file][key] = gathered.cpu().contiguous()
    return files


def write(folder: Path, step: int, files: Files, keep: int) -> Path:
    """:func:`save` of what :func:`contents` gave.

    Raises:
        NonFiniteError: a tensor holds a number that is none. OSError, SafetensorError: it cannot be written. Earlier
            checkpoints stay as they are, and nothing is left of this one.
    """
    final = folder / f"step-{step:06d}"
    for left in folder.glob(".writing-*"):  # by a kill
        shutil.rmtree(left)
    draft = folder / f".writing-{step:06d}"
    draft.mkdir(parents=True)
    try:
        _write(draft, step, files)
        if final.exists():
            shutil.rmtree(final)
        draft.rename(final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)  # on a full disk it would be in the way of everything else
        raise
    sync(folder)
    for old in _numbered(folder)[:-keep]:
        # Under another name first: what a kill leaves of it is never taken for a checkpoint.
        shutil.rmtree(old.rename(folder / f".writing-{old.name}"))
    return final


def _write(draft: Path, step: int, files: Files) -> None:
    for name, tensors in files.items():
        _check_finite(name, tensors, step)
        # safetensors refuses tensors that share memory; tied weights are stored once each.
        save_file({key: value.clone() for key, value in tensors.items()}, draft / name)
    hashes = {name: sha256(draft / name) for name in files}
    (draft / MANIFEST).write_text(json.dumps({"schema": 1, "step": step, "sha256": hashes}, indent=1))
    for path in (*draft.iterdir(), draft):
        sync(path)


def _check_finite(name: str, tensors: Mapping[str, Tensor], step: int) -> None:
    """A step can end well and leave weights that no later step can use; they must not become the newest checkpoint."""
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            what = name.removesuffix(".safetensors").replace(".", " ")
            raise NonFiniteError(f"{what}: {key} holds numbers that are not finite after step {step}")


def check_space(folder: Path, state: State, keep: int, best: Path | None = None, keep_best: int = 0) -> None:
    """Refuse a run whose checkpoints its disk cannot hold: ``keep`` of them, and the one that is being written.

    Args:
        best: folder of the ``keep_best`` best ones, which stay beside the newest; None where nothing is measured.

    Raises:
        InputError: what is free, with the checkpoints in these folders that will be replaced, is less.
    """
    weights = [p for network in state.networks.values() for p in network.parameters()]
    weights += [value for average in state.averages.values() for value in average.values()]
    size = sum(shape(value).numel() * value.element_size() for value in weights)
    for optimizer in state.optimizers.values():
        # Two moments a parameter, in float32; in 8 bits where that is what the optimizer is for.
        moment = 1 if type(optimizer).__module__.startswith("bitsandbytes.") else 4
        size += sum(2 * moment * shape(p).numel() for group in optimizer.param_groups for p in group["params"])
    folders, count, named = [folder], keep + 1, "train.keep_checkpoints"
    if best is not None:
        folders, count, named = [folder, best], count + keep_best, f"{named} + evaluation.keep_best"
    there = sum(file.stat().st_size for kept in folders for path in _numbered(kept) for file in path.iterdir())
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free, needed = shutil.disk_usage(place).free, count * size - there
    if free < needed:
        raise InputError(
            f"output: {count} checkpoints ({named} + 1) of {size / GIB:.2g} GiB do not fit the disk of {folder}: "
            f"expected {needed / GIB:.2g} GiB free, found {free / GIB:.2g}"
        )


def load(path: Path, state: State) -> int:
    """Copy a checkpoint into the networks, optimizers and averages of ``state``; returns the next step.

    Raises:
        InputError: the checkpoint is damaged, or was made with other networks.
    """
    step = verify(path)
    for name, network in state.networks.items():
        copy_parameters(path / f"{name}.safetensors", dict(network.named_parameters()))
    for name, optimizer in state.optimizers.items():
        _restore_optimizer(path / f"{name}.optimizer.safetensors", optimizer)
    for name, average in state.averages.items():
        copy_parameters(path / f"{name}.average.safetensors", average)
    return step


def verify(path: Path) -> int:
    """The step of a whole checkpoint.

    Raises:
        InputError: naming the file that is missing, truncated or altered.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        hashes, step = dict(manifest["sha256"]), int(manifest["step"])
        stray = [name for name in hashes if name in ("", "..") or Path(name).name != name]
        moved = path in _numbered(path.parent) and step != int(path.name[5:])
        if stray or moved or manifest["schema"] != 1 or not hashes:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not a checkpoint, no valid {MANIFEST} ({type(error).__name__})") from None
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file():
            raise InputError(f"{path}: damaged checkpoint, {name} is missing")
        if sha256(file) != expected:
            raise InputError(f"{path}: damaged checkpoint, {name} does not match its SHA-256")
    return step


def latest(folder: Path, report: Any = None) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None; ``report(message)`` hears of damaged ones it skips."""
    for path in reversed(_numbered(folder)):
        try:
            verify(path)
        except InputError as error:
            if report:
                report(f"{error}; trying the one before")
        else:
            return path
    return None


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state as flat tensors, keyed by the parameter's position; learning rates follow from the recipe."""
    states = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, state in states.items() for key, value in state.items()}


def _restore_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in _tensors(path).items():
        index, _, entry = key.partition(".")
        # A count of steps that is no floating tensor was a plain number (bitsandbytes').
        plain = value.ndim == 0 and not value.is_floating_point()
        states.setdefault(int(index), {})[entry] = value.item() if plain else value
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        moments = {entry: value for entry, value in states.get(index, {}).items() if entry != "step"}
        states |= {index: states[index] | {e: part_like(v, parameter) for e, v in moments.items()}} if moments else {}
    own = optimizer.state_dict()
    optimizer.load_state_dict({"state": states, "param_groups": own["param_groups"]})


@torch.no_grad()
def copy_parameters(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy every tensor of a file into ``targets``, in place.

    Raises:
        InputError: it cannot be read, or names or shapes differ.
    """
    stored = _tensors(path)
    if stored.keys() != targets.keys():
        different = sorted(stored.keys() ^ targets.keys())[0]
        raise InputError(f"{path}: made with other networks than this recipe's (first difference: {different})")
    for key, target in targets.items():
        if stored[key].shape != shape(target):
            raise InputError(f"{path}: {key} has shape {tuple(stored[key].shape)}, expected {tuple(shape(target))}")
        part(target).copy_(part_like(stored[key], target))


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from None


def sync(path: Path) -> None:
    """Have the disk hold what was written into a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
