"""Check that a pipeline's files hold all weights: the libraries initialise missing ones at random, and only warn."""

import functools
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from stepdistill.errors import InputError, in_a_line
from stepdistill.files import INDEXES, index_of

NAMED = 3
"""How many keys a message names."""


@contextmanager
def all_weights_found(pipeline: str | Path) -> Iterator[None]:
    """Inside the block every component that is loaded must find each of its weights in its files.

    The libraries decide what is missing: tied weights, buffers that are not stored, and names of earlier versions are
    theirs to know. ``pipeline`` is its name in the message.

    Raises:
        InputError: weights are missing or have another shape; it names the component, its files and some of the keys.
    """
    faults: list[str] = []
    with _reported(PreTrainedModel, faults), _reported(ModelMixin, faults):
        try:
            yield
        except Exception as error:
            # What a component lacks explains an error that comes of it better than the error does.
            if not faults:
                raise
            raise InputError(f"pipeline {pipeline}: {'; '.join(faults)}") from error
    if faults:
        raise InputError(f"pipeline {pipeline}: {'; '.join(faults)}")


@contextmanager
def whole_before_moved(what: str) -> Iterator[None]:
    """Inside the block a network that diffusers reads from a single file must have all its weights.

    diffusers leaves those that the file lacks without data. It fails when it moves the network, and does not say why.
    ``what`` is the file in messages.

    Raises:
        InputError: weights are missing; it names the class and some of the keys.
    """
    stock = ModelMixin.to

    def moved(network: Any, *arguments: Any, **options: Any) -> Any:
        check_filled(what, f"the {type(network).__name__}", network)
        return stock(network, *arguments, **options)

    setattr(ModelMixin, "to", moved)  # noqa: B010
    try:
        yield
    finally:
        setattr(ModelMixin, "to", stock)  # noqa: B010


def check_filled(what: str, name: str, network: nn.Module) -> None:
    """Raises InputError where weights have no data: the file ``what`` lacks them, and diffusers does not say so."""
    if empty := [key for key, value in network.named_parameters() if value.is_meta]:
        raise InputError(f"{what}: {len(empty)} weights of {name} are missing: {some(empty)}")


@contextmanager
def _reported(base: Any, faults: list[str]) -> Iterator[None]:
    """Inside the block ``from_pretrained`` of ``base`` and of its classes adds a line to ``faults`` for each fault."""
    stock = base.__dict__["from_pretrained"]

    @functools.wraps(stock.__func__)
    def from_pretrained(cls: Any, place: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("output_loading_info"):
            return stock.__func__(cls, place, *arguments, **options)
        options["output_loading_info"] = True
        if base is PreTrainedModel:  # it raises for a shape without saying which
            options["ignore_mismatched_sizes"] = True
        folder = Path(place, options.get("subfolder") or "")
        try:
            network, report = stock.__func__(cls, place, *arguments, **options)
        except (ValueError, RuntimeError) as error:
            reason = in_a_line(error).partition(" If you want to")[0]
            faults.append(f"{_files(folder)} cannot be loaded into the {cls.__name__}: {reason}")
            raise
        if fault := _fault(report):
            faults.append(f"{_files(folder)} does not fill the {cls.__name__}: {fault}")
        return network

    base.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        base.from_pretrained = stock


def _files(folder: Path) -> str:
    """The component in ``folder`` and its files, in short."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    return folder.name + (f"/{files[0]}" if files else "") + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _fault(report: dict[str, Any]) -> str | None:
    """Weights that the library's loading report does not find in the file, in words; None if all are there."""
    missing, surplus = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    shapes = sorted(
        f"{key} of {list(expected)}, found {list(held)}" for key, held, expected in report["mismatched_keys"]
    )
    if not missing and not shapes:
        return None
    problems = []
    if missing:
        problems.append(f"{len(missing)} weights are missing: {some(missing)}")
    if shapes:
        problems.append(f"{len(shapes)} weights have another shape: expected {some(shapes)}")
    if surplus:
        problems.append(f"{len(surplus)} names are unknown: {some(surplus)}")
    if any(".base_layer." in key for key in surplus):
        problems.append(
            "it was saved with a LoRA attached: call fuse_lora(), then unload_lora_weights(), then save again"
        )
    return "; ".join(problems)


def some(names: Collection[str]) -> str:
    """The first of the names, and how many more there are."""
    first = list(names)[:NAMED]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


def check_tokenizers(pipeline: str | Path, folder: Path) -> None:
    """Each tokenizer of the pipeline in ``folder``, named ``pipeline``, must have the files that its class reads.

    Raises:
        InputError: one is missing. Some versions of transformers would make an empty tokenizer instead.
    """
    for name, (_, kind) in classes(folder).items():
        files = getattr(getattr(transformers, kind, None), "vocab_files_names", None)
        place = folder / name
        if not files or not place.is_dir() or (place / "tokenizer.json").is_file():
            continue
        expected = [file for key, file in files.items() if key != "tokenizer_file"]
        if lacking := [file for file in expected if not (place / file).is_file()]:
            raise InputError(
                f"pipeline {pipeline}: {name} of class {kind} expected tokenizer.json or {' and '.join(expected)}, "
                f"found no {' and no '.join(lacking)}"
            )


def is_foreign(library: Any) -> bool:
    """Whether a library that an index names is other code than diffusers' and transformers'; None is no library."""
    own = library in (None, "diffusers", "transformers")
    return not (own or (isinstance(library, str) and hasattr(diffusers.pipelines, library)))


def classes(folder: Path) -> dict[str, tuple[str, str]]:
    """(library, class) by name of the components that the pipeline in ``folder`` lists.

    Raises:
        InputError: its index is no JSON object.
    """
    index = index_of(folder) or folder / INDEXES[0]
    try:
        facts = json.loads(index.read_text(encoding="utf-8"))
        listed = {name: value for name, value in facts.items() if isinstance(value, list) and len(value) in (2, 3)}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{index}: expected a JSON object of components, found {error}") from None
    # A modular one states the class beside the place, even of a component that it has never held.
    hints = {name: value[2].get("type_hint") for name, value in listed.items() if isinstance(value[-1], dict)}
    stated = {name: hints.get(name) or value for name, value in listed.items()}
    return {name: (value[0], value[1]) for name, value in stated.items() if isinstance(value[1], str)}
