"""Complete, atomic checkpoints: safetensors and JSON only, a manifest with the SHA-256 of every file.

A checkpoint is written into a hidden folder, synced, and renamed; a folder without a matching manifest is
never taken for a checkpoint. Numbers that are not finite are not written. What FSDP shares out is a folder of
parts, ``NAME/``, in the place of ``NAME.safetensors`` (:mod:`stepdistill.part_files`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill import part_files
from stepdistill.errors import InputError
from stepdistill.finite import NonFiniteError
from stepdistill.parts import part, part_like, shape, whole

MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
GIB = 2**30


@dataclass
class State:
    """Everything a run is: named networks, named optimizers, plain tensors' dicts, and the next step."""

    step: int
    networks: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer] = field(default_factory=dict)
    averages: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)


def save(
    folder: Path,
    state: State,
    keep: int,
    once: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    first: bool = True,
) -> Path:
    """Write ``folder/step-NNNNNN``, then delete all but the newest ``keep`` checkpoints. Returns its path.

    Args:
        once: where weights are shared out and all processes call this: what runs its argument in the first of them.
        first: whether this is the first. It writes every file but those of which all write their parts; what is shared
            out in another way than FSDP's it puts together, a file at a time.

    Raises:
        NonFiniteError: a tensor holds a number that is none. OSError, SafetensorError: it cannot be written. Earlier
            checkpoints stay as they are, and nothing is left of this one.
    """
    draft, hashes = once(lambda: _begin(folder, state.step)), {}
    try:
        for name, tensors in _files(state):
            if part_files.writable(tensors):
                hashes |= _write_parts(draft / name.removesuffix(SUFFIX), tensors, state.step)
                continue
            gathered = _gather(tensors, first)
            hashes[name] = once(lambda name=name, gathered=gathered: _write(draft / name, gathered, state.step))
        return once(lambda: _end(folder, draft, state.step, hashes, keep))
    except BaseException:
        if first:
            shutil.rmtree(draft, ignore_errors=True)  # on a full disk it would be in the way of everything else
        raise


def _files(state: State) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Each file's name and its tensors, of which this process may have parts."""
    for name, network in state.networks.items():
        yield f"{name}.safetensors", dict(network.named_parameters())
    for name, optimizer in state.optimizers.items():
        yield f"{name}.optimizer.safetensors", _optimizer_tensors(optimizer)
    for name, average in state.averages.items():
        yield f"{name}.average.safetensors", average


@torch.no_grad()
def _gather(tensors: Mapping[str, Tensor], kept: bool) -> dict[str, Tensor]:
    """The tensors, whole and on the CPU; none in a process that gives its parts and needs nothing back."""
    gathered = {}
    for key, value in tensors.items():
        one = whole(value)
        if kept:
            gathered[key] = one.cpu().contiguous()
    return gathered


def _begin(folder: Path, step: int) -> Path:
    for left in folder.glob(".writing-*"):  # by a kill
        shutil.rmtree(left)
    draft = folder / f".writing-{step:06d}"
    draft.mkdir(parents=True)
    return draft


def _write(path: Path, tensors: Mapping[str, Tensor], step: int) -> str:
    """Write one file; returns its hash."""
    _check_finite(path.name, tensors, step)
    # safetensors refuses tensors that share memory; tied weights are stored once each.
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    return sha256(path)


def _write_parts(folder: Path, tensors: Mapping[str, Tensor], step: int) -> dict[str, str]:
    """Write a file together with the other processes; returns the hashes of all parts."""

    def finish(path: Path) -> str:
        sync(path)
        return sha256(path)

    hashes = part_files.write(folder, tensors, lambda parts: _check_finite(folder.name, parts, step), finish)
    return {f"{folder.name}/{name}": value for name, value in hashes.items()}


def _end(folder: Path, draft: Path, step: int, hashes: Mapping[str, str], keep: int) -> Path:
    """Make the draft a checkpoint."""
    (draft / MANIFEST).write_text(json.dumps({"schema": 1, "step": step, "sha256": hashes}, indent=1))
    for path in (*draft.iterdir(), draft):  # parts have been synced by who wrote them
        sync(path)
    final = folder / f"step-{step:06d}"
    if final.exists():
        shutil.rmtree(final)
    draft.rename(final)
    sync(folder)
    # The one just written stays, whatever numbers are there.
    for old in (path for path in _numbered(folder)[:-keep] if path != final):
        # Under another name first: what a kill leaves of it is never taken for a checkpoint.
        shutil.rmtree(old.rename(folder / f".writing-{old.name}"))
    return final


