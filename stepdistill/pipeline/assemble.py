"""A teacher of several files: a checkpoint or folder, with another autoencoder, LoRAs and textual inversions.

What it comes to is written once as a folder in diffusers format, in the cache. From there on it is a teacher like any
other: traced, planned, trained, resumed and exported from its folder.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from stepdistill.errors import InputError, in_a_line
from stepdistill.files import atomic, cache_folder, digest, files_in, read_json, sha256, write_json
from stepdistill.pipeline.complete import all_weights_found, some, whole_before_moved
from stepdistill.pipeline.components import modules, put
from stepdistill.pipeline.folder import REFUSED, load_folder, loading, quiet, save_pipeline
from stepdistill.pipeline.hub import unreachable, why_not
from stepdistill.pipeline.loras import fuse_lora
from stepdistill.pipeline.names import check_file
from stepdistill.pipeline.single_file import config_folder, read_checkpoint, shapes
from stepdistill.progress import say
from stepdistill.recipe.schema import Teacher
from stepdistill.recipe.section import Embedding

CONTENT = "assembled.json"
"""In an assembled folder: what it is made of, and the SHA-256 of each file."""
_READ = (".json", ".txt", ".model", ".safetensors")
"""Endings of the files in a pipeline's folder that say what it is."""


def assembled(teacher: Teacher, base: Path) -> Path:
    """The folder, in the cache, of a teacher's pipeline with all that the recipe puts into it.

    It is made of ``base``, a folder or checkpoint file, and made anew when one of its files has changed.

    Raises:
        InputError: a file is missing or no safetensors, does not fit the pipeline, or has nothing for it.
    """
    if base.is_file() and teacher.variant is not None:
        raise InputError(f"teacher.variant: expected null for a checkpoint file, found '{teacher.variant}'")
    files = dict(_files(teacher, base))
    stamps = {
        name: (str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns) for name, path in files.items()
    }
    folder = cache_folder() / "pipelines" / f"{base.stem}-{digest(_settings(teacher), stamps)}"
    if not (folder / CONTENT).is_file():
        if base.is_file():
            config_folder(base, teacher.config)  # before the line, where there is none
        say(f"{teacher.pipeline}: made into a folder in diffusers format, once: {folder}")
        with atomic(folder) as draft:
            write_assembled(teacher, base, draft)
    return folder


def write_assembled(teacher: Teacher, base: Path, out: Path) -> str:
    """Write what :func:`assembled` keeps in the cache into ``out``; returns the class of the pipeline."""
    if base.is_file():
        pipeline = read_checkpoint(base, teacher.config)
    else:
        pipeline = load_folder(teacher.pipeline, base, teacher.variant)
    if teacher.vae is not None:
        put(pipeline, "vae", _autoencoder(pipeline, teacher.vae, base))
    with quiet():  # diffusers warns of each cast
        for network in modules(pipeline).values():
            network.to(_dtype(network))
    for number, lora in enumerate(teacher.loras):
        fuse_lora(pipeline, lora, f"teacher.loras.{number}")
    for number, embedding in enumerate(teacher.embeddings):
        add_embedding(pipeline, embedding, f"teacher.embeddings.{number}")
    with quiet():
        save_pipeline(pipeline, out)
    hashes = {name: sha256(path) for name, path in _files(teacher, base)}
    write_json(out / CONTENT, _settings(teacher) | {"sha256": hashes})
    return type(pipeline).__name__


def made_of(folder: Path) -> dict[str, Any]:
    """What the pipeline in a folder is made of, with the SHA-256 of each file; empty for one like any other."""
    return read_json(folder / CONTENT) if (folder / CONTENT).is_file() else {}


def _settings(teacher: Teacher) -> dict[str, Any]:
    """What else an assembled folder depends on."""
    hub = [name for name in (teacher.config, teacher.vae) if name is not None and not Path(name).exists()]
    scales, tokens = [one.scale for one in teacher.loras], [one.token for one in teacher.embeddings]
    components = [one.component for one in teacher.loras]
    return {"scales": scales, "tokens": tokens, "variant": teacher.variant, "hub": hub} | (
        {"components": components} if any(components) else {}
    )


def _files(teacher: Teacher, base: Path) -> Iterator[tuple[str, Path]]:
    """(a name for it, file) of everything that a teacher is made of."""
    yield from _all_of("pipeline", base)
    if teacher.config is not None and Path(teacher.config).is_dir():
        yield from _all_of("config", Path(teacher.config))
    if teacher.vae is not None and Path(teacher.vae).exists():
        yield from _all_of("vae", Path(teacher.vae))
    for kind, entries in (("loras", teacher.loras), ("embeddings", teacher.embeddings)):
        for number, entry in enumerate(entries):
            check_file(f"teacher.{kind}.{number}.file", Path(entry.file))
            yield f"{kind}.{number}", Path(entry.file)


