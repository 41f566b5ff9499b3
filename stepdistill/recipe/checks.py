"""The rules that a recipe's sections cannot check alone: keys that contradict each other, sources that do not exist.

A rule is a function of the recipe and the method's own section as its ``Config``, or of the recipe alone; it yields
what is wrong, as (key, problem). What depends on one section's text alone is checked in
:mod:`stepdistill.recipe.schema`.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill import assets
from stepdistill.data import picture
from stepdistill.data.sample import SUFFIXES
from stepdistill.data.sources import form
from stepdistill.errors import InputError, found, suggest
from stepdistill.files import files_in, index_of, lacking
from stepdistill.recipe.published_runs import RUNS
from stepdistill.recipe.yaml_lines import Keys

if TYPE_CHECKING:
    from stepdistill.recipe.schema import Guidance, Recipe

Problems = Iterator[tuple[Keys, str]]

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
SOURCES = "a folder, .jsonl, .csv, .tar, .parquet or .arrow, a pattern or URL of these, or hub:OWNER/NAME"
"""Where samples may come from (:mod:`stepdistill.data.sources`), in words."""


def problems(recipe: "Recipe", config: Any) -> Problems:
    """(key, problem) of each; ``config`` is the method's own section as its ``Config``."""
    for rule in RULES:
        yield from rule(recipe, config)


def missing(recipe: "Recipe") -> Problems:
    """(key, problem) of what is named and is not there; methods are not imported, as torch takes seconds to load."""
    for rule in SOURCE_RULES:
        yield from rule(recipe)


def _expected(key: str, expected: str, value: Any) -> tuple[Keys, str]:
    return tuple(key.split(".")), f"expected {expected}, found {found(value)}"


def teacher_pipeline(recipe: "Recipe") -> Problems:
    """A pipeline that is not there, or not in diffusers format with safetensors."""
    pipeline, embedded = recipe.teacher.pipeline, assets.teachers()
    folder = Path(pipeline)
    if pipeline in embedded:
        return
    if folder.is_file():
        if folder.suffix != ".safetensors":
            expected = "a folder in diffusers format, a checkpoint file as .safetensors or a hub id"
            key, problem = _expected("teacher.pipeline", expected, pipeline)
            yield key, f"{problem}; files of other kinds may hold pickles, which are not read"
        if recipe.teacher.variant is not None:
            yield _expected("teacher.variant", "null for a checkpoint file", recipe.teacher.variant)
    elif not folder.is_dir():
        if not re.fullmatch(HUB_ID, pipeline):
            known = f"an embedded teacher ({', '.join(embedded) or 'none here'}), an existing folder or a hub id"
            key, problem = _expected("teacher.pipeline", f"{known} owner/name", pipeline)
            yield key, f"{problem}{suggest(pipeline, embedded)}"
    elif index_of(folder) is None:
        problem = f"expected a pipeline in diffusers format, found no model_index.json in {folder}"
        yield ("teacher", "pipeline"), problem
    elif (lack := lacking(files_in(folder), recipe.teacher.variant)) is not None:
        yield ("teacher", lack[0]), lack[1]


def teacher_files(recipe: "Recipe") -> Problems:
    """Files that are put into the teacher: not there, or no safetensors."""
    teacher = recipe.teacher
    if teacher.config is not None and not Path(teacher.pipeline).is_file():
        yield _expected("teacher.config", "null for a pipeline that is no checkpoint file", teacher.config)
    for kind in ("loras", "embeddings"):
        for number, entry in enumerate(getattr(teacher, kind)):
            file = Path(entry.file)
            if file.suffix != ".safetensors" or not file.is_file():
                yield ("teacher", kind, number, "file"), f"expected a .safetensors file, {_nothing(entry.file)}"
    vae = Path(teacher.vae or ".")
    usable = vae.is_dir() or (vae.suffix == ".safetensors" and vae.is_file())
    if not usable and (vae.exists() or not re.fullmatch(HUB_ID, teacher.vae)):
        yield ("teacher", "vae"), f"expected a folder, a .safetensors file or a hub id, {_nothing(teacher.vae)}"


