"""What a pipeline is called with: entries, arguments of the recipe, and the pictures and lists that they stand for."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from stepdistill.errors import InputError
from stepdistill.pipeline.guiders import guided_at, negative_prompt
from stepdistill.pipeline.stock_call import called, parameters, pictures_in, ready

Made = TypeVar("Made")

COUNTS = ("batch_size", "num_images_per_prompt", "num_videos_per_prompt")
"""The arguments that state how many images a call makes of its other arguments."""

ENTRY_ARGUMENTS = ("prompt", "class_labels", *COUNTS)
"""The arguments that state the images of a call: prompts, class ids, or a number of images, in this order."""

GUIDANCE_ARGUMENTS = ("guidance_scale", "true_cfg_scale")

SET_ELSEWHERE = {
    "num_inference_steps": "student.steps sets it",
    "generator": "train.seed sets it",
    "output_type": "which every run sets itself",
    "return_dict": "which every run sets itself",
}
"""Arguments of a pipeline's call that no recipe states beside its other arguments, and why."""


class TraceError(InputError):
    """The pipeline does something that tracing cannot explain; ``check`` names what failed."""

    def __init__(self, check: str, message: str):
        super().__init__(f"trace: check '{check}' failed: {message}")
        self.check, self.reason = check, message

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.check, self.reason)  # it goes from one process to another


def entry_argument(pipeline: Any) -> str:
    """Which of ENTRY_ARGUMENTS the pipeline's call takes.

    Raises:
        TraceError: none of them.
    """
    accepted = parameters(pipeline)
    for name in ENTRY_ARGUMENTS:
        if name in accepted:
            return name
    raise TraceError(
        "call", f"{type(pipeline).__name__} takes none of {', '.join(ENTRY_ARGUMENTS)}; it takes {', '.join(accepted)}"
    )


def guidance_argument(pipeline: Any) -> inspect.Parameter | None:
    """The parameter that sets the guidance scale, None when the pipeline has none.

    Of several the first that is on by default: the others are for variants of the network.
    """
    accepted = parameters(pipeline)
    present = [accepted[name] for name in GUIDANCE_ARGUMENTS if name in accepted]
    on = [one for one in present if isinstance(one.default, int | float) and one.default > 1]
    return next(iter([*on, *present]), None)


