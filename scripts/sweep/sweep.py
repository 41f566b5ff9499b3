"""Trace the tiny pipelines that diffusers' own tests build, offline: a line of JSON for each test.

    git clone https://github.com/huggingface/diffusers && git -C diffusers checkout COMMIT
    pip install parameterized requests-mock
    python scripts/sweep/sweep.py build/sweep.jsonl --tests diffusers
    python scripts/sweep_table.py build/sweep.jsonl --tests COMMIT

COMMIT is the one that assets/benchmarks/sweep.json names. The first command fetches the tests, the second what they
import. The third takes about 20 minutes on a core; tests that have a line already are left out, so that it goes on
where it was stopped. The last stores the lines and writes the section of docs/pipelines.md.

Each test is run in a process of its own. Its pipeline is built with random weights, with the stand-ins of shim.py for
what the test would download, and traced with the arguments of the test. Where a refusal names an argument to set, it is
set. Where a call fails with files, it gets the test's own tensors. Where a check fails that depends on the weights, the
test's own are tried. Where its prompt is an object of JSON, so are the prompts here.
"""

import argparse
import contextlib
import functools
import inspect
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import diffusers
import diffusers_tests
import shim
import torch
import transformers

from stepdistill.errors import InputError
from stepdistill.pipeline.trace import PROBES, TraceError, trace

WORDS = PROBES["prompt"]
DENOISERS = ("transformer", "unet", "controlnet", "adapter", "decoder", "prior")
# A check that may fail for the weights alone.
OF_WEIGHTS = ("guidance", "output", "schedule", "self-test")
# The stand-in tokenizer has a token for each byte, and these put a long text before a prompt.
LONG_PROMPTS = {
    "qwenimage": 400,
    "krea2": 400,
    "nucleus": 400,
    "longcat_image": 400,
    "kandinsky5_i2i": 400,
    "ovis": 250,
    "cosmos2_5": 400,
    "flux2.test_pipeline_flux2.": 400,
    "dreamlite": 400,
    "ace_step": 400,
}
# Networks that predict a flow are sampled so; the tests leave their scheduler at its class's default, epsilon.
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "skyreels_v2": FLOW,
    "cosmos2_5": FLOW | {"use_karras_sigmas": True, "sigma_max": 200.0, "sigma_min": 0.01},
}
# These size their encoder by the tokenizer's vocabulary.
SMALL_VOCABULARY = ("ovis", "joyimage")


@dataclass
class Case:
    """A test while its pipeline is traced.

    Args:
        module: The test's module.
        name: The test's class.
        test: Its instance.
        place: An empty folder for pictures.
        tensors: Pictures are the test's own tensors instead of files.
        advised: Arguments that refusals named.
        arguments: Those of the last attempt.
    """

    module: str
    name: str
    test: Any
    place: Path
    tensors: bool = False
    advised: dict[str, float | list[int] | None] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Refusal:
    check: str
    reason: str


def redraw(module: torch.nn.Module, seed: int) -> None:
    """Random weights that keep the variance of what passes: tests often have zeros, which hide what a layer does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fresh = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim > 1:
                parameter.copy_(fresh / parameter[0].numel() ** 0.5)
            else:  # scales stay about 1
                parameter.copy_(0.1 * fresh + float(parameter.float().mean() == 1))


def build(test: Any, fresh: bool) -> Any:
    """The test's pipeline, with redrawn weights where ``fresh``."""
    components = diffusers_tests.dummy_components(test)
    for seed, (name, part) in enumerate(sorted(components.items())):
        if isinstance(part, torch.nn.Module):
            part.eval()
            if fresh and any(word in name for word in DENOISERS):
                redraw(part, seed)
    pipeline = test.pipeline_class(**components)
    settings = next((one for word, one in SCHEDULERS.items() if word in type(test).__module__), None)
    if settings:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def said(error: BaseException, named: bool = True) -> str:
    """An error's message on a line, behind its class where ``named``."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text}" if named else text


def arguments_of(case: Case) -> dict[str, Any]:
    """The arguments to trace with: the test's, and those that refusals named."""
    inputs = diffusers_tests.dummy_inputs(case.test)
    PROBES["prompt"] = tuple(diffusers_tests.worded(inputs, words) for words in WORDS)
    arguments = diffusers_tests.arguments_of(inputs, case.place, lists="Multi" in case.name)
    if "use_resolution_binning" in inspect.signature(case.test.pipeline_class.__call__).parameters:
        arguments["use_resolution_binning"] = False  # which makes 32 x 32 pixels a million
    for word, length in LONG_PROMPTS.items():
        if word in f"{case.module}.":
            arguments |= {name: length for name in ("max_sequence_length", "max_text_length") if name in arguments}
    if case.tensors:
        files = [name for name, value in arguments.items() if str(value).endswith(".png") and name in inputs]
        arguments |= {name: inputs[name] for name in files}
    return arguments | case.advised