def student_weights(recipe: "Recipe", config: Any) -> Problems:
    """Where the student's weights come from, and what they are written as."""
    student, how = recipe.student, recipe.role_training["student"]
    if student.init is not None and not Path(student.init).is_dir():
        yield ("student", "init"), f"expected a run folder or an exported pipeline, found nothing at {student.init}"
    if student.config and how != "full":
        yield ("student", "config"), f"expected none for a student that stands on the teacher's weights ({how})"
    if recipe.export.keys == "kohya" and (recipe.export.fuse or how == "full"):
        yield _expected("export.keys", "'diffusers' for a student that is exported whole", "kohya")


def student_steps(recipe: "Recipe", config: Any) -> Problems:
    """Steps and a start that the method or the stock scheduler does not take."""
    student, method = recipe.student, recipe.method
    if student.start is not None and not method.implementation.may_start_lower(config):
        key, problem = _expected("student.start", f"null for {method.name} with these settings", student.start)
        yield key, f"{problem}; its student learns from points of the teacher's path from t = 1"
    solver_steps = (method.model_extra or {}).get("solver_steps", student.steps)
    if solver_steps < student.steps:
        yield _expected("student.steps", f"at most method.solver_steps ({solver_steps})", student.steps)
    if student.steps > 50 and method.implementation.sampler_of(config) == "tcd":
        yield _expected("student.steps", "at most 50, what the stock TCDScheduler takes", student.steps)


def quantized(recipe: "Recipe", config: Any) -> Problems:
    """Weights in 4 or 8 bits are frozen and surrounded by bfloat16."""
    if recipe.teacher.quantize is None:
        return
    if recipe.teacher.precision != "bf16":
        yield _expected("teacher.precision", "'bf16' beside teacher.quantize", recipe.teacher.precision)
    if whole := [name for name, how in recipe.role_training.items() if how == "full"]:
        problem = f"expected 'lora' beside teacher.quantize; all weights of the {whole[0]} would be trained"
        given = (recipe.method.model_extra or {}).get("critic") if whole[0] == "critic" else None
        yield ("method", "critic") if given else ("student", "train"), problem


def quantized_student(recipe: "Recipe", config: Any) -> Problems:
    """Weights that are rounded in training are trained whole, and written as they are."""
    if recipe.student.quantize is None:
        return
    if recipe.role_training["student"] != "full":
        why = "'full' beside student.quantize; under an adapter it is teacher.quantize"
        yield _expected("student.train", why, recipe.student.train)
    if recipe.export.dtype != "fp32":
        why = "'fp32' beside student.quantize, whose weights other roundings would move"
        yield _expected("export.dtype", why, recipe.export.dtype)
    if recipe.distributed.shard:
        yield _expected("distributed.shard", "false beside student.quantize", True)


def stored(recipe: "Recipe", config: Any) -> Problems:
    """Weights in 8-bit floats or in the host's memory, and what needs plain ones."""
    teacher, train = recipe.teacher, recipe.train
    for key in ("storage", "offload"):
        if getattr(teacher, key) is None:
            continue
        for other, off, value in (
            ("teacher.quantize", None, teacher.quantize),
            ("train.compile", False, train.compile),
            ("train.channels_last", False, train.channels_last),
            ("distributed.shard", False, recipe.distributed.shard),
        ):
            if value != off:
                yield _expected(other, f"{found(off)} beside teacher.{key}", value)


def critic(recipe: "Recipe", config: Any) -> Problems:
    """Settings of an adapter that the critic does not have."""
    how = recipe.role_training.get("critic")
    holder = "a method without a critic" if how is None else "a critic that is trained whole"
    for key, value in recipe.critic:
        if value is not None and how != "lora":
            yield _expected(f"critic.{key}", f"null for {holder}", value)


