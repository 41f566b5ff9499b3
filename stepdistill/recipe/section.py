"""What every section of a recipe is; the student's, and the smallest ones, among them those that name a file."""

import os
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)


class Section(BaseModel):
    """One section of the recipe: no unknown keys, no silent conversions ("20" is not 20, true is not 1)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class Guidance(Section):
    scale: float = Field(1.0, ge=0, description="w in uncond + w (cond - uncond); 1 is off")
    interval: list[float] | None = Field(
        None, min_length=2, max_length=2, description="[low, high]: times with guidance, 1 is noise; null: all times"
    )
    rescale: float = Field(
        0.0,
        ge=0,
        le=1,
        description="phi (Lin et al. 2023): how far the guided output's std is pulled back to the conditional output's",
    )
    rule: Literal["cfg", "apg"] = Field(
        "cfg",
        description="how the two outputs are combined: classifier-free guidance, or Adaptive Projected Guidance "
        "(Sadat et al. 2024) of the predicted x_0; the three numbers below are apg's",
    )
    eta: float = Field(0.0, description="factor on the part of the difference along the conditional x_0; 1: as in cfg")
    norm: float = Field(0.0, ge=0, description="largest norm of a sample's difference, in latents; 0: any")
    guider: dict[str, Any] | None = Field(
        None,
        description="a guider of diffusers in the place of the rule, with its settings: {name: "
        "ClassifierFreeZeroStarGuidance, zero_init_steps: 0}; its guidance_scale is the scale; null: the rule",
    )
    momentum: float = Field(0.0, description="apg's momentum over steps; must be 0 in training; see sample --rule apg")

    @property
    def combination(self) -> Any:
        """Everything but the scale, as :class:`stepdistill.kernels.Rule`."""
        from stepdistill.diffusion.guidance import rule_of

        return rule_of(self.model_dump())

    @property
    def in_words(self) -> str:
        """How the passes are combined, in words that follow a scale: "" for the plain rule."""
        from stepdistill.diffusion.guidance import rule_text

        return f" by {self.guider['name']}" if self.guider else rule_text(self.combination)


class IPAdapter(Section):
    source: str = Field(min_length=1, description="folder or hub id that holds it, such as h94/IP-Adapter")
    weights: str = Field(
        pattern=r"\.safetensors$", description="its file there, such as models/ip-adapter_sd15.safetensors"
    )
    image_encoder: str = Field(
        "image_encoder", min_length=1, description="folder of its encoder there; without a slash: beside the weights"
    )
    scale: float = Field(1.0, ge=0, description="weight of the picture beside the prompt")


class File(Section):
    file: str = Field(min_length=1, description="a .safetensors")

    @field_validator("file")
    @classmethod
    def _home(cls, value: str) -> str:
        return os.path.expanduser(value)


class Lora(File):
    """A LoRA's weights, of diffusers, peft or kohya."""

    scale: float = Field(1.0, description="factor on what it adds to the weights")
    component: str | None = Field(
        None,
        pattern=r"^\w+$",
        description="the network of the pipeline that it is for; null: the first that takes LoRAs",
    )


class Embedding(File):
    """A textual inversion."""

    token: str | None = Field(None, min_length=1, description="the word for it in prompts; null: the file's own")


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
    experts: Literal["each", "high", "low"] = Field(
        "each",
        description="of a teacher whose networks take turns (Wan 2.2): each: the student has as many, each trained at "
        "its own times; high, low: one network for all times, which starts as the expert for high or for low noise",
    )
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
    quantize: Literal["int8", "int4", "nf4"] | None = Field(
        None,
        description="train with the linear layers' weights rounded to 8 or 4 bits: what is exported loads in so many "
        "bits without a further loss; null: exact weights",
    )
    init: str | None = Field(None, description="run folder or exported pipeline to start from; null: the teacher")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the exponential moving average per update; 0 is off")

    @field_validator("start")
    @classmethod
    def _room_for_steps(cls, start: int | None, info: ValidationInfo) -> int | None:
        steps = info.data.get("steps", 1)
        if start is not None and start < steps - 1:
            raise ValueError(f"expected at least student.steps - 1 ({steps - 1})")
        return start


