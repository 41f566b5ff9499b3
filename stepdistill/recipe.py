"""The recipe: one YAML file that states a run completely. Its schema, reading, overrides, and the checks.

    recipe = load("recipes/quickstart.yaml", ["train.steps=20"])
    recipe.to_yaml()            # resolved: every default written out; feeds back in unchanged

Paths in a recipe are relative to the folder the command is run in.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from stepdistill import assets, yaml_lines
from stepdistill.errors import InputError
from stepdistill.method_lookup import find_method
from stepdistill.recipe_checks import problems
from stepdistill.recipe_errors import describe, found, section_words, suggest
from stepdistill.text_files import read_text
from stepdistill.yaml_lines import Keys


class Section(BaseModel):
    """One section of the recipe: no unknown keys, no silent conversions ("20" is not 20, true is not 1)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class Guidance(Section):
    scale: float = Field(1.0, ge=0, description="w in uncond + w (cond - uncond); 1 is off")
    interval: list[float] | None = Field(
        None, min_length=2, max_length=2, description="[low, high]: times (1 is noise) with guidance; null: all of them"
    )
    rescale: float = Field(0.0, ge=0, le=1, description="phi: how far the result gets the conditional one's deviation")

    @property
    def rule(self) -> Any:
        """Everything but the scale, as :class:`stepdistill.kernels.Rule`."""
        from stepdistill.kernels import Rule

        return Rule(rescale=self.rescale, interval=None if self.interval is None else tuple(self.interval))


class IPAdapter(Section):
    source: str = Field(min_length=1, description="folder or hub id that holds it, such as h94/IP-Adapter")
    weights: str = Field(
        pattern=r"\.safetensors$", description="its file there, such as models/ip-adapter_sd15.safetensors"
    )
    image_encoder: str = Field(
        "image_encoder", min_length=1, description="folder of its encoder there; without a slash: beside the weights"
    )
    scale: float = Field(1.0, ge=0, description="how much the picture counts beside the prompt")


class Teacher(Section):
    pipeline: str = Field(
        min_length=1, description="name of an embedded teacher, a folder in diffusers format, or a hub id owner/name"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    variant: str | None = Field(
        None, pattern=r"^\w+$", description="of its weights' files, such as fp16; null: those with plain names"
    )
    guidance: Guidance = Field(Guidance(), description="the guidance that is distilled into the student")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the frozen weights; what is trained is float32")
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="linear layers of the frozen backbone in 4 bits (bitsandbytes) or 8 (torchao)",
    )
    ip_adapter: IPAdapter | None = Field(None, description="shows the network the picture arguments.ip_adapter_image")
    arguments: dict[str, Any] = Field(
        {}, description="further arguments of the pipeline's call: height, width, num_frames, negative_prompt, ..."
    )

    @field_validator("pipeline")
    @classmethod
    def _home(cls, value: str) -> str:
        return os.path.expanduser(value)


class Student(Section):
    steps: int = Field(ge=1, le=100, description="steps (= NFE per image) the student is trained for")
    start: int | None = Field(
        None,
        ge=0,
        description="stock timestep of the first step, an index of the noise table, such as 399; the input stays pure "
        "noise. null: the noise end; flow models have no other",
    )
    shift: float | None = Field(
        None,
        gt=0,
        description="shift s of a flow model's sampling grid, t = s u/(1 + (s - 1) u); null: the pipeline's own at the "
        "size that is trained",
    )
    train: Literal["full", "lora"] = Field("full", description="train all weights, or a LoRA adapter")
    rank: int = Field(
        32,
        gt=0,
        # The second is its name in the recipes of earlier runs.
        validation_alias=AliasChoices("rank", "lora_rank"),
        description="rank of the adapter when train is lora",
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="the adapter adds (alpha / rank) B A; null: the rank. A smaller alpha slows training by as much",
    )
    targets: Literal["auto"] | list[str] = Field(
        "auto",
        description="layers with an adapter: 'auto' (all linear ones, and the blocks' convolutions) or name endings",
    )
    config: dict[str, Any] = Field(
        {},
        description="for a student smaller than the teacher: keys of its network's config, such as {num_layers: 14}; "
        "blocks evenly spaced are kept with their weights",
    )
    init: str | None = Field(None, description="run folder or exported pipeline to start from; null: the teacher")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the exponential moving average per update; 0 is off")