def listed(recipe: "Recipe") -> Problems:
    """Sources that cannot be listed, and those of several kinds of files."""
    for key, source in (("conditions", recipe.data.conditions), ("images", recipe.data.images)):
        try:
            if isinstance(source, str):
                form(source)
        except InputError as error:
            yield ("data", key), str(error)


def conditions(recipe: "Recipe") -> Problems:
    """Conditions from nowhere."""
    data, known = recipe.data, ("classes", "captions", *assets.prompt_lists())
    if isinstance(data.conditions, str) and data.conditions not in known and form(data.conditions) is None:
        names = ", ".join(map(repr, known))
        problem = f"expected {names}, a list, a .txt or {SOURCES}, {_nothing(data.conditions)}"
        yield ("data", "conditions"), problem
    if data.conditions == "captions" and data.images is None:
        yield _expected("data.conditions", "data.images beside 'captions'", None)


def own_pictures(recipe: "Recipe") -> Problems:
    """Samples with pictures of their own: where these come from, and an example of each."""
    data, examples = recipe.data, recipe.teacher.arguments
    if data.arguments and data.conditions != "captions":
        if isinstance(data.conditions, list) or form(data.conditions) in (None, "text"):
            yield _expected("data.conditions", f"'captions' or {SOURCES} beside data.arguments", data.conditions)
        if data.images is not None:
            yield _expected("data.conditions", "'captions' beside data.arguments and data.images", data.conditions)
    for name in data.arguments:
        if not isinstance(examples.get(name), str):
            expected = f"a picture, an example, as teacher.arguments.{name}"
            yield _expected(f"data.arguments.{name}", expected, examples.get(name))
    for name, value in examples.items():
        for file in value if isinstance(value, list) else [value]:
            pictured = isinstance(file, str) and Path(file).suffix.lower() in SUFFIXES and Path(file).is_file()
            if pictured and (problem := picture.misread(Path(file))):
                yield ("teacher", "arguments", name), f"{problem}, found {file}"


def sources(recipe: "Recipe") -> Problems:
    """Samples from nowhere, or a stream without an end."""
    data = recipe.data
    if data.images not in (None, "fashion-mnist") and form(data.images) in (None, "text"):
        yield ("data", "images"), f"expected 'fashion-mnist', {SOURCES}, {_nothing(data.images)}"
    for key, source in (("conditions", data.conditions), ("images", data.images)):
        if isinstance(source, str) and form(source) == "hub" and data.limit is None:
            yield _expected(f"data.{key}", "data.limit beside it, the number of samples to be streamed", None)


def live(recipe: "Recipe", config: Any) -> Problems:
    """Encoding during training, beside what changes the network that the pipeline calls or gives it pictures."""
    if recipe.data.encode == "store":
        return
    others = {"data.arguments": recipe.data.arguments, "train.compile": recipe.train.compile}
    others |= {"train.sizes": recipe.train.sizes}
    for key, value in (others | {"distributed.shard": recipe.distributed.shard}).items():
        if value:
            yield _expected("data.encode", f"'store' beside {key}", recipe.data.encode)


def groups(recipe: "Recipe", config: Any) -> Problems:
    """Groups of conditions beside what encodes them otherwise, or compares the student with all of them."""
    data, evaluation = recipe.data, recipe.evaluation
    if data.groups == 1:
        return
    encoding = {"data.encode": ("store", data.encode), "data.buckets": ("off", data.buckets)}
    encoding |= {"data.arguments": ({}, data.arguments), "train.sizes": (None, recipe.train.sizes)}
    encoding |= {"teacher.ip_adapter": (None, recipe.teacher.ip_adapter)}
    for key, (off, value) in encoding.items():
        if value != off:
            yield _expected(key, f"{found(off)} beside data.groups", value)
    if recipe.role_training["student"] == "frozen":
        yield _expected("data.groups", f"1 for {recipe.method.name}, whose student is beside its network", data.groups)
    if evaluation.every and not evaluation.metric.startswith("teacher_"):
        expected = "teacher_kid_enet or teacher_fd_enet beside data.groups, as the student draws one group"
        yield _expected("evaluation.metric", expected, evaluation.metric)


