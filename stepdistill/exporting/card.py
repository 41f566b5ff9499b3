"""The model card of an exported pipeline: README.md with the metadata the hub reads and a snippet that runs."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from stepdistill import assets
from stepdistill.files import read_text, write_text
from stepdistill.pipeline.call import COUNTS, guidance_argument, one_each
from stepdistill.pipeline.exports import ExportFacts, into, lora_files
from stepdistill.pipeline.guiders import guiders
from stepdistill.pipeline.ip_adapter import stock_arguments
from stepdistill.pipeline.stock_call import dataclass_of, declared, is_modular, off, pictures_in, result_name
from stepdistill.pipeline.trace import Trace

PLACE = "PATH_OF_THIS_FOLDER"
"""Where the card's snippets name the folder; an upload puts the repository there."""
TEACHER = "PATH_OF_THE_TEACHER"
"""Where they name a teacher that is a folder or file of this machine."""
NOT_MEASURED = (
    "Not measured yet: `stepdistill bench PATH_OF_THIS_FOLDER --protocol teacher-fid-5k-v1` compares it with "
    "its teacher (where it takes prompts, on those in `data/prompts.txt`)."
)


def model_card(
    facts: ExportFacts,
    trace: Trace,
    error: float | None,
    half: bool = False,
    others: str = "",
    checked_in: torch.dtype = torch.float32,
) -> str:
    """The card's text.

    Args:
        facts: of the export.
        trace: the traced pipeline with the student's scheduler.
        error: the verified difference to the training-time sampler, relative; None: it was not measured.
        half: whether some of its files are in half precision, which not all versions of the libraries load as float32.
        others: the section about its files for other programs, in Markdown.
        checked_in: the precision in which it was measured.
    """
    template = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    scheduler = trace.pipeline.scheduler
    return environment.from_string(template).render(
        facts=facts,
        teacher=Path(facts.teacher).name if is_local(facts.teacher) else facts.teacher,
        metadata=_metadata(facts, trace),
        pipeline=type(trace.pipeline).__name__,
        scheduler=type(scheduler).__name__,
        stretched=bool(scheduler.config.get("shift_terminal")),
        passes=len(trace.guidance.passes) if trace.guidance.always else 1,
        guidance=f"{facts.guidance:g}{facts.teacher_guidance.in_words}",
        place=_place(facts),
        parts=_parts(facts),
        snippet=_snippet(facts, trace, half),
        checked=_checked(facts, error, checked_in),
        others=others,
        quality=NOT_MEASURED,
    )


def is_local(place: str) -> bool:
    """Whether a teacher or an autoencoder is a folder or a file here: a path that means nothing to anybody else."""
    return place not in assets.teachers() and (Path(place).exists() or place.startswith(("/", "~", ".")))


def _checked(facts: ExportFacts, error: float | None, dtype: torch.dtype) -> str:
    """What is known of a stock call."""
    if error is None:
        return "not checked (`export.check: off`): nobody has called this export yet"
    how = "the adapter attached" if facts.adapter else "with plain diffusers"
    precision = "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}"
    how = f"and {how}" if facts.adapter else how
    return f"reloaded {how}{precision}, differs from the training-time sampler by {error:.1e}"


def _metadata(facts: ExportFacts, trace: Trace) -> list[str]:
    """What the hub reads: a base model must be one of its own, and the kind of result finds the page."""
    lora, lines = facts.form == "lora", []
    if "/" in facts.teacher and not is_local(facts.teacher):
        lines = [f"base_model: {facts.teacher}", f"base_model_relation: {'adapter' if lora else 'finetune'}"]
    if trace.entry == "prompt":
        lines.append(f"pipeline_tag: text-to-{'video' if _is_video(trace) else 'image'}")
    tags = ["diffusion", "distillation", "few-step", facts.method, *(["lora"] if lora else [])]
    return [*lines, f"tags: [{', '.join(tags)}]"]


