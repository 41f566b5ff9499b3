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
from stepdistill.cli_facts import (
    AsJson,
    RecipeName,
    clean,
    compare,
    convert,
    doctor,
    encode,
    init,
    inspect,
    interval_of,
    methods,
    numbers,
    opening,
    picture_size,
    print_facts,
    print_result,
    recipes,
    runs,
    watch,
)
from stepdistill.errors import InputError, RunError
from stepdistill.progress import WorkProgress, phase
from stepdistill.recipe import load
from stepdistill.training.layout import RunFolder

app = typer.Typer(
    name="stepdistill",
    help="Distil a diffusers pipeline to 1-8 steps without guidance, in stock format.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Safe = Annotated[bool, typer.Option("--safe", help="Refuse a recipe that names Python code (FILE.py:CLASS).")]
PictureSize = Annotated[str | None, typer.Option("--size", metavar="HEIGHTxWIDTH", help="In pixels: 832x1216.")]
Seed = Annotated[int, typer.Option(help="Image i depends on (seed, i) only.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"stepdistill {stepdistill.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipeName,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.steps=20 output=runs/mine.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
    profile: Annotated[
        int,
        typer.Option(
            min=0, help="Instead: profile this many steps; writes a Chrome trace and a table into the run folder."
        ),
    ] = 0,
    safe: Safe = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: train, export, report. Resumes a run that was interrupted."""
    resolved = load(recipe, overrides or (), safe)
    if dry_run:
        print(json.dumps(resolved.model_dump(mode="json"), indent=2) if as_json else resolved.to_yaml().rstrip())
        return
    phase("loading libraries")
    if profile:
        from stepdistill.training.profiling import profile_training, table

        folder, facts = profile_training(resolved, profile)
        print(json.dumps(facts, indent=2) if as_json else f"{table(facts)}\n{folder / 'trace.json'}")
        return
    from stepdistill.training.distributed import launch, leave, process_count, rows_each

    if (processes := process_count(resolved.distributed.processes)) > 1:
        rows_each(resolved.train.batch_size, resolved.train.accumulation, processes)  # before any of them starts
        options = [name for name, given in (("--safe", safe), ("--json", as_json)) if given]
        raise typer.Exit(launch(["train", recipe, *(overrides or ()), *options], processes))
    result = stepdistill.train(resolved, safe=safe)
    leave()
    if int(os.environ.get("RANK", 0)) > 0:
        return  # only rank 0 prints
    print_result(result, as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    fuse: Annotated[
        bool | None, typer.Option(help="Merge a LoRA student into a whole pipeline, or write LoRA weights.")
    ] = None,
    keys: Annotated[
        str | None, typer.Option(help="Key names in the LoRA file: diffusers, or kohya for ComfyUI.")
    ] = None,
    half: Annotated[bool | None, typer.Option(help="The student's weights in float16: half the size.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the student's weights: fp32, fp16 or bf16.")] = None,
    to: Annotated[
        str | None, typer.Option(help="comfyui: add one file for ComfyUI, Forge and kohya's scripts, and a workflow.")
    ] = None,
    check: Annotated[
        str | None, typer.Option(help="Compare it with the training-time sampler on the cpu or device; off: nowhere.")
    ] = None,
    hub: Annotated[str | None, typer.Option(help="Then upload it to OWNER/NAME on the Hugging Face hub.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    safe: Safe = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's student as a stock diffusers pipeline or LoRA, checked against the training-time sampler."""
    if keys not in (None, "diffusers", "kohya"):
        raise InputError(f"--keys: expected diffusers or kohya, found '{keys}'")
    if dtype not in (None, "fp32", "fp16", "bf16"):
        raise InputError(f"--dtype: expected fp32, fp16 or bf16, found '{dtype}'")
    if to not in (None, "diffusers", "comfyui"):
        raise InputError(f"--to: expected diffusers or comfyui, found '{to}'")
    if check not in (None, "cpu", "device", "off"):
        raise InputError(f"--check: expected cpu, device or off, found '{check}'")
    if hub is not None:
        from stepdistill.exporting.hub import check_name as check_repository
        from stepdistill.exporting.hub import push

        check_repository(hub)
    RunFolder(run).check()
    phase(f"loading {run}")
    result = stepdistill.export(run, out, fuse, keys, half, safe, dtype, to, check)
    facts = {result.form: str(result.folder), "max_error": result.max_error}
    if hub is not None:
        facts["hub"] = push(result.folder, hub, private=not public)
    print_facts(facts, as_json)


@app.command()
def join(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders, one for each group.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    as_json: AsJson = False,
) -> None:
    """Put the students of groups of conditions (data.groups) into one folder, with a router."""
    for run in runs:
        RunFolder(run).check()
    print_facts({"students": str(stepdistill.join(runs, out))}, as_json)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for train.")] = None,
    gpu: Annotated[float | None, typer.Option(min=1, help="Memory of the device in GiB: propose what fits.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Write the proposals into the recipe.")] = False,
    gpus: Annotated[str | None, typer.Option(help="Numbers of GPUs, separated by commas: memory of each.")] = None,
    seconds: Annotated[
        str | None, typer.Option(help="Of a training step on one GPU: a number, or a run folder that has measured it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Audit a recipe's run and say what memory it will need, before any weight is loaded."""
    if fit and gpu is None:
        raise InputError("--fit: expected --gpu with the device's memory in GiB, found none")
    if fit and overrides:
        raise InputError("--fit: expected the recipe alone, found overrides; they are not in its file")
    if gpus is not None and (fit or seconds):
        raise InputError(f"{'--fit' if fit else '--seconds'}: expected it without --gpus")
    taken = overrides or ()
    load(recipe, taken)  # a mistake in it must not wait for the libraries
    phase("loading libraries; no weights are read")
    if gpus is not None:
        from stepdistill.planning import scale

        estimates = scale.scale(recipe, taken, numbers("--gpus", gpus))
        print(json.dumps(scale.as_dict(estimates, gpu), indent=2) if as_json else scale.as_text(estimates, gpu))
        return
    from stepdistill.planning import plan as planning

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
    size: PictureSize = None,
    classes: Annotated[str | None, typer.Option(help="Class names or numbers, separated by commas.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given again.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Instead: a file with one prompt or class per line.")] = None,
    rule: Annotated[
        str, typer.Option(help="cfg, cfg++, apg, adaptive, linear, icg, tsg, sag, s2; with numbers: apg:0,15,-0.5.")
    ] = "cfg",
    interval: Annotated[
        str | None, typer.Option(help="LOW,HIGH: guidance only at these times (1 is noise, 0 is data).")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="A pipeline that runs the first steps, with --guidance.")] = None,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Number of first steps that the teacher runs.")] = 1,
    refine: Annotated[
        float | None,
        typer.Option(
            help="Instead: blend the x0 of these steps with the teacher's by this weight (0-1, Distillation++)."
        ),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="Negative prompt without guidance, inside the cross-attention (NASA).")
    ] = None,
    negative_scale: Annotated[float, typer.Option(help="Strength of --negative.")] = 0.2,
    out: Annotated[Path, typer.Option(help="The grid to write.")] = Path("grid.png"),
    as_json: AsJson = False,
) -> None:
    """Draw images and write them as one PNG grid."""
    named = [int(one) if one.isdecimal() else one for one in classes.split(",")] if classes else []
    if prompts and (named or prompt):
        raise InputError("--prompts: expected it without --prompt and --classes, found both")
    settings = {
        "rule": rule,
        "interval": interval_of(interval) if interval else None,
        "teacher": teacher,
        "teacher_steps": teacher_steps,
        "refine": refine,
        "negative": negative,
        "negative_scale": negative_scale,
        "size": picture_size(size),
        "conditions": prompts or [*named, *(prompt or ())],
    }
    opening(path)
    result = stepdistill.sample(path, steps=steps, guidance=guidance, seed=seed, count=count, out=out, **settings)
    facts = {"grid": str(result.path), "images": len(result.images), "seconds": round(result.seconds, 3)}
    if files := [str(file) for file in result.files]:
        facts["files"] = files if as_json else ", ".join(files)
    facts["nfe"] = round(result.nfe, 2)
    print_facts(facts, as_json)


@app.command()
def edit(
    path: Annotated[str, typer.Argument(help="A run or an export of method icd.")],
    image: Annotated[Path, typer.Option(help="A picture; its middle square is scaled to the pipeline's size.")],
    source: Annotated[str, typer.Option("--from", help="Prompt or class of the picture.")],
    target: Annotated[
        str | None, typer.Option("--to", help="Prompt or class of the edit; default: only reconstruct.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="w below tau; default: that of the export.")] = None,
    tau: Annotated[float, typer.Option(help="Time below which guidance is on, of which 1 is noise.")] = 0.7,
    tau_high: Annotated[float | None, typer.Option(help="Time above which it is off; default: tau.")] = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Picture, reconstruction and edit side by side.")] = Path("edit.png"),
    as_json: AsJson = False,
) -> None:
    """Invert a real picture with an iCD student's encoder, and draw it again under another condition."""
    opening(path)
    settings = {"guidance": guidance, "tau": tau, "tau_high": tau_high, "seed": seed, "out": out}
    result = stepdistill.edit(path, image, source, target, **settings)
    facts = {"picture": str(result.path), "reconstruction_error": round(result.error, 5)}
    print_facts(facts | {"z_mean": round(result.z_mean, 4), "z_std": round(result.z_std, 4)}, as_json)


@app.command()
def demo(
    student: Annotated[
        str | None, typer.Argument(help="A run or an exported student; default: the one of emoji that is shipped.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="The teacher, if it is not at the path in the export.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 up.")
    ] = None,
    size: PictureSize = None,
) -> None:
    """Open a local page that draws with a student beside its teacher, from the same noise."""
    if student:
        opening(student)
    # gradio takes seconds to import, and is an extra.
    from stepdistill.demo.page import serve

    serve(student or assets.find("students/emoji"), teacher, port, picture_size(size))


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
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing; report missing files.")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per batch; default 16; changes last digits.")] = None,
    also: Annotated[
        str | None, typer.Option(help="More metrics: lpips, imagereward, hpsv2, pickscore, separated by commas.")
    ] = None,
    solvers: Annotated[bool, typer.Option(help="Rows of the teacher under stock solvers.")] = True,
    cost: Annotated[bool, typer.Option("--cost", help="Measure latency and operations of every row now.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Merge finished reports into one table.")] = False,
    single_file: Annotated[bool, typer.Option("--single-file", help="Embed the pictures in the HTML page.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure quality and cost: students, their teacher, and the teacher under stock fast solvers."""
    if compare:
        # The report needs matplotlib, which --help must not wait for.
        from stepdistill.eval.report import compare as merged

        report = merged(sources, out, single_file)
        print(json.dumps(report.to_dict(), indent=2) if as_json else report.to_markdown())
        return
    counts = numbers("--steps", steps)
    opening(*sources)
    with WorkProgress() as progress:
        report = stepdistill.bench(
            sources,
            counts,
            samples,
            seed,
            out,
            guidance=guidance,
            protocol=protocol,
            data=data,
            offline=offline,
            batch=batch,
            also=[one.strip() for one in also.split(",")] if also else [],
            solvers=solvers,
            cost=cost,
            single_file=single_file,
            progress=progress,
        )
    if os.environ.get("RANK", "0") != "0":
        return
    print(json.dumps(report.to_dict(), indent=2) if as_json else report.to_markdown())


for command in (encode, inspect, convert, methods, recipes, init, runs, watch, compare, clean, doctor):
    app.command()(command)


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code instead of raising."""
    usage = typer.BadParameter.__base__  # the usage error of click and of typer alike
    try:
        code = app(args=list(arguments) or ["--help"], prog_name="stepdistill", standalone_mode=False)
        return int(code or 0)
    except (InputError, usage) as error:  # ty: ignore[invalid-exception-caught]
        message = getattr(error, "format_message", error.__str__)()
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