def real_samples(recipe: "Recipe", config: Any) -> Problems:
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


def sizes(recipe: "Recipe", config: Any) -> Problems:
    """Sizes that something else of the recipe sets as well, or that have nothing to be sizes of."""
    key = "train.sizes" if recipe.train.sizes else "data.buckets"
    for name in ("height", "width") if recipe.sizes else ():
        if name in recipe.teacher.arguments:
            yield _expected(f"teacher.arguments.{name}", f"none beside {key}", recipe.teacher.arguments[name])
    data, real = recipe.data, recipe.method.implementation.data_needs(config).images
    if recipe.train.sizes and real:
        expected = "null for a method that trains on real images, whose sizes are data.buckets"
        yield _expected("train.sizes", expected, recipe.train.sizes)
    if data.buckets != "off" and not real:
        expected = "off for a method that trains on no real images, whose sizes are train.sizes"
        yield _expected("data.buckets", expected, data.buckets)
    if data.buckets != "off" and (data.arguments or data.images == "fashion-mnist"):
        beside = "data.arguments" if data.arguments else "images of one size"
        yield _expected("data.buckets", f"off beside {beside}", data.buckets)
    if data.crop != "center" and (data.arguments or not real or data.images == "fashion-mnist"):
        why = "beside data.arguments" if data.arguments else "for images of one size"
        yield _expected("data.crop", f"center {why if real else 'without real images'}", data.crop)


def guidance(recipe: "Recipe", config: Any) -> Problems:
    """An interval that is none, and rules that a method without the teacher's guidance ignores."""
    guidance, method = recipe.teacher.guidance, recipe.method
    if guidance.interval is not None and not 0 <= guidance.interval[0] < guidance.interval[1] <= 1:
        yield _expected("teacher.guidance.interval", "[low, high] with 0 <= low < high <= 1", guidance.interval)
    yield from _numbers_of_rule(guidance)
    if method.implementation.guides_itself:
        for key, off in (("interval", None), ("rescale", 0.0), ("rule", "cfg"), ("guider", None)):
            if (value := getattr(guidance, key)) != off:
                expected = f"{found(off)} for {method.name}, which forms guidance itself"
                yield _expected(f"teacher.guidance.{key}", expected, value)


def _numbers_of_rule(guidance: "Guidance") -> Problems:
    """Numbers that this rule of guidance does not have."""
    if guidance.guider is not None:
        if not isinstance(guidance.guider.get("name"), str):
            yield _expected("teacher.guidance.guider", "{name: AutoGuidance, ...}", guidance.guider)
        for key, off in (("interval", None), ("rescale", 0.0), ("rule", "cfg")):
            if (value := getattr(guidance, key)) != off:
                yield _expected(f"teacher.guidance.{key}", f"{found(off)} beside teacher.guidance.guider", value)
    if guidance.rule == "apg":
        if guidance.momentum:
            why = "a training sample has no step before it; stepdistill sample --rule apg:ETA,NORM,MOMENTUM takes it"
            yield _expected("teacher.guidance.momentum", f"0, as {why}", guidance.momentum)
        if guidance.rescale:
            yield _expected("teacher.guidance.rescale", "0.0 for rule apg, which is of x_0", guidance.rescale)
        return
    for key in ("eta", "norm", "momentum"):
        if value := getattr(guidance, key):
            yield _expected(f"teacher.guidance.{key}", f"0 for rule {guidance.rule}, only apg has it", value)