class Critic(Section):
    rank: int | None = Field(None, gt=0, description="rank of the critic's adapter; null: student.rank")
    alpha: float | None = Field(
        None, gt=0, description="its alpha; null: student.alpha, or where that is null its own rank"
    )
    targets: Literal["auto"] | list[str] | None = Field(
        None, description="its layers, as in student.targets; null: student.targets"
    )


class Report(Section):
    samples: int = Field(1000, ge=0, description="images per row of the report; 0: no report")
    steps: list[PositiveInt] = Field(
        [1, 2, 4], min_length=1, description="step counts at which the student is measured"
    )
    networks: list[Literal["classifier", "enet"]] = Field(
        ["classifier", "enet"], min_length=1, description="feature networks of FD and KID"
    )
    solvers: bool = Field(True, description="also measure the teacher under stock fast solvers at the same NFE")


OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "muon", "prodigy", "schedulefree", "lion"]


class Optimizer(BaseModel):
    """An optimizer's name; every other key is an argument of its class, which checks it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    name: OptimizerName


# Which of the two a value is shows in its form, so that a mistake in it is described as one in that form.
OptimizerChoice = Annotated[
    Annotated[OptimizerName, Tag("name")] | Annotated[Optimizer, Tag("section")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "section"),
]


class Distributed(Section):
    processes: int | None = Field(
        None,
        ge=1,
        description="processes on this machine; null: one per GPU. Under torchrun or accelerate launch: the launcher's",
    )
    shard: bool = Field(
        False, description="shard the networks' weights over the processes (FSDP) instead of keeping copies"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_zero(cls, tree: Any) -> Any:
        """Recipes of earlier versions say ``zero: null``; another value was DeepSpeed's."""
        if isinstance(tree, dict) and "zero" in tree:
            if tree["zero"] is not None:
                raise ValueError("expected shard: true (FSDP) in place of DeepSpeed's zero (docs/scaling.md)")
            tree = {key: value for key, value in tree.items() if key != "zero"}
        return tree


class Evaluation(Section):
    every: int = Field(0, ge=0, description="updates between measurements of the student in training; 0: none")
    samples: int = Field(256, ge=16, description="images per measurement")
    metric: Literal["teacher_kid_enet", "teacher_fd_enet", "kid_enet", "fd_enet", "kid_classifier", "fd_classifier"] = (
        Field(
            "teacher_kid_enet",
            description="against the teacher's samples (any pipeline) or the embedded protocol's images",
        )
    )
    keep_best: int = Field(
        1,
        ge=0,
        description="best checkpoints kept beside the newest; the best one is exported; 0: none, the last one is",
    )
    patience: int | None = Field(
        None, gt=0, description="stop after this many measurements in a row without improvement; null: never"
    )


CheckedOn = Literal["cpu", "device", "off"]


class Export(Section):
    fuse: bool = Field(
        False, description="write a LoRA student merged into a whole pipeline instead of as LoRA weights"
    )
    keys: Literal["diffusers", "kohya"] = Field(
        "diffusers", description="key names in the LoRA file; kohya for UNets only"
    )
    dtype: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="of the student's weights; fp16 and bf16 are half the size. half: true is fp16"
    )
    check: CheckedOn = Field(
        "cpu",
        description="where the export is loaded with plain diffusers and compared with the training-time sampler: cpu "
        "(in float32, to 1e-5), device (in teacher.precision, in bf16 to 6e-2) or off (nowhere; the card says so)",
    )
    to: Literal["diffusers", "comfyui"] = Field(
        "diffusers", description="comfyui: beside it one file for ComfyUI, Forge and kohya's scripts, and a workflow"
    )

    @model_validator(mode="before")
    @classmethod
    def _half(cls, tree: Any) -> Any:
        """``half: true`` of earlier versions is ``dtype: fp16``."""
        if not isinstance(tree, dict) or not isinstance(tree.get("half"), bool):
            return tree
        rest = {key: value for key, value in tree.items() if key != "half"}
        return {"dtype": "fp16"} | rest if tree["half"] else rest
