"""The schema of a recipe: its sections, their keys, defaults and descriptions (docs/recipe.md is made of them)."""

import os
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt, MaxLen, MinLen
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stepdistill.recipe import yaml_lines
from stepdistill.recipe.find_method import find_method
from stepdistill.recipe.section import (
    Critic,
    Distributed,
    Embedding,
    Evaluation,
    Export,
    Guidance,
    IPAdapter,
    Lora,
    Optimizer,
    OptimizerChoice,
    Report,
    Section,
    Student,
)


class Teacher(Section):
    pipeline: str = Field(
        min_length=1,
        description="name of an embedded teacher, a folder in diffusers format, a checkpoint file (.safetensors), or a "
        "hub id owner/name",
    )
    config: str | None = Field(
        None,
        min_length=1,
        description="for a checkpoint file: folder or hub id of a pipeline with the same configs; a folder's weights "
        "are taken where the file lacks a component. null: what diffusers detects, from the hub or its cache",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    variant: str | None = Field(
        None, pattern=r"^\w+$", description="variant of the weight files, such as fp16; null: files without one"
    )
    vae: str | None = Field(
        None,
        min_length=1,
        description="another autoencoder: a folder, also a pipeline's, a .safetensors or a hub id; null: its own",
    )
    loras: list[Lora] = Field(
        [],
        description="LoRAs that are fused into the teacher before anything else, in this order: .safetensors of "
        "diffusers, peft or kohya, each {file, scale, component} or a file's name; scale is 1 or a factor on what the "
        "LoRA adds, component null or the network that it is for, such as transformer_2 of Wan 2.2",
    )
    embeddings: list[Embedding] = Field(
        [],
        description="textual inversions: .safetensors, each {file, token} or a file's name; token, the word for it in "
        "prompts, is the file's own where it is null",
    )
    guidance: Guidance = Field(Guidance(), description="the guidance that is distilled into the student")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of the frozen weights; trained weights are float32"
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="linear layers of the frozen backbone in 4 bits (bitsandbytes) or 8 (torchao)",
    )
    storage: Literal["fp8"] | None = Field(
        None,
        description="fp8: layers of the frozen backbone in 8-bit floats, half of bf16's memory; computed with in the "
        "precision",
    )
    offload: Literal["group"] | None = Field(
        None,
        description="group: weights of the frozen backbone in the host's memory, copied to the device layer by layer: "
        "the same numbers, slower; the autoencoder rests there too",
    )
    ip_adapter: IPAdapter | None = Field(
        None, description="conditions the network on the picture arguments.ip_adapter_image"
    )
    arguments: dict[str, Any] = Field(
        {},
        description="further arguments of the pipeline's call: height, width, num_frames, negative_prompt, ...; a "
        "picture is stated by its file, a tensor by a .npy",
    )

    @field_validator("pipeline", "config", "vae")
    @classmethod
    def _home(cls, value: str | None) -> str | None:
        return value and os.path.expanduser(value)

    @field_validator("loras", "embeddings", mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        """A file's name alone stands for {file: NAME}."""
        return [{"file": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value

    @property
    def composed(self) -> bool:
        """Whether its pipeline is made of several files, or of one checkpoint file."""
        return bool(self.vae or self.loras or self.embeddings) or os.path.isfile(self.pipeline)


class Data(Section):
    conditions: str | list[str] = Field(
        "classes",
        description="'classes' (all of a class-conditional teacher), 'captions' (those of data.images), a shipped list "
        "such as 'everyday', a .txt with a prompt a line, a list, or whatever data.images takes, for its captions",
    )
    images: str | None = Field(
        None,
        description="real images, videos or sounds: 'fashion-mnist', a folder of them, a .jsonl or .csv, webdataset "
        "shards (.tar), a Hugging Face dataset (folder, .parquet, .arrow), a pattern or URL of them, "
        "hub:OWNER/NAME[:SPLIT]; null: none",
    )
    caption_key: str | None = Field(
        None, min_length=1, description="column, JSON key or ending of captions; null: caption, text or prompt"
    )
    image_key: str | None = Field(
        None, min_length=1, description="column, JSON key or ending of images; null: the first usual one"
    )
    buckets: Literal["off", "auto"] | list[Annotated[list[PositiveInt], MinLen(2), MaxLen(2)]] = Field(
        "off",
        description="sizes to which real images are scaled and cropped, each to the nearest in proportions: off: the "
        "pipeline's own; auto: sizes of its area; or a list of [height, width]. A batch has one",
    )
    crop: Literal["center", "random"] = Field(
        "center", description="part of an image that is kept, of a longer video or sound also the moment"
    )
    frame_rate: float | None = Field(
        None, gt=0, description="frames a second that are taken of videos; null: those of the file, one after the other"
    )
    arguments: dict[str, str] = Field(
        {},
        description="arguments of the pipeline's call for which every sample brings its own picture, {ARGUMENT: "
        "column, JSON key or ending}; teacher.arguments holds an example of each",
    )
    limit: int | None = Field(None, gt=0, description="samples taken of a source, the first ones; null: all")
    encode: Literal["store", "live", "live-offloaded"] = Field(
        "store",
        description="store: conditions are encoded once, into files on disk; live: those of a batch whenever it is "
        "needed, for more prompts than a disk holds: the encoders stay on the device, and steps take longer; "
        "live-offloaded: they are there while they encode, and rest in the host's memory",
    )
    max_rejected: float = Field(
        0.1, ge=0, le=1, description="share of samples without usable image or caption that stops the run"
    )
    groups: int = Field(
        1,
        ge=1,
        description="groups of the conditions, a student for each: classes in order, prompts by clusters of their text "
        "embeddings; `stepdistill join` combines the students in one folder",
    )
    group: int = Field(0, ge=0, description="the group that this run trains, from 0 to data.groups - 1")

    @field_validator("group")
    @classmethod
    def _one_of_them(cls, group: int, info: ValidationInfo) -> int:
        if group >= (groups := info.data.get("groups", group + 1)):
            raise ValueError(f"expected a number below data.groups ({groups})")
        return group

    @field_validator("buckets")
    @classmethod
    def _different(cls, buckets: str | list[list[int]]) -> str | list[list[int]]:
        if isinstance(buckets, list) and (not buckets or len(set(map(tuple, buckets))) < len(buckets)):
            raise ValueError("expected different sizes, at least one")
        return buckets

    @field_validator("conditions")
    @classmethod
    def _some(cls, conditions: str | list[str]) -> str | list[str]:
        if conditions == []:
            raise ValueError("expected at least one prompt")
        return conditions


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


TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow", "aim", "comet_ml", "clearml", "dvclive", "swanlab"]


class Train(Section):
    steps: int = Field(gt=0, description="training steps; the method decides which player moves in each")
    batch_size: int = Field(gt=0, description="samples per update, over all processes and accumulation")
    accumulation: int = Field(1, gt=0, description="micro-batches per update; must divide batch_size")
    sizes: list[Annotated[list[PositiveInt], MinLen(2), MaxLen(2)]] | None = Field(
        None,
        min_length=1,
        description="[height, width] of the pictures in pixels, several of them; a batch has one, drawn for each step. "
        "Previews, measurements and report are of the first. null: the pipeline's own size",
    )
    size_probabilities: list[Annotated[float, Gt(0)]] | None = Field(
        None, description="the probability of each of train.sizes, 1 in all; null: all alike"
    )
    lr: float = Field(gt=0, description="learning rate of the student")
    critic_lr: float | None = Field(None, gt=0, description="learning rate of the other players; null: lr")
    betas: list[Annotated[float, Ge(0), Lt(1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="the optimizer's, below 1"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, ge=0, description="largest gradient norm of each player; 0 is off")
    lr_warmup: int = Field(0, ge=0, description="updates of linear warm-up")
    lr_decay: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of the forward passes; weights stay float32"
    )
    gradient_checkpointing: bool | Literal["elementwise"] = Field(
        False,
        description="recompute in the backward pass instead of storing: true: whole blocks; elementwise: only "
        "outputs of activation functions and products, which costs little time",
    )
    compile: bool | Literal["cuda-graphs"] = Field(
        False,
        description="torch.compile the networks: minutes at the start, faster steps on GPUs; cuda-graphs: replay "
        "their launches as well, which takes memory",
    )
    channels_last: bool = Field(False, description="weights of convolutions in channels-last order, for UNets on GPUs")
    attention_backend: str | None = Field(
        None, description="diffusers' attention backend (native, flash, xformers, ...)"
    )
    optimizer: OptimizerChoice = Field(
        "adamw", description="a name, or {name: NAME, ARGUMENT: VALUE, ...} (docs/training.md)"
    )
    critic_optimizer: OptimizerChoice | None = Field(None, description="of the other players; null: optimizer")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of everything random in the run")
    checkpoint_every: int = Field(100, gt=0, description="updates between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="checkpoints kept, the newest")
    preview_every: int = Field(50, gt=0, description="updates between previews")
    preview_prompts: list[str | int] = Field(
        [],
        max_length=16,
        description="at most 16 prompts or classes for the previews; []: the first of data.conditions",
    )
    log_every: int = Field(10, gt=0, description="updates between lines of metrics.jsonl")
    watchdog_minutes: float | None = Field(
        30.0, gt=0, description="minutes without a step after which the stacks of all threads are logged; null: never"
    )
    tracker: TrackerName | Literal["none"] | list[TrackerName] = Field(
        "tensorboard", description="where metrics and previews go beside the run folder: one, or a list"
    )

    @field_validator("accumulation")
    @classmethod
    def _divides(cls, accumulation: int, info: ValidationInfo) -> int:
        if (batch := info.data.get("batch_size", accumulation)) % accumulation:
            raise ValueError(f"expected a divisor of train.batch_size ({batch})")
        return accumulation

    @field_validator("optimizer", "critic_optimizer")
    @classmethod
    def _short(cls, optimizer: Any) -> Any:
        """A section with a name alone is that name."""
        alone = isinstance(optimizer, Optimizer) and not optimizer.model_extra
        return optimizer.name if alone else optimizer

    @field_validator("sizes")
    @classmethod
    def _different(cls, sizes: list[list[int]] | None) -> list[list[int]] | None:
        if sizes and len(set(map(tuple, sizes))) < len(sizes):
            raise ValueError("expected different sizes")
        return sizes

    @field_validator("size_probabilities")
    @classmethod
    def _of_the_sizes(cls, probabilities: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if probabilities is not None:
            count = len(info.data.get("sizes") or ())
            if len(probabilities) != count or abs(sum(probabilities) - 1) > 1e-6:
                raise ValueError(f"expected a number for each of train.sizes ({count}), with a sum of 1")
        return probabilities

    @field_validator("lr_warmup")
    @classmethod
    def _within_the_run(cls, warmup: int, info: ValidationInfo) -> int:
        if warmup > (steps := info.data.get("steps", warmup)):
            raise ValueError(f"expected at most train.steps ({steps})")
        return warmup

    @model_validator(mode="after")
    def _same_rate(self) -> "Train":
        if self.critic_lr is None:
            self.critic_lr = self.lr
        return self

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers, each once."""
        names = [self.tracker] if isinstance(self.tracker, str) else self.tracker
        return [name for name in dict.fromkeys(names) if name != "none"]

    def optimizer_of(self, player: str) -> Optimizer:
        """A player's optimizer, also where the recipe has its name alone."""
        chosen = self.optimizer if player == "student" else self.critic_optimizer or self.optimizer
        return chosen if isinstance(chosen, Optimizer) else Optimizer(name=chosen)


class Recipe(Section):
    """A complete run. Build it with :func:`load`, which also checks the rules across sections."""

    teacher: Teacher = Field(description="the pipeline to distil")
    student: Student = Field(description="the few-step denoiser to be trained")
    critic: Critic = Field(Critic(), description="the critic's adapter, where the method has a critic that is a LoRA")
    data: Data = Field(Data(), description="what the method trains on")
    method: Method = Field(description="the distillation method and its own settings")
    train: Train = Field(description="optimisation, checkpoints, logging")
    export: Export = Field(Export(), description="format of an exported LoRA student")
    evaluation: Evaluation = Field(Evaluation(), description="measurements during the run, on few samples")
    report: Report = Field(Report(), description="the measurement at the end of the run")
    distributed: Distributed = Field(Distributed(), description="the processes that share the run's batches")
    published: str | None = Field(
        None, description="the published run that these settings come from; `stepdistill plan` sets it beside this one"
    )
    output: str | None = Field(None, min_length=1, description="run folder; null: runs/NAME OF THE RECIPE FILE")
    resume: str = Field("auto", min_length=1, description="auto, never, or a checkpoint or run folder")

    @property
    def sizes(self) -> list[list[int]]:
        """[height, width] of the pictures that are trained on, as far as the recipe states them; empty: not."""
        return self.train.sizes or (self.data.buckets if isinstance(self.data.buckets, list) else [])

    @property
    def role_training(self) -> dict[str, Literal["full", "lora", "frozen"]]:
        """How each role beside the teacher gets its weights: by its method's word, else by ``student.train``."""
        implementation = self.method.implementation
        names = ("student", *implementation.extra_roles)
        return dict.fromkeys(names, self.student.train) | dict(implementation.role_training(self.method.config))

    def to_yaml(self) -> str:
        """The resolved recipe; ``load`` of it gives an equal recipe."""
        return yaml_lines.dump(self.model_dump(mode="json"))