def _place(facts: ExportFacts) -> str:
    """Where the teacher's guidance is."""
    if facts.form == "lora":
        return "inside the LoRA"
    if facts.adapter:
        return "in the adapter beside them (`guidance_adapter.safetensors`); without it they are the unguided model"
    return "inside the weights"


def _parts(facts: ExportFacts) -> str:
    """What was put into the teacher before it was distilled, in a line; "" for nothing."""
    teacher = facts.origin
    named = [
        f"{Path(one.file).name} (scale {one.scale:g}{f', {one.component}' if one.component else ''})"
        for one in teacher.loras
    ]
    parts = [f"LoRA {', '.join(named)}"] if named else []
    if teacher.vae:
        parts.append(f"autoencoder {Path(teacher.vae).name if is_local(teacher.vae) else teacher.vae}")
    words = [f"{Path(one.file).name}{f' (`{one.token}`)' if one.token else ''}" for one in teacher.embeddings]
    return "; ".join([*parts, *([f"textual inversion {', '.join(words)}"] if words else [])])


def _snippet(facts: ExportFacts, trace: Trace, half: bool) -> str:
    """Python that loads the export and draws from it."""
    name, scheduler = type(trace.pipeline).__name__, type(trace.pipeline.scheduler).__name__
    lora, embedded = facts.form == "lora", facts.teacher in assets.teachers()
    named = half or getattr(trace.pipeline, "needs_generator", False)
    imports = ["import torch"] if named else []
    files = [file for name in trace.pictures for file in pictures_in(trace.arguments[name])]
    tensors = [file for file in files if file.endswith(".npy")]
    imports += ["import numpy", "import torch"][: 1 if named else 2] if tensors else []
    imports += ["from diffusers.utils import load_image"] if len(tensors) < len(files) else []
    base, lines = f'"{PLACE}"', []
    if lora:
        base = f'assets.find("teachers/{facts.teacher}")' if embedded else _base(facts)
        lines.append(f'pipe.load_lora_weights("{PLACE}")  # at scale 1.0, the default')
        for component, file in list(lora_files(trace.components).items())[1:]:
            lines.append(f'pipe.load_lora_weights("{PLACE}"{_keywords({"weight_name": file} | into(component))})')
        lines.append(f'pipe.scheduler = {scheduler}.from_pretrained("{PLACE}", subfolder="scheduler")')
        for one, guider in guiders(trace.pipeline).items():
            lines.append(f"pipe.{one} = pipe.{one}.new({_keywords(off(guider)).removeprefix(', ')})")
    elif facts.adapter:
        lines.append(f'stepdistill.attach(pipe, "{PLACE}", scale={facts.guidance:g})')
    if getattr(getattr(trace.pipeline, "vae", None), "use_tiling", False):
        lines.append("pipe.vae.enable_tiling()")  # without which some decode nothing
    if lora and embedded:
        imports.append("from stepdistill import assets")
    elif facts.adapter:
        imports.append("import stepdistill")
    if (adapter := facts.ip_adapter) is not None:
        stock = stock_arguments(adapter)
        origin = stock.pop("pretrained_model_name_or_path_or_dict")
        origin = "PATH_OF_THE_IP_ADAPTER" if is_local(origin) else origin
        lines.append(f"pipe.load_ip_adapter({origin!r}{_keywords(stock)})")
        lines.append(f"pipe.set_ip_adapter_scale({adapter.scale:g})")
    imports.append(f"from diffusers import {f'{scheduler}, {name}' if lora else name}")
    kinds = dict.fromkeys(dataclass_of(trace.pipeline, name) for name in trace.pictures)
    imports += [f"from {kind.__module__} import {kind.__name__}" for kind in kinds if kind is not None]
    result = "frames" if _is_video(trace) else "images"
    if is_modular(trace.pipeline):
        stated = [f'variant="{facts.variant}"'] if lora and facts.variant else []
        stated += ["dtype=torch.float32"] if half else []
        base = base.replace(f', variant="{facts.variant}"', "")  # which its components take
        load = f"pipe = {name}.from_pretrained({base})\npipe.load_components({', '.join(stated)})"
        result = result_name(trace.pipeline)
        drawn = f'pipe({_call(facts, trace)}, output="{result}")'
    else:
        load = f"pipe = {name}.from_pretrained({base}){'.to(torch.float32)' if half else ''}"
        drawn = f"pipe({_call(facts, trace)}).{result}"
    return "\n".join([*imports, "", load, *lines, f"{result} = {drawn}"])