class Critic(Section):
    rank: int | None = Field(None, gt=0, description="rank of the critic's adapter; null: student.rank")
    alpha: float | None = Field(
        None, gt=0, description="its alpha; null: student.alpha, or where that is null its own rank"
    )
    targets: Literal["auto"] | list[str] | None = Field(
        None, description="its layers, as in student.targets; null: student.targets"
    )


class Data(Section):
    conditions: str | list[str] = Field(
        "classes",
        description="'classes' (all of a class-conditional teacher), 'captions' (those of data.images), a shipped list "
        "such as 'everyday', a .txt with a prompt a line, a list, or whatever data.images takes, for its captions",
    )
    images: str | None = Field(
        None,
        description="real images: 'fashion-mnist', a folder of pictures, a .jsonl, webdataset shards (.tar), a Hugging "
        "Face dataset (folder, .parquet, .arrow) or hub:OWNER/NAME[:SPLIT]; null: none",
    )
    caption_key: str | None = Field(
        None, min_length=1, description="column, JSON key or ending of captions; null: caption, text or prompt"
    )
    image_key: str | None = Field(
        None, min_length=1, description="column, JSON key or ending of images; null: the first usual one"
    )
    arguments: dict[str, str] = Field(
        {},
        description="arguments of the pipeline's call for which every sample brings its own picture, {ARGUMENT: "
        "column, JSON key or ending}; teacher.arguments holds an example of each",
    )
    limit: int | None = Field(None, gt=0, description="samples taken of a source, the first ones; null: all")
    max_rejected: float = Field(
        0.1, ge=0, le=1, description="share of samples without usable image or caption that stops the run"
    )


class Method(BaseModel):
    """The method's name; every other key belongs to that method and is checked against its own ``Config``."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str = Field(description="a name that `stepdistill methods` lists, or a path FILE.py:CLASS")

    @property
    def implementation(self) -> Any:
        """The subclass of DistillMethod that ``name`` stands for."""
        return find_method(self.name)

    @property
    def config(self) -> Any:
        """The method's own settings as an instance of its ``Config``."""
        return self.implementation.Config.model_validate(self.model_extra)


