"""Several students in one folder, a stock export for each, and the router that chooses among them.

FOLDER/router.json       the groups (:class:`stepdistill.diffusion.routing.Router`)
FOLDER/students/0/ ...   the export of each group's student: a pipeline, or a LoRA for the teacher
"""

import warnings
from dataclasses import astuple, replace
from pathlib import Path

from torch import nn

from stepdistill.diffusion.experts import Experts
from stepdistill.diffusion.routing import FILE, Router
from stepdistill.errors import InputError
from stepdistill.files import digest, sha256
from stepdistill.pipeline.exports import WEIGHTS, ExportFacts, is_lora
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.load import load_network
from stepdistill.pipeline.trace import Trace
from stepdistill.recipe import Teacher
from stepdistill.roles.views import AdapterView

FOLDER = "students"


def student_folders(folder: str | Path) -> dict[str, Path]:
    """The exports of the students in ``folder``, by their groups' names; empty for any other folder.

    Raises:
        InputError: one is missing.
    """
    folder = Path(folder)
    if not (folder / FOLDER).is_dir() or not (folder / FILE).is_file():
        return {}
    found = {str(number): folder / FOLDER / str(number) for number in range(len(Router.read(folder)))}
    if missing := [one for one in found.values() if not one.is_dir()]:
        raise InputError(f"{folder}: expected {len(found)} students, found no {missing[0]}")
    return found


def with_students(traced: Trace, folder: Path) -> Trace:
    """The pipeline of one student, or of the teacher of LoRAs, with all students of ``folder`` as its denoiser.

    LoRAs share the pipeline's network; of whole students each has its own in memory.

    Raises:
        InputError: a student does not fit the others.
    """
    folders, router = student_folders(folder), Router.read(folder)
    students = routed(traced, Experts(_networks(traced, folders)), router)
    files = [file for one in folders.values() for file in _weights(one, traced.component)]
    # Of whole students the pipeline's components hold the first alone.
    traced.pipeline.made_of = {"students": [sha256(file) for file in files], "router": digest(*astuple(router))}
    return students


def routed(traced: Trace, network: nn.Module, router: Router | None) -> Trace:
    """The pipeline with another network as its denoiser: students by their groups' names, with their router."""
    denoiser = traced.denoiser.on(network)
    return replace(traced, denoiser=denoiser.called(replace(denoiser.spec, router=router)))


def base_of(folders: dict[str, Path]) -> Path | Teacher:
    """What is to be loaded in the place of all students: the first of them, or the teacher of their LoRAs."""
    first = next(iter(folders.values()))
    facts = ExportFacts.read(first)
    return facts.origin if facts is not None and is_lora(first) else first


def _networks(traced: Trace, folders: dict[str, Path]) -> dict[str, nn.Module]:
    network = traced.network
    if all(map(is_lora, folders.values())):
        with quiet(), warnings.catch_warnings():
            # Several adapters on one network are the point here, and peft warns of the second.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for name, one in folders.items():
                options = {"weight_name": WEIGHTS, "use_safetensors": True, "adapter_name": f"student_{name}"}
                traced.pipeline.load_lora_weights(one, **options)
        return {name: AdapterView(network, f"student_{name}") for name in folders}
    first, *others = folders
    like = next(network.parameters())
    loaded = {name: load_network(type(network), folders[name] / traced.component).to(like) for name in others}
    return {first: network} | loaded


def _weights(folder: Path, component: str) -> list[Path]:
    """The files of an export that hold what was trained."""
    return [folder / WEIGHTS] if is_lora(folder) else sorted((folder / component).glob("*.safetensors"))
