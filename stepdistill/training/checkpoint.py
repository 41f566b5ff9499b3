"""Complete, atomic checkpoints: safetensors and JSON only, a manifest with the SHA-256 of every file.

A checkpoint is written into a hidden folder, synced, and renamed; a folder without a matching manifest is
never taken for a checkpoint. Numbers that are not finite are not written. What FSDP shares out is a folder of
parts, ``NAME/``, in the place of ``NAME.safetensors`` (:mod:`stepdistill.training.part_files`).

Looking for a checkpoint reads manifests and headers (:func:`examine`), which give away what a kill or a full disk
leaves. Every byte is read once, before a run goes on from it or exports it (:func:`verify`).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.files import atomic, publish, sha256, sync
from stepdistill.recipe.memory import GIB
from stepdistill.roles.parts import is_shard, shard_like, whole
from stepdistill.training import part_files
from stepdistill.training.finite import NonFiniteError
from stepdistill.training.optimizer_state import restore, state_bytes_of, state_tensors

MANIFEST = "manifest.json"
SUFFIX = ".safetensors"


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
        first: whether this is the first. It writes every file but those of which all write their parts; before
            torch 2.9 it gathers what is sharded, a file at a time.

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
        yield f"{name}.optimizer.safetensors", state_tensors(optimizer)
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
    for left in (*folder.glob(".writing-*"), *folder.glob(".step-*")):  # by a kill
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
    parts = {name: tensor.to_local() if is_shard(tensor) else tensor for name, tensor in tensors.items()}
    part_files.together(lambda: _check_finite(folder.name, parts, step))
    own = part_files.write(folder, tensors)

    def finish() -> dict[str, str]:
        for path in own:
            sync(path)
        return {f"{folder.name}/{path.name}": sha256(path) for path in own}

    return {name: value for hashes in part_files.together(finish) for name, value in hashes.items()}


def _end(folder: Path, draft: Path, step: int, hashes: Mapping[str, str], keep: int) -> Path:
    """Make the draft a checkpoint."""
    (draft / MANIFEST).write_text(json.dumps({"schema": 1, "step": step, "sha256": hashes}, indent=1))
    final = path_of(folder, step)
    publish(draft, final)
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
    size = sum(value.shape.numel() * value.element_size() for value in weights)
    size += sum(map(state_bytes_of, state.optimizers.values()))
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
    """Copy a checkpoint that :func:`verify` has read into the networks, optimizers and averages of ``state``.

    Returns:
        The next step.

    Raises:
        InputError: the checkpoint is damaged, or was made with other networks.
    """
    step = examine(path)
    for name, network in state.networks.items():
        copy_parameters(path / f"{name}.safetensors", dict(network.named_parameters()))
    for name, optimizer in state.optimizers.items():
        restore(optimizer, partial(read, path / f"{name}.optimizer.safetensors"))
    for name, average in state.averages.items():
        copy_parameters(path / f"{name}.average.safetensors", average)
    return step


def examine(path: Path) -> int:
    """The step of a checkpoint whose manifest is valid and whose files have whole headers and the sizes they state.

    Raises:
        InputError: naming the file that is missing or truncated.
    """
    for name in (manifest := _manifest(path)).sha256:
        file = path / name
        if not file.is_file():
            raise InputError(f"{path}: damaged checkpoint, {name} is missing")
        try:
            with safe_open(file, "pt"):  # compares the size of the file with that of the tensors in its header
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: damaged checkpoint, {name} cannot be read: {error}") from None
    for file in path.glob(f"*/*{SUFFIX}"):  # every one in a folder of parts is read
        if f"{file.parent.name}/{file.name}" not in manifest.sha256:
            raise InputError(f"{path}: damaged checkpoint, {file.parent.name}/{file.name} is not of it")
    return manifest.step


def verify(path: Path) -> int:
    """The step of a checkpoint that holds what was written, to the byte: reads all of it.

    Raises:
        InputError: naming the file that is missing, truncated or altered.
    """
    step = examine(path)
    for name, expected in _manifest(path).sha256.items():
        if sha256(path / name) != expected:
            raise InputError(f"{path}: damaged checkpoint, {name} does not match its SHA-256")
    return step


class _Manifest(NamedTuple):
    step: int
    sha256: dict[str, str]


def _manifest(path: Path) -> _Manifest:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        hashes, step = dict(manifest["sha256"]), int(manifest["step"])
        stray = [name for name in hashes if not _within(name)]
        moved = path in _numbered(path.parent) and step != int(path.name[5:])
        if stray or moved or manifest["schema"] != 1 or not hashes:
            raise ValueError
        return _Manifest(step, hashes)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not a checkpoint, no valid {MANIFEST} ({type(error).__name__})") from None


def _within(name: str) -> bool:
    """Whether a manifest's name is that of a file in its folder, or in a folder there."""
    parts = Path(name).parts
    return 1 <= len(parts) <= 2 and ".." not in parts and "/".join(parts) == name


def latest(
    folder: Path, report: Callable[[str], None] | None = None, check: Callable[[Path], int] = examine
) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None.

    Args:
        report: called with a message for each damaged one that is skipped.
        check: raises InputError for a damaged one; :func:`verify` where a run goes on from it.
    """
    for path in reversed(_numbered(folder)):
        try:
            check(path)
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
    own = path_of(folder, verify(path))
    if own.exists():
        if own.samefile(path):
            return own
        _renamed(own)
    with atomic(own) as draft:
        shutil.copytree(path, draft, copy_function=_linked)
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


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies among those in ``folder``."""
    return folder / f"step-{step:06d}"


def _renamed(path: Path) -> Path:
    number = 1
    while (other := path.with_name(f"replaced-{number}-{path.name}")).exists():
        number += 1
    return path.rename(other)


def _numbered(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit())
    return sorted(found, key=lambda path: int(path.name[5:]))


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
        if stored[key].shape != target.shape:
            raise InputError(f"{path}: {key} has shape {tuple(stored[key].shape)}, expected {tuple(target.shape)}")
        target.detach().copy_(shard_like(stored[key], target))


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
