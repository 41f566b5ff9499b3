"""The whole way of every pipeline that sweep.py traced: a folder, two training steps, an export, a stock call of it.

    python scripts/sweep/whole.py build/sweep.jsonl --tests diffusers

It goes on in the file of scripts/sweep/sweep.py, whose first lines say how to make it. Of each test that is traced it
appends the line again with ``whole``, what came of it; tests that have it are left out. It takes about an hour on a
core. Where training is refused and the refusal names a way out, that way is taken, as a user does.

The tiny pipeline is saved as a folder, and ``stepdistill train`` distils it with a recipe: DMD2, a LoRA of rank 2. The
export is verified by the same program as a user's, in the same process. Only numbers of samples are smaller.
"""

import argparse
import functools
import inspect
import json
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sweep

# isort: split
# It sets the environment in which these are read.
import diffusers
import diffusers_tests
import PIL.Image
import shim
import torch
from safetensors.torch import load_file

import stepdistill
from stepdistill.errors import InputError, RunError
from stepdistill.exporting import check
from stepdistill.pipeline import stock_call
from stepdistill.pipeline.call import guidance_argument
from stepdistill.sampling import cost
from stepdistill.training import previews, run_samples, selfcheck

PROMPTS = ["a red shoe", "two birds on a wire"]
FEWER = {(run_samples, "TEACHER_STEPS"): 2, (previews, "COUNT"): 2, (cost, "REPEATS"): 1}
FEWER |= {(selfcheck, "TRAJECTORY_STEPS"): 2, (selfcheck, "ROWS"): 2, (selfcheck, "FEW"): 1}
# What a refusal says that may be due to the random weights alone: latents of thousands make other pixels by rounding.
OF_WEIGHTS = [*(f"check '{check}'" for check in sweep.OF_WEIGHTS), "of 255 levels", "not finite"]
# What a refusal says, and what of the recipe it makes a user change.
WAYS_OUT: list[tuple[str, Mapping[str, Any]]] = [
    (r"guidance\.scale", {"teacher.guidance.scale": 1.0}),
    (r"sampler ddim|differs from sampler renoise", {"method.sampler": "ddim"}),
    (r"student\.train|student\.targets", {"student.train": "full"}),
]


def recipe_of(folder: Path, arguments: Mapping[str, Any], pipeline: Any) -> dict[str, Any]:
    """The recipe to begin with.

    Args:
        folder: has the pipeline in teacher/, and will have the run.
        arguments: of the pipeline's call.
        pipeline: the same one.
    """
    entry = "prompt" in inspect.signature(pipeline.__call__).parameters
    configs = [getattr(part, "config", None) or {} for part in pipeline.components.values()]
    inside = any(isinstance(one, Mapping) and one.get("guidance_embeds") for one in configs)
    scale = 1.0 if inside or guidance_argument(pipeline) is None else 2.0
    return {
        "teacher": {
            "pipeline": str(folder / "teacher"),
            "guidance": {"scale": scale},
            "arguments": dict(arguments),
        },
        "student": {"steps": 2, "train": "lora", "rank": 2},
        "data": {"conditions": PROMPTS if entry else "classes"},
        "method": {"name": "dmd2", "critic_steps": 1},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "preview_every": 100, "log_every": 1, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(folder / "run"),
    }


def sized(arguments: Mapping[str, Any], pipeline: Any) -> dict[str, Any]:
    """Arguments with a small size where the test states none and the pipeline's own is that of a real network."""
    own = getattr(pipeline, "default_sample_size", 0) * getattr(pipeline, "vae_scale_factor", 1)
    takes = inspect.signature(pipeline.__call__).parameters
    size = (
        {"height": 32, "width": 32} if {"height", "width"} <= set(takes) and isinstance(own, int) and own > 64 else {}
    )
    if "num_frames" in takes and not any(isinstance(value, list) for value in arguments.values()):
        size["num_frames"] = 2
    return size | dict(arguments)


def white(file: str) -> str:
    """A white picture of the size of a file's, or of 64 x 64 where that is a tensor."""
    place = Path(file).with_name("white.png")
    size = (64, 64) if file.endswith(".npy") else PIL.Image.open(file).size
    PIL.Image.new("L", size, 255).save(place)
    return str(place)


def changed(recipe: dict[str, Any], refusal: str) -> bool:
    """Change the recipe as the refusal makes a user do; False where it names nothing, or nothing new."""
    arguments = recipe["teacher"]["arguments"]
    mask = re.search(r"a white picture as teacher\.arguments\.(\w+)", refusal)
    if mask and Path(arguments[mask[1]]).name != "white.png":
        arguments[mask[1]] = white(arguments[mask[1]])
        return True
    for pattern, change in WAYS_OUT:
        for key, value in change.items():
            *sections, last = key.split(".")
            place = recipe
            for section in sections:
                place = place[section]
            if re.search(pattern, refusal) and place.get(last) != value:
                place[last] = value
                return True
    return False


def called_here(answers: list[dict[str, torch.Tensor]], place: Path) -> Any:
    """In the place of stepdistill.exporting.check.call_elsewhere: the same program, in this process."""

    def call(request: dict[str, Any]) -> dict[str, torch.Tensor]:
        asked, answered = place / "request.json", place / "result.safetensors"
        asked.write_text(json.dumps(request), encoding="utf-8")
        stock_call.main(str(asked), str(answered))
        answers.append(load_file(answered))
        return answers[-1]

    return call