def _all_of(name: str, place: Path) -> Iterator[tuple[str, Path]]:
    """A file, or the files of a folder and of its components."""
    if place.is_file():
        check_file(f"teacher.{name}", place)
        yield name, place
        return
    whole = (place / "model_index.json").is_file()  # what else lies beside it is not read
    inside = ["model_index.json"] if whole else [path.name for path in place.iterdir() if path.is_file()]
    for file in sorted([*inside, *files_in(place)]):
        if Path(file).suffix in _READ:
            yield f"{name}/{file}", place / file


def add_embedding(pipeline: Any, embedding: Embedding, key: str) -> None:
    """Add a textual inversion to the pipeline's tokenizers and text encoders; messages name the recipe's ``key``.

    Raises:
        InputError: the pipeline takes none, or it does not fit its encoders.
    """
    name, file = type(pipeline).__name__, Path(embedding.file)
    if not hasattr(pipeline, "load_textual_inversion"):
        raise InputError(f"{key}: {name} takes no textual inversions")
    shapes(file)
    held = load_file(file)
    # SDXL's have a vector for each encoder, under these names; A1111's are under emb_params, and named by their file.
    vector = "emb_params" if "emb_params" in held else next(iter(held), "")
    encoders = {"clip_l": "", "clip_g": "_2"} if "clip_l" in held or "clip_g" in held else {vector: ""}
    if "emb_params" not in held and len(held) != len(encoders):
        raise InputError(f"{key}: expected a textual inversion, found {file} with {len(held)} tensors ({some(held)})")
    with loading(f"{key}: {file} cannot be loaded into {name}"):
        for vector, end in encoders.items():
            own = None if vector in ("emb_params", "clip_l", "clip_g") else vector
            parts = {part: getattr(pipeline, part + end) for part in ("tokenizer", "text_encoder")}
            pipeline.load_textual_inversion(held[vector], token=embedding.token or own or file.stem, **parts)


def _autoencoder(pipeline: Any, place: str, base: Path) -> Any:
    """The autoencoder at ``place``: a folder, a pipeline's folder, a file, or a hub id.

    Raises:
        InputError: there is none, or its latents are not those of the pipeline's own.
    """
    if (own := pipeline.components.get("vae")) is None:
        raise InputError(f"teacher.vae: {type(pipeline).__name__} has no autoencoder")
    path, kind = Path(place), type(own)
    try:
        with quiet(), all_weights_found(place):
            if path.is_file():
                check_file("teacher.vae", path)
                vae = _read_autoencoder(path, own)
            else:
                inner = {"subfolder": "vae"} if (path / "model_index.json").is_file() else {}
                vae = kind.from_pretrained(place, use_safetensors=True, **inner)
    except InputError:
        raise
    except REFUSED as error:
        missing = not path.exists() and place.count("/") == 1
        reason = why_not(place, None, None, error, unreachable()) if missing else in_a_line(error)
        raise InputError(f"teacher.vae: {place} cannot be loaded as a {kind.__name__}: {reason}") from error
    expected, found = _latents(own), _latents(vae)
    if expected != found:
        raise InputError(
            f"teacher.vae: expected latents of {expected[0]} channels at 1/{expected[1]} of the picture's size, found "
            f"{found[0]} at 1/{found[1]} in {place}"
        )
    return vae.eval()


def _read_autoencoder(file: Path, own: Any) -> Any:
    """An autoencoder in one file, with the config of the pipeline's ``own``."""
    with tempfile.TemporaryDirectory() as place:
        own.save_config(place)
        with whole_before_moved(f"teacher.vae: {file}"):
            return type(own).from_single_file(str(file), config=place, local_files_only=True)


def _latents(vae: Any) -> tuple[Any, int]:
    """(channels, factor of the size) of an autoencoder's latents."""
    blocks = vae.config.get("block_out_channels") or [0]
    return vae.config.get("latent_channels"), 2 ** (len(blocks) - 1)


def _dtype(network: nn.Module) -> torch.dtype:
    """The smallest dtype that holds every weight as it is: diffusers reads half precision and fp8 as float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(value, value.to(dtype).to(value.dtype)) for value in network.parameters()):
            return dtype
    return torch.float32