def _base(facts: ExportFacts) -> str:
    """The teacher's arguments of ``from_pretrained``."""
    revision = f', revision="{facts.revision}"' if facts.revision else ""
    variant = f', variant="{facts.variant}"' if facts.variant else ""
    return f'"{TEACHER if is_local(facts.teacher) else facts.teacher}"{revision}{variant}'


def _call(facts: ExportFacts, trace: Trace) -> str:
    """The arguments of a plain call."""
    guidance, pictures = guidance_argument(trace.pipeline), trace.pictures
    arguments = declared(trace.pipeline, dict(trace.arguments))
    first = {
        "prompt": f"prompt={json.dumps(_example(facts), ensure_ascii=False)}",
        "class_labels": "class_labels=[0, 1, 2, 3]",
        **{name: f"{name}=4" for name in COUNTS},
    }
    stated = guidance is None or guidance.name in arguments
    scale = "" if stated else f", {guidance.name}={facts.call_guidance:g}"
    plain = _keywords({name: value for name, value in arguments.items() if name not in pictures})
    kinds = {name: dataclass_of(trace.pipeline, name) for name in pictures}
    loaded = "".join(f", {name}={_loaded(trace.arguments[name], kinds[name])}" for name in pictures)
    if getattr(trace.pipeline, "needs_generator", False):
        loaded += ", generator=torch.Generator().manual_seed(0)"
    return f"{first[trace.entry]}, num_inference_steps={facts.steps}{scale}{plain}{loaded}"


def _loaded(pictures: Any, kind: type | None = None) -> str:
    """The code that loads a picture or a tensor, or a list of several; a list of one is one for each prompt.

    Args:
        kind: what the call takes for a dict.
    """
    if isinstance(pictures, dict) and kind is not None:
        entries = (f"{n}={_loaded(v) if pictures_in(v) else repr(v)}" for n, v in pictures.items())
        return f"{kind.__name__}({', '.join(entries)})"
    if isinstance(pictures, list | tuple):
        each = [_loaded(one, kind) for one in pictures]
        return each[0] if one_each(pictures) else f"[{', '.join(each)}]"
    name = pictures and Path(pictures).name
    if name is None:
        return "None"
    return f'torch.from_numpy(numpy.load("{name}"))' if name.endswith(".npy") else f'load_image("{name}")'


def _keywords(arguments: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in arguments.items())


def _is_video(trace: Trace) -> bool:
    joint = trace.denoiser.spec.joint  # a video and its sound
    return joint is not None or len(trace.latent_shape) == 4


def _example(facts: ExportFacts) -> str:
    """A prompt of those that the student was trained with, where the recipe lists them."""
    conditions = facts.conditions
    if conditions in assets.prompt_lists():
        conditions = read_text(assets.prompts(conditions)).splitlines()
    return conditions[len(conditions) // 2] if isinstance(conditions, list) else "a photo of a cat"


def fill_in_quality(card: Path, report: str) -> None:
    """Put a report's Markdown where the card says that nothing was measured yet."""
    body = report.partition("\n")[2].strip()
    body = re.sub(r"\n\n {4}[^\n]*$", "", body)  # the command, which names folders of this machine
    write_text(card, card.read_text(encoding="utf-8").replace(NOT_MEASURED, body))