def method(recipe: "Recipe", config: Any) -> Problems:
    """What the method itself refuses."""
    for key, problem in recipe.method.implementation.problems(config, recipe.student.steps, recipe.train.steps):
        yield tuple(key.split(".")), problem


def sharded(recipe: "Recipe", config: Any) -> Problems:
    """What sharded networks do not combine with."""
    train, name = recipe.train, recipe.method.name
    if not recipe.distributed.shard:
        return
    if not recipe.method.implementation.shards:
        yield _expected("distributed.shard", f"false for {name}", True)
    for key, off, value in (
        ("train.compile", False, train.compile),
        ("train.optimizer", "adamw", train.optimizer_of("student").name),
        ("train.critic_optimizer", "adamw", train.optimizer_of("critic").name),
        ("teacher.quantize", None, recipe.teacher.quantize),
    ):
        if value != off:
            yield _expected(key, f"{found(off)} beside distributed.shard", value)


def optimizers(recipe: "Recipe", config: Any) -> Problems:
    """Keys of the recipe that an optimizer has no use for, or has under another name."""
    train, names = recipe.train, {}
    for key, player in (("optimizer", "student"), ("critic_optimizer", "critic")):
        chosen = train.optimizer_of(player)
        names[key] = chosen.name
        for stated in ("lr", "betas", "weight_decay"):
            if stated in (chosen.model_extra or {}):
                yield ("train", key, stated), f"expected it as train.{stated}, found it here"
    if "adafactor" in names.values() and train.betas != type(train).model_fields["betas"].default:
        yield _expected("train.betas", "the default beside adafactor, which has none", train.betas)
    if names["optimizer"] == "schedulefree":
        why = "beside schedulefree, which averages the weights itself"
        if recipe.student.ema:
            yield _expected("student.ema", f"0 {why}", recipe.student.ema)
        if train.lr_decay != "constant":
            yield _expected("train.lr_decay", f"'constant' {why}", train.lr_decay)
        if not train.betas[0]:
            yield _expected("train.betas", f"a first one above 0 {why}", train.betas)


def compiled(recipe: "Recipe", config: Any) -> Problems:
    """torch.compile has its own answer to what is kept for the backward pass."""
    train = recipe.train
    if train.gradient_checkpointing == "elementwise" and train.compile:
        expected = "true or false beside train.compile, which chooses itself what to keep"
        yield _expected("train.gradient_checkpointing", expected, train.gradient_checkpointing)


def run(recipe: "Recipe") -> Problems:
    """A published run that is not known, and folders that are not there or are none."""
    if recipe.published is not None and recipe.published not in RUNS:
        key, problem = _expected("published", f"one of {', '.join(RUNS)}, or null", recipe.published)
        yield key, f"{problem}{suggest(recipe.published, [*RUNS])}"
    if recipe.output is not None:
        blocked = [path for path in (Path(recipe.output), *Path(recipe.output).parents) if path.is_file()]
        if blocked:
            yield ("output",), f"expected a folder, found a file at {blocked[0]}"
    if recipe.resume not in ("auto", "never") and not Path(recipe.resume).is_dir():
        key, problem = _expected("resume", "auto, never or an existing folder", recipe.resume)
        yield key, f"{problem}{suggest(recipe.resume, ['auto', 'never'])}"


SOURCE_RULES: tuple[Callable[["Recipe"], Problems], ...] = (
    *(teacher_pipeline, teacher_files, listed, conditions, own_pictures, sources, run),
)
RULES: tuple[Callable[["Recipe", Any], Problems], ...] = (
    *(student_weights, student_steps, quantized, quantized_student, stored, critic),
    *(live, groups, real_samples, sizes, guidance, method, sharded, optimizers, compiled),
)


def _nothing(source: str) -> str:
    """The end of a message about a path that is no source of samples."""
    if Path(source).exists():
        return f"found {Path(source).suffix or 'a text file'} at {source}"
    return f"found nothing at {source}"
