"""What a recipe's sections cannot see alone: keys that contradict each other, sources that are not there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill import assets
from stepdistill.data import picture
from stepdistill.data.forms import form
from stepdistill.data.sample import SUFFIXES
from stepdistill.published_runs import RUNS
from stepdistill.recipe_errors import found, suggest
from stepdistill.weight_files import SINGLE_FILE, files_in, lacking
from stepdistill.yaml_lines import Keys

if TYPE_CHECKING:
    from stepdistill.recipe import Recipe

SOURCES = "a folder, .jsonl, .tar, .parquet, .arrow or hub:OWNER/NAME"
"""Where samples may come from (:mod:`stepdistill.data.forms`), in words."""


def problems(recipe: "Recipe", config: Any) -> Iterator[tuple[Keys, str]]:
    """(key, problem) of each; ``config`` is the method's own section as its ``Config``."""
    teacher, student, data, train = recipe.teacher, recipe.student, recipe.data, recipe.train
    embedded, folder = assets.teachers(), Path(teacher.pipeline)
    if teacher.pipeline not in embedded:
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            problem = f"expected a pipeline in diffusers format, found no model_index.json in {folder}"
            yield ("teacher", "pipeline"), problem
        elif folder.is_dir() and (lack := lacking(files_in(folder), teacher.variant)) is not None:
            yield ("teacher", lack[0]), lack[1]
        if folder.is_file():
            yield ("teacher", "pipeline"), f"{SINGLE_FILE} at {folder}"
        elif not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", teacher.pipeline):
            known = (
                f"an embedded teacher ({', '.join(embedded) or 'none here'}), an existing folder or a hub id owner/name"
            )
            hint = suggest(teacher.pipeline, embedded)
            yield ("teacher", "pipeline"), f"expected {known}, found {found(teacher.pipeline)}{hint}"
    if student.init is not None and not Path(student.init).is_dir():
        yield ("student", "init"), f"expected a run folder or an exported pipeline, found nothing at {student.init}"
    training = recipe.role_training
    how = training["student"]
    if student.config and how != "full":
        yield ("student", "config"), f"expected none for a student that stands on the teacher's weights ({how})"
    if recipe.export.keys == "kohya" and (recipe.export.fuse or how == "full"):
        yield ("export", "keys"), "expected 'diffusers' for a student that is exported whole, found 'kohya'"
    if student.start is not None:
        if not recipe.method.implementation.may_start_lower(config):
            problem = f"expected null for {recipe.method.name} with these settings, found {student.start}; "
            yield ("student", "start"), f"{problem}its student learns from points of the teacher's path from t = 1"
        if student.start < student.steps - 1:
            problem = f"expected at least student.steps - 1 ({student.steps - 1}), found {student.start}"
            yield ("student", "start"), problem
    if teacher.quantize is not None:
        if teacher.precision != "bf16":
            yield ("teacher", "precision"), f"expected 'bf16' beside teacher.quantize, found {found(teacher.precision)}"
        if whole := [name for name, how in training.items() if how == "full"]:
            problem = f"expected 'lora' beside teacher.quantize; all weights of the {whole[0]} would be trained"
            given = (recipe.method.model_extra or {}).get("critic") if whole[0] == "critic" else None
            yield ("method", "critic") if given else ("student", "train"), problem
    for key, value in recipe.critic:
        if value is not None and training.get("critic") != "lora":
            holder = "a method without a critic" if "critic" not in training else "a critic that is trained whole"
            yield ("critic", key), f"expected null for {holder}, found {found(value)}"
    conditions = data.conditions
    known = ("classes", "captions", *assets.prompt_lists())
    if isinstance(conditions, str) and conditions not in known and form(conditions) is None:
        names = ", ".join(map(repr, known))
        yield ("data", "conditions"), f"expected {names}, a list, a .txt or {SOURCES}, {_nothing(conditions)}"
    if conditions == "captions" and data.images is None:
        yield ("data", "conditions"), "expected data.images beside 'captions', found null"
    if data.arguments and conditions != "captions":
        if isinstance(conditions, list) or form(conditions) in (None, "text"):
            problem = f"expected 'captions' or {SOURCES} beside data.arguments, found {found(conditions)}"
            yield ("data", "conditions"), problem
        if data.images is not None:
            problem = f"expected 'captions' beside data.arguments and data.images, found {found(conditions)}"
            yield ("data", "conditions"), problem
    for name in data.arguments:
        if not isinstance(teacher.arguments.get(name), str):
            problem = f"expected a picture, an example, as teacher.arguments.{name}"
            yield ("data", "arguments", name), f"{problem}, found {found(teacher.arguments.get(name))}"
    for name, value in teacher.arguments.items():
        pictured = isinstance(value, str) and Path(value).suffix.lower() in SUFFIXES and Path(value).is_file()
        if pictured and (problem := picture.misread(Path(value))):
            yield ("teacher", "arguments", name), f"{problem}, found {value}"
    if conditions == []:
        yield ("data", "conditions"), "expected at least one prompt, found an empty list"
    if data.images not in (None, "fashion-mnist") and form(data.images) in (None, "text"):
        yield ("data", "images"), f"expected 'fashion-mnist', {SOURCES}, {_nothing(data.images)}"
    for key, source in (("conditions", conditions), ("images", data.images)):
        if isinstance(source, str) and form(source) == "hub" and data.limit is None:
            yield ("data", key), "expected data.limit beside it, the number of samples to be streamed, found null"
    yield from _real_samples(recipe, config)
    guidance = teacher.guidance
    if guidance.interval is not None and not 0 <= guidance.interval[0] < guidance.interval[1] <= 1:
        problem = f"expected [low, high] with 0 <= low < high <= 1, found {guidance.interval}"
        yield ("teacher", "guidance", "interval"), problem
    if recipe.method.implementation.guides_itself:
        for key, off, value in (("interval", None, guidance.interval), ("rescale", 0.0, guidance.rescale)):
            if value != off:
                problem = f"expected {found(off)} for {recipe.method.name}, which forms guidance itself, found {value}"
                yield ("teacher", "guidance", key), problem
    for key, problem in recipe.method.implementation.problems(config, student.steps, train.steps):
        yield tuple(key.split(".")), problem
    if train.batch_size % train.accumulation:
        problem = f"expected a divisor of train.batch_size ({train.batch_size}), found {train.accumulation}"
        yield ("train", "accumulation"), problem
    shared = recipe.distributed
    if shared.shard and shared.zero:
        yield ("distributed", "zero"), f"expected null beside distributed.shard, found {shared.zero}"
    elif shared.shard or shared.zero:
        key, off = ("shard", "false") if shared.shard else ("zero", "null")
        if not recipe.method.implementation.shards:
            yield ("distributed", key), f"expected {off} for {recipe.method.name}, found {found(getattr(shared, key))}"
        if train.compile and shared.weights:
            yield ("train", "compile"), f"expected false beside distributed.{key}, found {found(train.compile)}"
        if train.optimizer != "adamw":
            yield ("train", "optimizer"), f"expected adamw beside distributed.{key}, found {train.optimizer}"
        if teacher.quantize is not None and shared.weights:
            yield ("teacher", "quantize"), f"expected null beside distributed.{key}, found {teacher.quantize}"
        if train.gradient_checkpointing is True and shared.zero == 3:
            problem = "expected false beside distributed.zero: 3, which lets go of weights when a block runs again"
            yield ("train", "gradient_checkpointing"), f"{problem}; found true"
    if train.gradient_checkpointing == "elementwise" and train.compile:
        problem = "expected true or false beside train.compile, which chooses itself what to keep; found elementwise"
        yield ("train", "gradient_checkpointing"), problem
    if max(train.betas) >= 1:
        yield ("train", "betas"), f"expected two numbers from 0 to below 1, found {train.betas}"
    solver_steps = (recipe.method.model_extra or {}).get("solver_steps", student.steps)
    if solver_steps < student.steps:
        yield ("student", "steps"), f"expected at most method.solver_steps ({solver_steps}), found {student.steps}"
    if student.steps > 50 and recipe.method.implementation.sampler_of(config) == "tcd":
        yield ("student", "steps"), f"expected at most 50, what the stock TCDScheduler takes, found {student.steps}"
    if train.lr_warmup > train.steps:
        yield ("train", "lr_warmup"), f"expected at most train.steps ({train.steps}), found {train.lr_warmup}"
    if recipe.published is not None and recipe.published not in RUNS:
        known = f"expected one of {', '.join(RUNS)}, or null"
        yield ("published",), f"{known}, found {found(recipe.published)}{suggest(recipe.published, [*RUNS])}"
    if recipe.output is not None:
        blocked = [path for path in (Path(recipe.output), *Path(recipe.output).parents) if path.is_file()]
        if blocked:
            yield ("output",), f"expected a folder, found a file at {blocked[0]}"
    if recipe.resume not in ("auto", "never") and not Path(recipe.resume).is_dir():
        hint = suggest(recipe.resume, ["auto", "never"])
        yield ("resume",), f"expected auto, never or an existing folder, found {found(recipe.resume)}{hint}"


def _real_samples(recipe: "Recipe", config: Any) -> Iterator[tuple[Keys, str]]:
    """Real samples from nowhere, from two places, or for nothing."""
    name, needs = recipe.method.name, recipe.method.implementation.data_needs(config)
    if recipe.data.images is None and needs.images:
        problem = f"trains on real images with these settings; expected data.images: 'fashion-mnist', {SOURCES}"
        instead = ", or method.real: teacher" if hasattr(config, "real") else ""
        yield ("method", "name"), f"{name} {problem}{instead}, found null"
    if getattr(config, "real", "data") == "teacher":
        if needs.made is None:
            problem = f"expected data, as {name} trains on no real samples with these settings"
            yield ("method", "real"), f"{problem}, found teacher"
        elif recipe.data.images is not None:
            problem = f"expected null beside method.real: teacher, found {recipe.data.images}"
            yield ("data", "images"), f"{problem}; for its captions name it in data.conditions"


def _nothing(source: str) -> str:
    """The end of a message about a path that is no source of samples."""
    return (
        f"found {Path(source).suffix or 'a text file'} at {source}"
        if Path(source).exists()
        else (f"found nothing at {source}")
    )
