"""Exports of this package: the facts beside the weights; a LoRA into a pipeline or into a student's adapter."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from stepdistill.errors import InputError
from stepdistill.files import read_json, write_text
from stepdistill.pipeline.components import put
from stepdistill.recipe import IPAdapter, Teacher
from stepdistill.recipe.section import Guidance
from stepdistill.roles.views import AdapterView, adapter_layers

WEIGHTS = "pytorch_lora_weights.safetensors"
"""diffusers' own name: ``load_lora_weights(folder)`` finds it."""


ORIGIN = ("variant", "config", "vae", "loras", "embeddings")
"""Keys of a recipe's teacher that say, beside its name and revision, what is loaded."""
FACTS = "stepdistill.json"
"""The file in an export that says what its student is."""


@dataclass(frozen=True)
class ExportFacts:
    """What an export's stepdistill.json says of its student; exports of earlier versions say less of it.

    Args:
        teacher: the name, folder or hub id of its teacher.
        guidance: the teacher's scale that is distilled.
        method: the method's name.
        steps: the steps that the student is trained for.
        revision: of the teacher's hub id.
        sampler: the sampler's name.
        call_guidance: the guidance scale of a plain call, which turns the pipeline's own guidance off.
        trained_steps: training steps.
        adapter: whether guidance is in an adapter beside the network.
        form: a whole pipeline, or a LoRA for the teacher.
        made_of: of a teacher of several files, or of a checkpoint file: the SHA-256 of each, and what else went in.
        recipe: the complete recipe.
        versions: of this package and the libraries that it was trained with.
    """

    teacher: str
    guidance: float
    method: str
    steps: int
    revision: str | None = None
    sampler: str | None = None
    call_guidance: float = 1.0
    trained_steps: int = 0
    adapter: bool = False
    form: Literal["pipeline", "lora"] = "pipeline"
    made_of: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> "ExportFacts | None":
        """The facts of the export in ``folder``; None for any other pipeline.

        Raises:
            InputError: the file is damaged.
        """
        path = Path(folder) / FACTS
        if not path.is_file():
            return None
        facts = {"recipe": {}} | read_json(path)
        kinds = {"teacher": str, "guidance": int | float, "method": str, "steps": int, "recipe": dict}
        if missing := [key for key, kind in kinds.items() if not isinstance(facts.get(key), kind)]:
            raise InputError(
                f"{path}: expected the keys teacher, guidance, method and steps, {', '.join(missing)} missing or wrong"
            )
        return cls(**{one.name: facts[one.name] for one in fields(cls) if one.name in facts})

    def write(self, folder: Path) -> None:
        """Write the file into ``folder``."""
        write_text(folder / FACTS, json.dumps({"schema": 1} | asdict(self), indent=1) + "\n")

    @property
    def _teacher(self) -> Mapping[str, Any]:
        return self.recipe.get("teacher", {})

    @property
    def variant(self) -> str | None:
        """The variant of the teacher's weights' files; None: plain names."""
        return self._teacher.get("variant")

    @property
    def origin(self) -> Teacher:
        """The teacher's files, as its recipe names them: what loads it."""
        named = {key: self._teacher[key] for key in ORIGIN if key in self._teacher}
        return Teacher.model_validate_json(
            json.dumps({"pipeline": self.teacher, "revision": self.revision, **named}), strict=True
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that the student was trained for, at the first of its sizes."""
        first = zip(("height", "width"), self.sizes[0], strict=True) if self.sizes else ()
        return self._teacher.get("arguments", {}) | dict(first)

    @property
    def sizes(self) -> list[list[int]]:
        """[height, width] of the pictures that the student was trained on; empty for the pipeline's own size alone."""
        buckets = self.recipe.get("data", {}).get("buckets")
        return self.recipe.get("train", {}).get("sizes") or (buckets if isinstance(buckets, list) else [])

    @property
    def ip_adapter(self) -> IPAdapter | None:
        """The IP-Adapter that the student was trained with."""
        settings = self._teacher.get("ip_adapter")
        return IPAdapter(**settings) if settings else None

    @property
    def teacher_guidance(self) -> Guidance:
        """The guidance that is distilled, with the rule of the recipe."""
        settings = self._teacher.get("guidance", {})
        names = ("interval", "rescale", "rule", "eta", "norm", "guider")
        rule = {name: settings[name] for name in names if name in settings}
        return Guidance(scale=self.guidance, **rule)

    @property
    def conditions(self) -> Any:
        """data.conditions of the recipe; None where it says nothing."""
        return self.recipe.get("data", {}).get("conditions")


def lora_files(components: Sequence[str]) -> dict[str, str]:
    """The file of each component's LoRA in an export: diffusers' own name, and one for each further expert."""
    first, *others = components
    return {first: WEIGHTS} | {name: f"pytorch_lora_weights.{name}.safetensors" for name in others}


def further_loras(folder: Path) -> dict[str, str]:
    """(component, file) of the LoRAs in an export beside the first: those of further experts."""
    stem, ending = WEIGHTS.split(".")
    return {file.name.split(".")[1]: file.name for file in sorted(folder.glob(f"{stem}.*.{ending}"))}


def is_lora(folder: Path) -> bool:
    """Whether ``folder`` is a LoRA that this package has exported."""
    return (folder / WEIGHTS).is_file() and (folder / FACTS).is_file()


def fuse(pipeline: Any, folder: Path) -> Any:
    """The pipeline with the LoRA in ``folder`` in its weights, and the scheduler that lies beside it."""
    others = further_loras(folder)
    pipeline.load_lora_weights(folder, weight_name=WEIGHTS, use_safetensors=True)
    for name, file in others.items():
        pipeline.load_lora_weights(folder, weight_name=file, use_safetensors=True, **into(name))
    pipeline.fuse_lora(**({"components": [pipeline.transformer_name, *others]} if others else {}))
    pipeline.unload_lora_weights()
    put_scheduler(pipeline, folder)
    return pipeline


def put_scheduler(pipeline: Any, folder: Path) -> None:
    """Make the scheduler that lies beside the LoRA in ``folder`` the pipeline's."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    put(pipeline, "scheduler", getattr(diffusers, config["_class_name"]).from_config(config))


def into(component: str) -> dict[str, bool]:
    """The argument of diffusers' ``load_lora_weights`` that names another network than the first."""
    return {f"load_into_{component}": True}


def load_adapter(pipeline: Any, components: Sequence[str], folder: Path, student: AdapterView) -> None:
    """Copy the LoRA in ``folder``, of the ``components`` that denoise, into the student's adapter.

    What is copied is its delta, whatever the student's alpha.

    Raises:
        InputError: its layers or ranks are not the student's.
    """
    weights: dict[str, Any] = {}
    for component, file in lora_files(components).items():
        if not (folder / file).is_file():
            raise InputError(f"student.init: expected a LoRA for {component} in {folder}, found no {file}")
        state = type(pipeline).lora_state_dict(folder, weight_name=file, use_safetensors=True)
        state = state[0] if isinstance(state, tuple) else state
        # Of kohya's names diffusers makes its own of earlier years.
        state = convert_unet_state_dict_to_peft(state)
        prefix = f"{component}." if len(components) > 1 else ""
        weights |= {prefix + name.removeprefix(f"{components[0]}."): value for name, value in state.items()}
    expected = get_peft_model_state_dict(student.backbone, adapter_name=student.adapter)
    different = sorted(weights.keys() ^ expected.keys())
    different += [name for name, value in expected.items() if name in weights and weights[name].shape != value.shape]
    if different:
        raise InputError(f"student.init: the LoRA in {folder} has other layers or another rank: {different[0]}")
    set_peft_model_state_dict(student.backbone, weights, adapter_name=student.adapter)
    with torch.no_grad():
        for layer in adapter_layers(student):
            layer.lora_B[student.adapter].weight.div_(layer.scaling[student.adapter])