def _check_finite(name: str, tensors: Mapping[str, Tensor], step: int) -> None:
    """A step can end well and leave weights that no later step can use; they must not become the newest checkpoint."""
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            what = name.removesuffix(SUFFIX).replace(".", " ")
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
    there = sum(file.stat().st_size for kept in folders for path in _numbered(kept) for file in path.rglob("*"))
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
        stray = [name for name in hashes if not _within(name)]
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
    for file in path.glob(f"*/*{SUFFIX}"):  # every one in a folder of parts is read
        if f"{file.parent.name}/{file.name}" not in hashes:
            raise InputError(f"{path}: damaged checkpoint, {file.parent.name}/{file.name} is not of it")
    return step


def _within(name: str) -> bool:
    """Whether a manifest's name is that of a file in its folder, or in a folder there."""
    parts = Path(name).parts
    return 1 <= len(parts) <= 2 and ".." not in parts and "/".join(parts) == name


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


def adopt(path: Path, folder: Path) -> Path:
    """A checkpoint among those in ``folder``, by hard links where the disk has them: no file of one is ever changed.

    Raises:
        InputError: it is damaged.
    """
    own = folder / f"step-{verify(path):06d}"
    if own.exists():
        if own.samefile(path):
            return own
        _renamed(own)
    draft = folder / f".writing-{own.name}"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(path, draft, copy_function=_linked)
    draft.rename(own)
    sync(folder)
    return own


def _linked(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def set_aside(folder: Path, after: Path | None) -> list[Path]:
    """Rename the checkpoints in ``folder`` after that one (None: all): none outranks what is trained from it."""
    numbered = _numbered(folder)
    return [_renamed(path) for path in (numbered[numbered.index(after) + 1 :] if after else numbered)]


def _renamed(path: Path) -> Path:
    number = 1
    while (other := path.with_name(f"replaced-{number}-{path.name}")).exists():
        number += 1
    return path.rename(other)


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
    found = (path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit())
    return sorted(found, key=lambda path: int(path.name[5:]))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state as flat tensors, keyed by the parameter's position; learning rates follow from the recipe."""
    tensors = {}
    for i, state in optimizer.state_dict()["state"].items():
        # bitsandbytes puts some of a parameter's state into a dict of its own, and takes it without.
        nested = (more for more in state.values() if isinstance(more, dict))
        flat = {key: value for one in (state, *nested) for key, value in one.items() if not isinstance(value, dict)}
        tensors |= {f"{i}.{key}": torch.as_tensor(value) for key, value in flat.items()}
    return tensors


def _restore_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in read(path, lambda key: parameters.get(int(key.partition(".")[0]))).items():
        index, _, entry = key.partition(".")
        # A count of steps that is no floating tensor was a plain number (bitsandbytes').
        plain = value.ndim == 0 and not value.is_floating_point()
        states.setdefault(int(index), {})[entry] = value.item() if plain else value
    for index, parameter in parameters.items():
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
    stored = read(path, targets.get)
    if stored.keys() != targets.keys():
        different = sorted(stored.keys() ^ targets.keys())[0]
        raise InputError(
            f"{path}: made with other networks than this recipe's, or by another "
            f"version of stepdistill (first difference: {different})"
        )
    for key, target in targets.items():
        if stored[key].shape != shape(target):
            raise InputError(f"{path}: {key} has shape {tuple(stored[key].shape)}, expected {tuple(shape(target))}")
        part(target).copy_(part_like(stored[key], target))


def holds(path: Path) -> bool:
    """Whether a checkpoint has this file, whole or as a folder of parts."""
    return path.is_file() or path.with_suffix("").is_dir()


def read(path: Path, wanted: Callable[[str], Tensor | None] = lambda name: None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's file.

    Args:
        wanted: by name, what is to be filled; of one that FSDP shares out the answer may be this process's part.

    Raises:
        InputError: it cannot be read.
    """
    parts = path.with_suffix("")
    if parts.is_dir():
        return part_files.read(parts, wanted)
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