class Train(Section):
    steps: int = Field(gt=0, description="training steps; a method says who moves in each")
    batch_size: int = Field(gt=0, description="samples per update, over all processes and accumulation")
    accumulation: int = Field(1, gt=0, description="micro-batches per update; must divide batch_size")
    lr: float = Field(gt=0, description="learning rate of the student (AdamW)")
    critic_lr: float | None = Field(None, gt=0, description="learning rate of the other players; null: that of lr")
    betas: list[NonNegativeFloat] = Field([0.9, 0.999], min_length=2, max_length=2, description="AdamW's, below 1")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    clip: float = Field(1.0, ge=0, description="largest gradient norm of each player; 0 is off")
    lr_warmup: int = Field(0, ge=0, description="updates of linear warm-up")
    lr_decay: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the forward passes; weights stay float32")
    gradient_checkpointing: bool | Literal["elementwise"] = Field(
        False,
        description="compute again in the backward pass instead of keeping: true: whole blocks; elementwise: outputs "
        "of activation functions and products only, which costs little time",
    )
    compile: bool | Literal["cuda-graphs"] = Field(
        False,
        description="torch.compile the networks: minutes at the start, faster steps on GPUs; cuda-graphs: their "
        "launches are replayed as well, which takes memory",
    )
    channels_last: bool = Field(False, description="weights of convolutions in channels-last order, for UNets on GPUs")
    attention_backend: str | None = Field(
        None, description="diffusers' attention backend (native, flash, xformers, ...)"
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit: moments in 8 bits (bitsandbytes)")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of everything random in the run")
    checkpoint_every: int = Field(100, gt=0, description="updates between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="checkpoints kept, the newest")
    preview_every: int = Field(50, gt=0, description="updates between previews")
    log_every: int = Field(10, gt=0, description="updates between lines of metrics.jsonl")
    watchdog_minutes: float | None = Field(
        30.0, gt=0, description="without a step, until the stacks of all threads are written down; null: never"
    )
    tracker: Literal["tensorboard", "none"] = Field("tensorboard", description="where metrics go beside metrics.jsonl")

    @model_validator(mode="after")
    def _same_rate(self) -> "Train":
        if self.critic_lr is None:
            self.critic_lr = self.lr
        return self


class Export(Section):
    fuse: bool = Field(
        False, description="write a LoRA student merged into a whole pipeline instead of as LoRA weights"
    )
    keys: Literal["diffusers", "kohya"] = Field(
        "diffusers", description="names in the LoRA file; kohya's for UNets only"
    )
    half: bool = Field(False, description="the student's weights in float16: half the size")


class Distributed(Section):
    processes: int | None = Field(
        None, ge=1, description="processes on this machine; null: one for each GPU. A launcher's own number goes first"
    )
    shard: bool = Field(
        False, description="share the networks' weights out among the processes (FSDP) instead of copies"
    )
    zero: Literal[2, 3] | None = Field(
        None, description="DeepSpeed ZeRO's stage: 2 shares out gradients and the optimizer's state, 3 weights as well"
    )

    @property
    def weights(self) -> bool:
        """Whether the networks' weights are shared out, by either library."""
        return self.shard or self.zero == 3


class Evaluation(Section):
    every: int = Field(0, ge=0, description="updates between measurements of the student in training; 0: none")
    samples: int = Field(256, ge=16, description="images per measurement")
    metric: Literal["teacher_kid_enet", "teacher_fd_enet", "kid_enet", "fd_enet", "kid_classifier", "fd_classifier"] = (
        Field(
            "teacher_kid_enet",
            description="against the teacher's samples (any pipeline) or the embedded protocol's images",
        )
    )
    keep_best: int = Field(1, gt=0, description="best checkpoints kept beside the newest; the very best is exported")
    patience: int | None = Field(None, gt=0, description="stop after so many measurements in a row without a better")


class Report(Section):
    samples: int = Field(1000, ge=0, description="images per row of the report; 0: no report")
    steps: list[PositiveInt] = Field([1, 2, 4], min_length=1, description="numbers of steps the student is measured at")
    networks: list[Literal["classifier", "enet"]] = Field(
        ["classifier", "enet"], min_length=1, description="feature networks of FD and KID"
    )
    solvers: bool = Field(True, description="also measure the teacher under stock fast solvers at the same NFE")


class Recipe(Section):
    """A complete run. Build it with :func:`load`, which also checks what one section alone cannot know."""

    teacher: Teacher = Field(description="the pipeline to distil")
    student: Student = Field(description="the few-step denoiser to be trained")
    critic: Critic = Field(Critic(), description="the critic's adapter, where the method has a critic that is a LoRA")
    data: Data = Field(Data(), description="what the method trains on")
    method: Method = Field(description="the distillation method and its own settings")
    train: Train = Field(description="optimisation, checkpoints, logging")
    export: Export = Field(Export(), description="what a LoRA student is written as")
    evaluation: Evaluation = Field(Evaluation(), description="measurements during the run, few samples each")
    report: Report = Field(Report(), description="the measurement at the end of the run")
    distributed: Distributed = Field(Distributed(), description="the processes that share the run's batches")
    published: str | None = Field(
        None, description="the published run that these settings come from; `stepdistill plan` sets it beside this one"
    )
    output: str | None = Field(None, min_length=1, description="run folder; null: runs/NAME OF THE RECIPE FILE")
    resume: str = Field("auto", min_length=1, description="auto, never, or a checkpoint or run folder")

    @property
    def role_training(self) -> dict[str, Literal["full", "lora", "frozen"]]:
        """How each role beside the teacher gets its weights: by its method's word, else by ``student.train``."""
        implementation = self.method.implementation
        names = ("student", *implementation.extra_roles)
        return dict.fromkeys(names, self.student.train) | dict(implementation.role_training(self.method.config))

    def to_yaml(self) -> str:
        """The resolved recipe; ``load`` of it gives an equal recipe."""
        return yaml_lines.dump(self.model_dump(mode="json"))


def load(source: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), safe: bool = False) -> Recipe:
    """Read, override, resolve and check a recipe.

    Args:
        source: a recipe file, the name of a shipped recipe, or the recipe as nested dicts.
        overrides: ``dotted.key=value``, the value read as YAML; later ones win.
        safe: refuse a recipe that names Python code, before any of it is run.

    Raises:
        InputError: one line with the file and line (or the override), the key, what was expected and found.
    """
    draft = _Draft(source)
    for override in overrides:
        draft.override(override)
    recipe = draft.validate(Recipe, draft.tree)
    draft.check(("method", "name"), lambda: find_method(recipe.method.name, safe))
    settings, owner = recipe.method.model_extra, f" of method {recipe.method.name}"
    config = draft.validate(recipe.method.implementation.Config, settings, ("method",), owner)
    recipe.method = Method(name=recipe.method.name, **config.model_dump(mode="json"))
    for keys, problem in problems(recipe, config):
        raise draft.error(keys, problem)
    if recipe.output is None:
        recipe.output = f"runs/{draft.stem or recipe.method.name.rpartition(':')[2]}"
    return recipe