def save(pipeline: Any, folder: Path) -> None:
    """Save a pipeline as a folder of diffusers, by the name of its class there where a test has its own child of it.

    What a test made in the place of a part that is no component of folders (Cosmos' checker) is put there again.
    """
    pipeline.__class__ = kind = next(one for one in type(pipeline).__mro__ if hasattr(diffusers, one.__name__))
    for name, part in dict(pipeline.components).items():
        if type(part).__module__.startswith("tests."):
            setattr(sys.modules[kind.__module__], type(part).__name__.removeprefix("Dummy"), type(part))
            pipeline.register_modules(**{name: None})
    pipeline.save_pretrained(folder)


def where(error: BaseException) -> str:
    """The last place of an error inside stepdistill."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "stepdistill" in one.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def trained(recipe: dict[str, Any], place: Path) -> dict[str, Any]:
    """What came of a recipe: ``passed``, and the ``form`` of the export or the ``reason`` why there is none."""
    answers: list[dict[str, torch.Tensor]] = []
    check.call_elsewhere = called_here(answers, place)
    while True:
        try:
            run = stepdistill.train(recipe)
            break
        except (InputError, RunError) as error:
            if not changed(recipe, str(error)):
                return {"passed": False, "reason": sweep.said(error, named=False)}
        except Exception as error:
            return {"passed": False, "reason": f"traceback: {sweep.said(error)} ({where(error)})"}
    facts = json.loads((run.folder / "export" / "stepdistill.json").read_text(encoding="utf-8"))
    values = [value for one in answers for value in one.values() if value.is_floating_point()]
    if not values or not all(value.isfinite().all() for value in values):
        return {"passed": False, "reason": "the export's samples are not finite"}
    return {"passed": True, "form": facts["form"]}


def result(row: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """What came of a test that is traced: the keys of ``whole`` in its line."""
    module, _, name = row["test"].rpartition(".")
    test = diffusers_tests.instance(module, name)
    found: dict[str, Any] = {}
    for tensors in (False, True) if row["objects"] else (False,):  # pictures that are not to be resized, say
        found = taken(row, test, sweep.Case(module, name, test, place, tensors, dict(row.get("arguments", {}))))
        if "check 'call'" not in found.get("reason", ""):
            break
    return found


def taken(row: Mapping[str, Any], test: Any, case: sweep.Case) -> dict[str, Any]:
    """What came of a test with the arguments of a case."""
    place = case.place / ("tensors" if case.tensors else "files")
    place.mkdir()
    arguments = diffusers_tests.as_files(sweep.arguments_of(case), place, pictures=not case.tensors)
    beyond = [key for key, value in arguments.items() if not diffusers_tests.plain(value)]
    if beyond:
        return {"passed": False, "reason": f"its test's {', '.join(beyond)}: a tensor, which no recipe states"}
    for fresh in (True, False):
        torch.manual_seed(0)
        pipeline = sweep.build(test, fresh)
        folder = place / ("fresh" if fresh else "own")
        try:
            save(pipeline, folder / "teacher")
        except Exception as error:
            return {"passed": False, "reason": f"diffusers cannot save it: {sweep.said(error)}"}
        recipe = recipe_of(folder, sized(arguments, pipeline), pipeline)
        if recipe["data"]["conditions"] == PROMPTS:
            inputs = diffusers_tests.dummy_inputs(test)
            recipe["data"]["conditions"] = [diffusers_tests.worded(inputs, words) for words in PROMPTS]
        found = trained(recipe, place)
        of_weights = any(one in found.get("reason", "") for one in OF_WEIGHTS)
        if found["passed"] or not of_weights:
            break
    if "reason" in found:
        found["reason"] = found["reason"].replace(f"{folder}/", "")
    if any(str(value).endswith("/white.png") for value in recipe["teacher"]["arguments"].values()):
        found["mask"] = "white"
    return found | {"sampler": recipe["method"].get("sampler", "renoise"), "train": recipe["student"]["train"]}


def line(row: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The line of a test, made in a process of its own."""
    shim.install(small=any(word in row["test"] for word in sweep.SMALL_VOCABULARY))
    for (module, setting), value in FEWER.items():
        setattr(module, setting, value)
    try:
        return {**row, "whole": result(row, place)}
    except BaseException as error:
        return {**row, "whole": {"passed": False, "reason": f"traceback: {sweep.said(error)} ({where(error)})"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="lines of sweep.py; more are appended")
    parser.add_argument("--tests", type=Path, required=True, help="a folder that holds diffusers' tests")
    parser.add_argument("--only", default="", help="parts of tests' names, comma-separated")
    parser.add_argument("--again", action="store_true", help="also those that did not pass before")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a test")
    chosen = parser.parse_args()
    sweep.prepare(chosen.tests)
    rows = {}
    for text in chosen.results.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        rows[row["test"]] = row
    with open(chosen.results, "a", encoding="utf-8") as results:
        for row in rows.values():
            known = row.get("whole")
            if not row["traced"] or (known and (known["passed"] or not chosen.again)):
                continue
            if not any(part in row["test"] for part in chosen.only.split(",")):
                continue
            made = sweep.forked(functools.partial(line, row), chosen.limit)
            made = made if isinstance(made, dict) else {**row, "whole": {"passed": False, "reason": made}}
            print(json.dumps(made), file=results, flush=True)
            print(f"{row['name']}: {json.dumps(made['whole'])}", flush=True)


if __name__ == "__main__":
    main()
