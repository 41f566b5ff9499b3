"""The model card of an exported pipeline: README.md with the metadata the hub reads and a snippet that runs."""

import json
from pathlib import Path
from typing import Any

from stepdistill import assets
from stepdistill.exporting.stock_call import declared
from stepdistill.guidance import rule_text, stated_rule
from stepdistill.pipeline.ip_adapter import stock_arguments
from stepdistill.pipeline.observe import guidance_argument
from stepdistill.pipeline.trace import Trace
from stepdistill.recipe import IPAdapter
from stepdistill.text_files import read_text, write_text

PLACE = "PATH_OF_THIS_FOLDER"
"""Where the card's snippets name the folder; an upload puts the repository there."""
NOT_MEASURED = (
    "Not measured yet: `stepdistill bench PATH_OF_THIS_FOLDER --protocol teacher-fid-5k-v1` compares it with "
    "its teacher (where it takes prompts, on those in `data/prompts.txt`)."
)


def model_card(facts: dict[str, Any], trace: Trace, error: float, half: bool = False) -> str:
    """The card's text.

    Args:
        facts: the export's stepdistill.json. error: the verified difference to the training-time sampler.
        half: whether some of its files are in half precision, which not all versions of the libraries load as float32.
    """
    steps, name, scheduler = facts["steps"], type(trace.pipeline).__name__, type(trace.pipeline.scheduler).__name__
    asked = {
        "prompt": f"prompt={json.dumps(_example(facts), ensure_ascii=False)}",
        "class_labels": "class_labels=[0, 1, 2, 3]",
        "batch_size": "batch_size=4",
    }
    argument, result = asked[trace.entry], "frames" if len(trace.latent_shape) == 4 else "images"
    place, imported, attached, reloaded = "inside the weights", "", "", "with plain diffusers"
    if facts["adapter"]:
        place = "in the adapter beside them (`guidance_adapter.safetensors`); without it they are the unguided model"
        imported = "import stepdistill\n"
        attached = f'stepdistill.attach(pipe, "PATH_OF_THIS_FOLDER", scale={facts["guidance"]:g})\n'
        reloaded = "and the adapter attached"
    base, classes = '"PATH_OF_THIS_FOLDER"', name
    if facts["form"] == "lora":
        base, classes = f'"{facts["teacher"]}"', f"{scheduler}, {name}"
        if facts.get("revision"):
            base += f', revision="{facts["revision"]}"'
        if variant := facts["recipe"]["teacher"].get("variant"):
            base += f', variant="{variant}"'
        if facts["teacher"] in assets.teachers():
            base, imported = f'assets.find("teachers/{facts["teacher"]}")', "from stepdistill import assets\n"
        place = "inside the LoRA"
        attached = f"""pipe.load_lora_weights("PATH_OF_THIS_FOLDER")  # at scale 1.0, the default
pipe.scheduler = {scheduler}.from_pretrained("PATH_OF_THIS_FOLDER", subfolder="scheduler")
"""
    if adapter := facts["recipe"]["teacher"].get("ip_adapter"):
        how = stock_arguments(IPAdapter(**adapter))
        origin = how.pop("pretrained_model_name_or_path_or_dict")
        settings = "".join(f", {name}={value!r}" for name, value in how.items())
        attached += f"pipe.load_ip_adapter({origin!r}{settings})\npipe.set_ip_adapter_scale({adapter['scale']:g})\n"
    # The hub reads these: a base model must be one of its own, and the kind of result finds the page.
    known = (
        [] if Path(facts["teacher"]).exists() or "/" not in facts["teacher"] else [f"base_model: {facts['teacher']}"]
    )
    if known:
        known.append(f"base_model_relation: {'adapter' if facts['form'] == 'lora' else 'finetune'}")
    if trace.entry == "prompt":
        known.append(f"pipeline_tag: text-to-{'video' if result == 'frames' else 'image'}")
    metadata = "".join(f"{line}\n" for line in known)
    tags = ", ".join(
        ["diffusion", "distillation", "few-step", facts["method"], *(["lora"] * (facts["form"] == "lora"))]
    )
    kept = "its config holds the step grid; keep it"
    if trace.pipeline.scheduler.config.get("shift_terminal"):
        kept += "; it makes no grid of a single step"
    guidance = guidance_argument(trace.pipeline)
    settings = "" if guidance is None else f", {guidance.name}={facts['call_guidance']:g}"
    pictures = trace.pictures
    stated = declared(trace.pipeline, dict(trace.arguments))
    settings += "".join(f", {name}={value!r}" for name, value in stated.items() if name not in pictures)
    settings += "".join(f', {name}=load_image("{Path(trace.arguments[name]).name}")' for name in pictures)
    imported = ("from diffusers.utils import load_image\n" if pictures else "") + imported
    return f"""---
library_name: diffusers
license: other
license_name: as-the-teacher
{metadata}tags: [{tags}]
---

# {facts["teacher"]} in {steps} step{"s" if steps > 1 else ""}

A {steps}-step {name}, distilled from `{facts["teacher"]}` with stepdistill. One network pass per step, no
classifier-free guidance: guidance {facts["guidance"]:g}{rule_text(stated_rule(facts))} of the teacher is {place}.

```python
{"import torch" + chr(10) if half else ""}{imported}from diffusers import {classes}

pipe = {name}.from_pretrained({base}){".to(torch.float32)" if half else ""}
{attached}{result} = pipe({argument}, num_inference_steps={steps}{settings}).{result}
```

| | |
|---|---|
| NFE per image | {steps} |
| method | {facts["method"]}, {facts["trained_steps"]} training steps |
| scheduler | {scheduler}, {kept} |
| teacher | {facts["teacher"]}, guidance scale {facts["guidance"]:g}{rule_text(stated_rule(facts))} |
| licence | that of the teacher: the student is a derivative of its weights |
| checked | reloaded {reloaded}, differs from the training-time sampler by {error:.1e} |

## Quality

{NOT_MEASURED}

The complete recipe and the library versions are in `stepdistill.json`.
"""


def _example(facts: dict[str, Any]) -> str:
    """A prompt of those that the student was trained with, where the recipe lists them."""
    conditions = facts["recipe"].get("data", {}).get("conditions")
    if conditions in assets.prompt_lists():
        conditions = read_text(assets.prompts(conditions)).splitlines()
    return conditions[len(conditions) // 2] if isinstance(conditions, list) else "a photo of a cat"


def fill_in_quality(card: Path, report: str) -> None:
    """Put a report's Markdown where the card says that nothing was measured yet."""
    body = report.partition("\n")[2].strip()
    write_text(card, card.read_text(encoding="utf-8").replace(NOT_MEASURED, body))
