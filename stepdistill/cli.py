"""The command line: parses, calls the verb of the same name, prints. No logic.

Exit codes: 0 done, 2 wrong input, 1 anything else; 2, and 1 for a fault that is known, with one line on stderr.
"""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import stepdistill
from stepdistill import assets
from stepdistill.cli_facts import AsJson, convert, doctor, inspect, methods, print_facts, recipes
from stepdistill.errors import InputError, RunError
from stepdistill.progress import WorkProgress

app = typer.Typer(
    name="stepdistill",
    help="Distil a diffusers pipeline to 1-8 steps without guidance, in stock format.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Safe = Annotated[bool, typer.Option("--safe", help="Refuse a recipe that names Python code (FILE.py:CLASS).")]
Seed = Annotated[int, typer.Option(help="Image i depends on (seed, i) alone.")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.steps=20 output=runs/mine.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
    profile: Annotated[
        int, typer.Option(min=0, help="Instead: profile so many steps; a Chrome trace and a table in the run folder.")
    ] = 0,
    safe: Safe = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: train, export, report. Resumes a run that was interrupted."""
    # pydantic is not needed for --help; torch not before the recipe is known to be good.
    from stepdistill.recipe import load

    resolved = load(recipe, overrides or (), safe)
    if dry_run:
        print(json.dumps(resolved.model_dump(mode="json"), indent=2) if as_json else resolved.to_yaml().rstrip())
        return
    if profile:
        from stepdistill.profiling import profile_training, table

        folder, facts = profile_training(resolved, profile)
        print(json.dumps(facts, indent=2) if as_json else f"{table(facts)}\n{folder / 'trace.json'}")
        return
    from stepdistill.distributed import launch, leave, processes_wanted

    if (processes := processes_wanted(resolved.distributed.processes)) > 1:
        options = [name for name, given in (("--safe", safe), ("--json", as_json)) if given]
        raise typer.Exit(launch(["train", recipe, *(overrides or ()), *options], processes))
    result = stepdistill.train(resolved, safe=safe)
    leave()
    if int(os.environ.get("RANK", 0)) > 0:
        return  # the first of several processes speaks for all
    facts = {"run": str(result.folder), "step": result.step, "interrupted": result.interrupted}
    print_facts(facts | {"report": result.report and str(result.report)}, as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    fuse: Annotated[bool | None, typer.Option(help="A LoRA student as a whole pipeline, or as a LoRA.")] = None,
    keys: Annotated[str | None, typer.Option(help="Names in a LoRA's file: diffusers, or kohya for ComfyUI.")] = None,
    half: Annotated[bool | None, typer.Option(help="The student's weights in float16: half the size.")] = None,
    hub: Annotated[str | None, typer.Option(help="Then upload it to OWNER/NAME on the Hugging Face hub.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    safe: Safe = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's student as a stock diffusers pipeline or LoRA, checked against the training-time sampler."""
    if keys not in (None, "diffusers", "kohya"):
        raise InputError(f"--keys: expected diffusers or kohya, found '{keys}'")
    if hub is not None:
        from stepdistill.exporting.hub import check_name, push

        check_name(hub)
    result = stepdistill.export(run, out, fuse, keys, half, safe)
    facts = {result.form: str(result.folder), "max_error": result.max_error}
    if hub is not None:
        facts["hub"] = push(result.folder, hub, private=not public)
    print_facts(facts, as_json)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for train.")] = None,
    gpu: Annotated[float | None, typer.Option(min=1, help="Memory of the device in GiB: propose what fits.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Write the proposals into the recipe.")] = False,
    gpus: Annotated[
        str | None, typer.Option(help="Numbers of GPUs, separated by commas: memory, traffic, time of each.")
    ] = None,
    seconds: Annotated[
        str | None, typer.Option(help="Of a training step on one GPU: a number, or a run folder that has measured it.")
    ] = None,
    links: Annotated[
        str, typer.Option(help="GB/s of a GPU inside its node, GB/s of a node to the others, GPUs of a node.")
    ] = "450,400,8",
    as_json: AsJson = False,
) -> None:
    """Audit a recipe's run and say what memory it will need, before any weight is loaded."""
    if fit and gpu is None:
        raise InputError("--fit: expected --gpu with the device's memory in GiB, found none")
    if fit and overrides:
        raise InputError("--fit: expected the recipe alone, found overrides; they are not in its file")
    if gpus is not None:
        if fit:
            raise InputError("--fit: expected --gpu without --gpus")
        # torch is not needed for --help.
        from stepdistill import plan_scale

        counts, between = _numbers("--gpus", gpus), plan_scale.links_of(links)
        estimates = plan_scale.scale(recipe, overrides or (), counts, between, seconds)
        if as_json:
            print(json.dumps(plan_scale.as_dict(estimates, between, gpu), indent=2))
        else:
            print(plan_scale.as_text(estimates, between, gpu))
        return
    from stepdistill import plan as planning

    taken = overrides or ()
    if gpu:
        first, changes = planning.fit(recipe, taken, gpu, seconds)
    else:
        first, changes = planning.plan(recipe, taken, seconds), []
    written = planning.write_fit(recipe, changes) if fit and changes else None
    if as_json:
        print(json.dumps(planning.as_dict(first, changes, gpu), indent=2))
    else:
        print(planning.audit_text(first, gpu), planning.as_text(first, changes, gpu), sep="\n\n")
    if written:
        print(f"written to {written}", file=sys.stderr)


@app.command()
def sample(
    path: Annotated[str, typer.Argument(help="A run, an exported pipeline, an embedded teacher or a hub id.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of the pipeline's own scheduler.")] = 4,
    guidance: Annotated[float, typer.Option(help="w in uncond + w (cond - uncond); 1 is off.")] = 1.0,
    seed: Seed = 0,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 40,
    classes: Annotated[str | None, typer.Option(help="Class names or numbers, separated by commas.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given again.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Instead, a file with a prompt or class a line.")] = None,
    rule: Annotated[
        str, typer.Option(help="cfg, cfg++, adaptive, linear, icg, tsg, sag, s2; with a number: s2:0.25.")
    ] = "cfg",
    interval: Annotated[
        str | None, typer.Option(help="LOW,HIGH: guidance at these times only, of which 1 is noise and 0 data.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="A pipeline for the first steps, under --guidance.")] = None,
    teacher_steps: Annotated[int, typer.Option(min=1, help="How many steps are the teacher's.")] = 1,
    refine: Annotated[
        float | None, typer.Option(help="Instead, moves the student's x0 by this weight to the teacher's.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="A prompt that cross-attention steers away from, without guidance.")
    ] = None,
    negative_scale: Annotated[float, typer.Option(help="How far from it.")] = 0.2,
    out: Annotated[Path, typer.Option(help="The grid to write.")] = Path("grid.png"),
    as_json: AsJson = False,
) -> None:
    """Draw images and write them as one PNG grid."""
    named = [int(one) if one.isdecimal() else one for one in classes.split(",")] if classes else []
    if prompts and (named or prompt):
        raise InputError("--prompts: expected it without --prompt and --classes, found both")
    settings = {
        "rule": rule,
        "interval": _interval(interval) if interval else None,
        "teacher": teacher,
        "teacher_steps": teacher_steps,
        "refine": refine,
        "negative": negative,
        "negative_scale": negative_scale,
        "conditions": prompts or [*named, *(prompt or ())],
    }
    result = stepdistill.sample(path, steps=steps, guidance=guidance, seed=seed, count=count, out=out, **settings)
    facts = {"grid": str(result.path), "images": len(result.images), "seconds": round(result.seconds, 3)}
    facts["nfe"] = round(result.nfe, 2)
    print_facts(facts, as_json)


@app.command()
def edit(
    path: Annotated[str, typer.Argument(help="A run or an export of method icd.")],
    image: Annotated[Path, typer.Option(help="A picture; its middle square is scaled to the pipeline's size.")],
    source: Annotated[str, typer.Option("--from", help="What it shows: a prompt, or a class.")],
    target: Annotated[str | None, typer.Option("--to", help="What it should show; default: reconstruct it.")] = None,
    guidance: Annotated[float | None, typer.Option(help="w below tau; default: that of the export.")] = None,
    tau: Annotated[float, typer.Option(help="Time below which guidance is on, of which 1 is noise.")] = 0.7,
    tau_high: Annotated[float | None, typer.Option(help="Time above which it is off; default: tau.")] = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Picture, reconstruction and edit side by side.")] = Path("edit.png"),
    as_json: AsJson = False,
) -> None:
    """Invert a real picture with an iCD student's encoder, and draw it again under another condition."""
    settings = {"guidance": guidance, "tau": tau, "tau_high": tau_high, "seed": seed, "out": out}
    result = stepdistill.edit(path, image, source, target, **settings)
    facts = {"picture": str(result.path), "reconstruction_error": round(result.error, 5)}
    print_facts(facts | {"z_mean": round(result.z_mean, 4), "z_std": round(result.z_std, 4)}, as_json)


@app.command()
def demo(
    student: Annotated[
        str | None, typer.Argument(help="A run or an exported student; default: the one of emoji that is shipped.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Its teacher, if it is not where the export says.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 up.")
    ] = None,
) -> None:
    """Open a local page that draws with a student beside its teacher, from the same noise."""
    # gradio takes seconds to import, and is an extra.
    from stepdistill.demo_page import serve

    serve(student or assets.find("students/emoji"), teacher, port)


@app.command()
def bench(
    sources: Annotated[list[str], typer.Argument(help="Runs or pipelines; with --compare, reports.")],
    steps: Annotated[str, typer.Option(help="Student steps, separated by commas.")] = "1,2,4",
    samples: Annotated[
        int | None, typer.Option(min=2, help="Images per row; default: the protocol's, 2000 of fashion-v1.")
    ] = None,
    seed: Seed = 0,
    guidance: Annotated[float, typer.Option(help="w of a plain pipeline's row; students run without.")] = 1.0,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    protocol: Annotated[str, typer.Option(help="fashion-v1, coco30k-gigagan-v1, ... or a YAML file.")] = "fashion-v1",
    data: Annotated[Path, typer.Option(help="Folder of a protocol's prompts, images and weights.")] = Path("data"),
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing; say what is missing.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images at once; decides no result.")] = 16,
    also: Annotated[
        str | None, typer.Option(help="More metrics: lpips, imagereward, hpsv2, pickscore, separated by commas.")
    ] = None,
    solvers: Annotated[bool, typer.Option(help="Rows of the teacher under stock solvers.")] = True,
    cost: Annotated[bool, typer.Option("--cost", help="Measure latency and operations of every row now.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Merge finished reports into one table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure quality and cost: students, their teacher, and the teacher under stock fast solvers."""
    if compare:
        # The report needs matplotlib, which --help must not wait for.
        from stepdistill.eval.report import compare as merged

        report = merged(sources, out)
        print(json.dumps(report.to_dict(), indent=2) if as_json else report.to_markdown())
        return
    numbers = _numbers("--steps", steps)
    with WorkProgress() as progress:
        settings = {"guidance": guidance, "protocol": protocol, "data": data, "offline": offline, "batch": batch}
        settings |= {"also": [one.strip() for one in also.split(",")] if also else [], "solvers": solvers}
        report = stepdistill.bench(sources, numbers, samples, seed, out, cost=cost, progress=progress, **settings)
    if os.environ.get("RANK", "0") != "0":
        return
    print(json.dumps(report.to_dict(), indent=2) if as_json else report.to_markdown())


for command in (inspect, convert, methods, recipes, doctor):
    app.command()(command)


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code instead of raising."""
    wrong_input = (InputError, typer.BadParameter.__base__)  # its base is the usage error of click and of typer alike
    try:
        code = app(args=list(arguments) or ["--help"], prog_name="stepdistill", standalone_mode=False)
        return int(code or 0)
    except wrong_input as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if int(os.environ.get("RANK", 0)) == 0:
            print("error:", " ".join(message.split()), file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone; a flush at exit would complain again
        return 0
    except Exception as error:
        if os.environ.get("STEPDISTILL_TRACEBACK"):
            traceback.print_exc()
        else:
            known = isinstance(error, RunError)
            message = " ".join(str(error).split())
            print(f"failed: {message if known else f'{type(error).__name__}: {message}'}", file=sys.stderr)
            if not known:
                print("set STEPDISTILL_TRACEBACK=1 for the traceback", file=sys.stderr)
        return 1


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def _numbers(option: str, text: str) -> list[int]:
    """Positive numbers separated by commas."""
    if not all(one.strip().isdecimal() and int(one) for one in text.split(",")):
        raise InputError(f"{option}: expected numbers separated by commas, found '{text}'")
    return [int(one) for one in text.split(",")]


def _interval(text: str) -> tuple[float, float]:
    """LOW,HIGH as two numbers."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise InputError(f"--interval: expected LOW,HIGH, found '{text}'") from None
    return low, high