def unguided(pipeline: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the arguments leave the pipeline's guidance out: its scale is 1 in every call."""
    scale = guidance_argument(pipeline)
    return scale is not None and arguments.get(scale.name) == 1


OFF: dict[str, float] = {"pag_scale": 0, "stg_scale": 0, "modality_scale": 1, "guidance_rescale": 0}
"""Arguments of guidance beside uncond + w (cond - uncond), and what switches each off."""


def given(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a call with these arguments has of each: that value, or the default."""
    return {name: arguments.get(name, parameter.default) for name, parameter in parameters(pipeline).items()}


def other_guidance(pipeline: Any, arguments: Mapping[str, Any]) -> str:
    """What switches off a guidance that has its own scale; may be empty."""
    accepted = parameters(pipeline)
    scale = guidance_argument(pipeline)
    passes = [name for name in OFF if name != "guidance_rescale"]
    if needed := _stated(pipeline, arguments, [*passes, *([] if scale is None else [scale.name])]):
        return f"; it has other guidance, which {needed} leaves out"
    scales = [
        name
        for name, parameter in accepted.items()
        if name.endswith("guidance_scale") and isinstance(parameter.default, int | float) and parameter.default > 1
    ]
    further = [name for name in scales if scale is None or name != scale.name]
    if len(further) != 1 or arguments.get(further[0]) == 1:
        return ""
    leaves = f"teacher.arguments.{further[0]}=1 leaves"
    return f"; its scale is {further[0]}, and {leaves} guidance out" if scale is None else f"; {leaves} a pass out"


def without_guidance(pipeline: Any) -> str:
    """What leaves out a guidance that no rule explains; may be empty."""
    scale = guidance_argument(pipeline)
    return "" if scale is None else f"; teacher.arguments.{scale.name}=1 leaves guidance out, of teacher and student"


def one_guidance(pipeline: Any, arguments: Mapping[str, Any]) -> str:
    """What guides all of a joint sample by the pipeline's guidance scale alone; may be empty."""
    scale = guidance_argument(pipeline)
    needed = _stated(pipeline, arguments, [*OFF, *([] if scale is None else [scale.name])])
    return f"; {needed} guides all samples with one scale" if needed else ""


def _stated(pipeline: Any, arguments: Mapping[str, Any], names: Sequence[str]) -> str:
    """What switches off those of OFF among ``names``, and lets those of further samples (audio_NAME) follow NAME."""
    accepted = parameters(pipeline)
    numbers = {name: value for name, value in given(pipeline, arguments).items() if isinstance(value, int | float)}
    optional = {name for name, parameter in accepted.items() if re.search("None|Optional", str(parameter.annotation))}
    needed = {name: f"{OFF[name]:g}" for name in names if name in OFF and numbers.get(name, OFF[name]) != OFF[name]}
    for name in (name for name in names if name in accepted):
        further = [other for other in numbers if other.endswith(f"_{name}") and other in optional]
        needed |= {other: "null" for other in further if numbers[other] != OFF.get(name)}
    return ", ".join(f"teacher.arguments.{name}={value}" for name, value in needed.items())


NEEDED = {
    "strength": (
        1.0,
        "with less its first steps are left out, and the student is trained for all of them from pure noise",
    ),
    "use_mean_velocity": (
        False,
        "otherwise its network takes the end of each step as a second time, and predicts no velocity at one time",
    ),
    "input_frames_guidance": (
        True,
        "otherwise its unconditional pass sees noise where its conditional one sees the frames that are kept",
    ),
    "sigma_conditioning": (0, "otherwise the frames that it keeps have a time of their own, which is not 0"),
}
"""Arguments that pipelines have to be called with, where they take them, and why."""


def check_needed(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments, or defaults of the pipeline's call, that are not those NEEDED.

    Raises:
        InputError: one is another.
    """
    values = given(pipeline, arguments)
    for name, (needed, why) in NEEDED.items():
        value = values.get(name)
        if isinstance(value, int | float) and value != needed:
            found = str(value).lower() + ("" if name in arguments else ", its default")
            stated = str(needed).lower()
            raise InputError(
                f"arguments: {name}: expected {stated} for {type(pipeline).__name__}, found {found}; "
                f"{why} (in a recipe: teacher.arguments.{name}={stated})"
            )


NOISE = ("cond_noise_scale", "augment_sigma")
"""Endings of arguments that say how much noise is added to what is kept."""


def added_noise(pipeline: Any, arguments: Mapping[str, Any]) -> str:
    """Which argument leaves out the noise that the pipeline adds at every step to what it keeps; may be empty."""
    for name, value in given(pipeline, arguments).items():
        if name.endswith(NOISE) and isinstance(value, int | float) and value > 0:
            return f"; teacher.arguments.{name}=0 leaves its noise out"
    return ""


def one_part(pipeline: Any, arguments: Mapping[str, Any]) -> str:
    """Which argument makes one part of a video that the pipeline samples part by part; may be empty."""
    values = given(pipeline, arguments)
    whole: dict[str, Any] = {}
    if (
        isinstance(values.get("num_frames"), int)
        and values.get("base_num_frames", values["num_frames"]) != values["num_frames"]
    ):
        whole["base_num_frames"] = values["num_frames"]
    configs = [getattr(part, "config", None) or {} for part in pipeline.components.values()]
    partition = values.get("chunk_partition") or next(
        (config["chunk_partition"] for config in configs if "chunk_partition" in config), None
    )
    if "chunk_partition" in values and partition and len(partition) > 1:
        whole["chunk_partition"] = [sum(partition)]
    return "".join(f"; teacher.arguments.{name}={value} makes it one part" for name, value in whole.items())


def fewest_steps(pipeline: Any) -> int:
    """The fewest steps that its scheduler has a grid of: 2 where it is stretched down to a ``shift_terminal``."""
    return 2 if pipeline.scheduler.config.get("shift_terminal") else 1


def run(
    pipeline: Any,
    entries: Sequence[Any] | str,
    arguments: Mapping[str, Any],
    sampled: Callable[[], bool] = lambda: False,
    **wishes: Any,
) -> Any:
    """Call the pipeline with :func:`call_arguments`, pictures opened and lists made the tuples that it declares.

    ``sampled`` is that of :func:`stepdistill.pipeline.stock_call.called`.
    """
    call = ready(pipeline, call_arguments(pipeline, entries, arguments, **wishes))
    with guided_at(pipeline, wishes["guidance"]):
        return called(pipeline, call, sampled)


def call_arguments(
    pipeline: Any,
    entries: Sequence[Any] | str,
    arguments: Mapping[str, Any],
    *,
    steps: int,
    guidance: float,
    **wishes: Any,
) -> dict[str, Any]:
    """What the pipeline is called with for ``entries`` at this guidance; of ``wishes`` what it accepts is passed.

    Args:
        entries: one per image; a string is one prompt, passed as it is to a call that takes no list of them.
        arguments: further arguments of the call, such as height, num_frames, negative_prompt (one for all entries) or
            image (the path of a picture, a list of several, or a list of one, which is repeated for each entry).

    Raises:
        InputError: the pipeline takes no argument of such a name, or another key of the recipe sets it.
    """
    accepted = parameters(pipeline)
    entry = entry_argument(pipeline)
    alone = isinstance(entries, str)
    count = 1 if alone else len(entries)
    scale = guidance_argument(pipeline)
    elsewhere = SET_ELSEWHERE if scale is None else SET_ELSEWHERE | {scale.name: "teacher.guidance.scale sets it"}
    if unguided(pipeline, arguments):
        elsewhere, guidance = SET_ELSEWHERE, 1.0
    for name, value in arguments.items():
        if name in elsewhere:
            raise InputError(f"arguments: expected no {name!r}, {elsewhere[name]}; found {value!r}")
        if name not in accepted or name == entry:
            close = difflib.get_close_matches(name, accepted, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"arguments: {type(pipeline).__name__} takes no argument {name!r}{hint}")
        missing = [file for file in pictures_in(value) if not Path(file).is_file()]
        if missing and ("image" in name or missing[0].endswith(".npy")):
            what = "a tensor" if missing[0].endswith(".npy") else "a picture"
            raise InputError(f"arguments: {name}: expected {what}, found no file {missing[0]}")
        wishes[name] = value * count if one_each(value) else value
    call: dict[str, Any] = {entry: count if entry in COUNTS else entries if alone else list(entries)}
    if scale is not None:
        call[scale.name] = guidance
        if scale.name == "true_cfg_scale":
            # Such pipelines guide only against a stated negative prompt; the others fill in their own default.
            wishes = {"negative_prompt": "", **wishes}
    if isinstance(wishes.get("negative_prompt"), str) and not alone:
        wishes["negative_prompt"] = [wishes["negative_prompt"]] * count
    wishes |= {"num_inference_steps": steps, "return_dict": False}
    return call | {name: value for name, value in wishes.items() if name in accepted}


def by_itself(entry: Any) -> Any:
    """The entries of a call for one image: a prompt as it is, anything else in a list."""
    return entry if isinstance(entry, str) else [entry]


def one_each(value: Any) -> bool:
    """Whether a value is a list of one picture: the call wants a picture for each entry."""
    picture = value[0] if isinstance(value, list) and len(value) == 1 else None
    return isinstance(picture, Image.Image) or (isinstance(picture, str) and bool(pictures_in(picture)))


def in_any_way(
    call: Callable[[Mapping[str, Any], bool], Made],
    arguments: Mapping[str, Any],
    *,
    alone: bool,
    pipeline: Any = None,
) -> tuple[Made, dict[str, Any], bool]:
    """What ``call`` makes in the first way in which the pipeline can be called: (made, arguments, prompts alone).

    The ways: as stated; with an empty negative prompt; with a picture for each entry where one is stated for all; with
    a list of one picture as it is; one entry at a time.

    Args:
        call: of the arguments, and whether each entry is called alone.
        arguments: those stated.
        alone: whether one entry at a time is a way.
        pipeline: that may need a negative prompt; None: that is no way.

    Raises:
        TraceError: the first call's, where all ways fail; or what is wrong with a run that did not fail.
    """
    single = {name for name, value in arguments.items() if isinstance(value, str) and pictures_in(value)}
    ways = [(dict(arguments), False)]
    if pipeline is not None and (empty := negative_prompt(pipeline, arguments)):
        ways.append((arguments | empty, False))
    if single:
        ways.append(({name: [value] if name in single else value for name, value in arguments.items()}, False))
    if lists := {name: tuple(value) for name, value in arguments.items() if one_each(value)}:
        ways.append((arguments | lists, False))  # tuples are not repeated
    if alone:
        ways.append((dict(arguments), True))
    errors = []
    for stated, one in ways:
        try:
            return call(stated, one), stated, one
        except TraceError as error:
            if error.check != "call":
                raise
            errors.append(error)
    raise errors[0]