class _Draft:
    """A recipe before it is checked: the tree, and where each key in it was given."""

    def __init__(self, source: str | Path | dict[str, Any] | Recipe):
        self.places: dict[Keys, str] = {}
        self.stem = ""
        if isinstance(source, Recipe):
            source = source.model_dump(mode="json")
        if isinstance(source, dict):
            self.name, self.tree = "recipe", _copy(source)
            return
        path = _existing(source)
        self.name, self.stem = str(path), path.stem
        self.tree, lines = yaml_lines.read(read_text(path), self.name)
        self.places = {keys: f"{path}:{line}" for keys, line in lines.items()}
        if not isinstance(self.tree, dict):
            kind = "an empty file" if self.tree is None else found(self.tree)
            raise InputError(f"{path}:1: expected {section_words(Recipe)}, found {kind}")

    def override(self, text: str) -> None:
        dotted, equals, value = text.partition("=")
        here = f"override {found(text)}"
        if not equals or not all(re.fullmatch(r"\w+", key) for key in dotted.split(".")):
            raise InputError(f"{here}: expected dotted.key=value, such as train.steps=20")
        keys: Keys = tuple(dotted.split("."))
        tree = self.tree
        for depth, key in enumerate(keys[:-1]):
            if tree.get(key) is None:
                tree[key] = {}
                self.places[keys[: depth + 1]] = here
            tree = tree[key]
            if not isinstance(tree, dict):
                parent = ".".join(keys[: depth + 1])
                raise InputError(f"{here}: expected a section at {parent}, found {found(tree)}")
        try:
            tree[keys[-1]] = yaml_lines.read(value, here)[0]
        except InputError as error:
            raise InputError(re.sub(r":\d+: ", ": ", str(error), count=1)) from None
        self.places = {known: place for known, place in self.places.items() if known[: len(keys)] != keys}
        self.places[keys] = here

    def error(self, keys: Keys, problem: str) -> InputError:
        """``problem`` at the nearest place that the user wrote."""
        place = next((self.places[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.places), self.name)
        dotted = ".".join(map(str, keys))
        return InputError(" ".join(f"{place}: {dotted}: {problem}".split()))

    def check(self, keys: Keys, function: Any) -> None:
        """Run ``function``; an InputError of it is one about ``keys``."""
        try:
            function()
        except InputError as error:
            raise self.error(keys, str(error)) from None

    def validate(self, model: type[BaseModel], tree: dict[str, Any], prefix: Keys = (), owner: str = "") -> Any:
        """``tree`` as a ``model``; ``prefix`` is where it stands in the recipe, ``owner`` whose keys they are."""
        try:
            # As JSON, strictness is that of a file: a list is a fine tuple, but "20" is not 20 and true is not 1.
            return model.model_validate_json(json.dumps(tree, default=str), strict=True)
        except ValidationError as error:
            problems = [(*describe(one, model, tree, owner), one["type"]) for one in error.errors(include_url=False)]
        # A misspelt key shows as unknown and as missing: the first says what to do.
        keys, problem, _ = min(problems, key=lambda problem: problem[2] != "extra_forbidden")
        raise self.error(prefix + keys, problem)


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        inside = path / "recipe.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise InputError(f"{path}: expected a recipe file, found a folder{hint}")
    if path.exists():
        return path
    try:
        return assets.recipe(str(source))
    except InputError as error:
        beside = [str(other) for other in path.parent.glob("*.yaml")]
        raise InputError(f"{error}{suggest(str(path), [*beside, *assets.recipes()])}") from None


def _copy(tree: Any) -> Any:
    """The tree with its own dicts and lists, so that overrides do not reach the caller's."""
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(item) for item in tree] if isinstance(tree, list | tuple) else tree