def attempt(case: Case, fresh: bool) -> Refusal | None:
    """Trace the test's pipeline as a user does who follows the hints of refusals; None where it is traced."""
    try:
        torch.manual_seed(0)
        pipeline = build(case.test, fresh)
        case.arguments = arguments_of(case)
        while True:
            try:
                trace(pipeline, case.arguments)
                return None
            except (TraceError, InputError) as error:
                hint = re.search(r"teacher\.arguments\.(\w+)=(true|false|null|\[\d+\]|[\d.]*\d)", str(error))
                if hint is None or hint[1] in case.advised:
                    raise
                case.advised[hint[1]] = case.arguments[hint[1]] = json.loads(hint[2])
                pipeline = build(case.test, fresh)
    except TraceError as error:
        return Refusal(error.check, said(error, named=False))
    except InputError as error:
        return Refusal("input", f"input: {said(error, named=False)}")
    except Exception as error:
        return Refusal("traceback", f"traceback: {said(error)}")


def refused(case: Case) -> Refusal | None:
    """The first refusal of a pipeline; None where it is traced in one of the ways."""
    first = last = attempt(case, fresh=True)
    if last and last.check == "call" and any(str(value).endswith(".png") for value in case.arguments.values()):
        case.tensors = True
        last = attempt(case, fresh=True)
    if last and last.check in OF_WEIGHTS:
        last = attempt(case, fresh=False)
    return first if last else None


def row_of(module: str, name: str, reason: str = "") -> dict[str, Any]:
    """The line of a test whose pipeline is not built."""
    row = {"test": f"{module}.{name}", "name": name, "kind": "other", "built": False, "traced": False}
    return row | {"reason": reason}


def result(module: str, name: str, place: Path) -> dict[str, Any]:
    """The line of a test: its pipeline is built and traced here."""
    row = row_of(module, name)
    try:
        test = diffusers_tests.instance(module, name)
        pipeline = test.pipeline_class.__name__
        row["name"] = pipeline.removesuffix("Wrapper")
        if hasattr(test, "setUp"):
            with contextlib.suppress(Exception):
                test.setUp()
        row["kind"] = diffusers_tests.kind_of(module.split(".")[2], pipeline, diffusers_tests.dummy_inputs(test))
        build(test, fresh=True)
    except BaseException as error:  # pytest's skips are none of Exception
        return row | {"reason": said(error)}
    case = Case(module, name, test, place)
    refusal = refused(case)
    if refusal is None:
        objects = not all(map(diffusers_tests.plain, case.arguments.values()))
        return row | {"built": True, "traced": True, "arguments": case.advised, "objects": objects}
    if refusal.check in ("call", "traceback", "input"):
        try:
            with torch.no_grad():
                build(test, fresh=False)(**diffusers_tests.dummy_inputs(test))
        except BaseException as error:
            return row | {"reason": f"its own call: {said(error)}"}
    return row | {"built": True, "reason": refusal.reason}


def child(work: Callable[[Path], dict[str, Any]], place: Path, sender: Connection) -> None:
    """Send what ``work`` makes, and print nothing."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    sender.send(work(place))


def forked(work: Callable[[Path], dict[str, Any]], limit: float) -> dict[str, Any] | str:
    """What ``work`` makes in a process that has an empty folder and ``limit`` seconds; why not, where it is a str."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as place, receiver:
        process = context.Process(target=child, args=(work, Path(place), sender))
        process.start()
        sender.close()
        try:
            made = receiver.recv() if receiver.poll(limit) else f"no answer in {limit:g} s"
        except EOFError:
            made = "its process was killed"
        process.kill()
        process.join()
    return made


def line(module: str, name: str, place: Path) -> dict[str, Any]:
    """The line of a test, in a process of its own."""
    shim.install(small=any(word in module for word in SMALL_VOCABULARY))
    return result(module, name, place)


def prepare(tests: Path) -> None:
    """Let ``tests``, a folder that holds diffusers', be imported, on one thread and without warnings."""
    sys.path.insert(0, str(tests.resolve()))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="lines are appended here")
    parser.add_argument("--tests", type=Path, required=True, help="a folder that holds diffusers' tests")
    parser.add_argument("--only", default="", help="parts of tests' names, comma-separated")
    parser.add_argument("--limit", type=float, default=240, help="seconds for a test")
    chosen = parser.parse_args()
    tests = diffusers_tests.listed(chosen.tests)
    if not tests:
        parser.error(f"no tests in {chosen.tests / 'tests' / 'pipelines'}; expected a checkout of diffusers")
    prepare(chosen.tests)
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    with open(chosen.results, "a+", encoding="utf-8") as results:
        results.seek(0)
        done = {json.loads(line)["test"] for line in results}
        for module, name in tests:
            whole = f"{module}.{name}"
            if whole in done or not any(part in whole for part in chosen.only.split(",")):
                continue
            began = time.time()
            made = forked(functools.partial(line, module, name), chosen.limit)
            row = made if isinstance(made, dict) else row_of(module, name, made)
            print(json.dumps(row), file=results, flush=True)
            state = "traced" if row["traced"] else "refused" if row["built"] else "not built"
            print(f"{time.time() - began:6.1f} s {row['name']}: {state} {row['reason'][:160]}", flush=True)


if __name__ == "__main__":
    main()
