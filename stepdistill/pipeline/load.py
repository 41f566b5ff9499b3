"""Pipelines from embedded teachers, folders, single files and the hub: safetensors only, no code but diffusers' own."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from stepdistill.errors import InputError
from stepdistill.files import files_in, index_of, lacking
from stepdistill.pipeline.assemble import assembled, made_of
from stepdistill.pipeline.complete import all_weights_found
from stepdistill.pipeline.exports import ExportFacts, fuse, is_lora
from stepdistill.pipeline.folder import load_folder, loading, quiet
from stepdistill.pipeline.hub import download
from stepdistill.pipeline.ip_adapter import load_ip_adapter
from stepdistill.pipeline.names import source
from stepdistill.pipeline.stock_call import without_black_pictures
from stepdistill.recipe import IPAdapter, Teacher


def load_pipeline(
    path: str | Path | Teacher,
    dtype: torch.dtype = torch.float32,
    quantize: Literal["nf4", "int8"] | None = None,
    ip_adapter: IPAdapter | None = None,
) -> DiffusionPipeline:
    """A pipeline by the name of an embedded teacher, a folder, a checkpoint file or a hub id.

    Weights are read from safetensors only, and no remote code is run.

    A guidance adapter in a local folder is attached to it, and so is the IP-Adapter that an export was trained with. An
    exported LoRA gives its teacher with the LoRA in the weights and the student's scheduler.

    Args:
        path: or the teacher of a recipe, for its name, revision, variant, config, vae, loras and embeddings.
        dtype: of all its networks.
        quantize: the denoiser's linear layers.
        ip_adapter: loaded into it.

    Raises:
        InputError: there is none, or it cannot be loaded that way.
    """
    teacher = as_teacher(path)
    place = Path(teacher.pipeline)
    facts = ExportFacts.read(place)
    if facts is not None and is_lora(place) and not teacher.composed:
        if quantize is not None:
            raise InputError("teacher.quantize: expected null for a teacher that is an exported LoRA")
        pipeline = load_pipeline(facts.origin, dtype)
        with quiet():
            pipeline = fuse(pipeline, place)
    else:
        folder = folder_of(teacher)
        variant = None if teacher.composed else teacher.variant
        pipeline = load_folder(teacher.pipeline, folder, variant, dtype, quantize)
        pipeline.made_of = made_of(folder)
        without_black_pictures(pipeline)
    if (ip_adapter := ip_adapter or (facts and facts.ip_adapter)) is not None:
        with quiet():
            load_ip_adapter(pipeline, ip_adapter)
    return pipeline


def as_teacher(path: str | Path | Teacher) -> Teacher:
    """The section ``teacher`` of a recipe that names a pipeline and nothing else; one that is given as it is."""
    return path if isinstance(path, Teacher) else Teacher.model_construct(pipeline=str(path))


def folder_of(teacher: Teacher) -> Path:
    """The folder of the pipeline that :func:`load_pipeline` loads: the teacher's own, one in the hub's cache, or, for a
    teacher of several files or of a single one, the folder that is made of them.

    Raises:
        InputError: there is none, or its weights are not as they should be.
    """
    place = Path(source(teacher.pipeline))
    if place.is_file():
        return assembled(teacher, place)
    if not place.is_dir():
        with quiet():
            place = download(str(place), teacher.revision, teacher.variant)
    elif (fault := lacking(files_in(place), teacher.variant)) is not None:
        key, problem = fault
        raise InputError(f"pipeline {teacher.pipeline}: {'' if key == 'pipeline' else f'teacher.{key}: '}{problem}")
    return assembled(teacher, place) if teacher.composed else place


def load_network(kind: type, folder: Path, variant: str | None = None) -> Any:
    """A network of a diffusers class from its own folder, in the precision of its files.

    Raises:
        InputError: it cannot be loaded.
    """
    options = {} if variant is None else {"variant": variant}
    with loading(f"{folder}: cannot be loaded as a {kind.__name__}"), all_weights_found(folder):
        return kind.from_pretrained(folder, use_safetensors=True, **options).eval()


def is_export(folder: Path) -> bool:
    """Whether :func:`load_pipeline` takes ``folder``: a pipeline, or an exported LoRA."""
    return index_of(folder) is not None or is_lora(folder)


def pipeline_of(path: str | Path) -> str | Path:
    """The export of a run folder that has one; any other ``path`` as it is."""
    export = Path(path) / "export"
    return export if is_export(export) else path
