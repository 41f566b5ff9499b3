"""Commands beside the verbs: they show what there is, copy, compare and clean; how facts are printed."""

import json
import os
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import stepdistill
from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.files import cache_folder, write_text
from stepdistill.pipeline.names import check_name
from stepdistill.progress import phase
from stepdistill.recipe import load, shipped, yaml_lines
from stepdistill.training.layout import RunFolder


def complete_recipe(incomplete: str) -> list[str]:
    """What a shell proposes for a recipe, beside files."""
    return [name for name in assets.recipes() if name.startswith(incomplete)]


Config = Annotated[
    str | None, typer.Option(help="Of a checkpoint file: folder or hub id of a pipeline with the same configs.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipeName = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a shipped one.", autocompletion=complete_recipe)
]


def encode(
    recipe: RecipeName,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for train.")] = None,
    safe: Annotated[
        bool, typer.Option("--safe", help="Refuse a recipe that names Python code (FILE.py:CLASS).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Encode a recipe's conditions and images ahead of its run, on all processes. Goes on where it was interrupted."""
    resolved = load(recipe, overrides or (), safe)
    phase("loading libraries")
    from stepdistill.training.distributed import launch, leave, process_count

    if (processes := process_count(resolved.distributed.processes)) > 1:
        options = [name for name, given in (("--safe", safe), ("--json", as_json)) if given]
        raise typer.Exit(launch(["encode", recipe, *(overrides or ()), *options], processes))
    try:
        stores = stepdistill.encode(resolved, safe=safe)
    except KeyboardInterrupt:
        print(f"stopped; all shards so far are whole; go on with: stepdistill encode {recipe}", file=sys.stderr)
        return
    leave()
    if int(os.environ.get("RANK", 0)) > 0:
        return  # only rank 0 prints
    facts = {name: {"rows": len(one), "bytes": one.bytes, "folder": str(one.folder)} for name, one in stores.items()}
    sizes = {name: f"{len(one)} rows, {one.bytes / 2**20:.1f} MiB in {one.folder}" for name, one in stores.items()}
    print_facts(facts if as_json else sizes, as_json)


def inspect(
    pipeline: Annotated[str, typer.Argument(help="A teacher's name, a folder, a run, a checkpoint file or a hub id.")],
    arguments: Annotated[
        list[str] | None,
        typer.Option(
            "--argument", help="NAME=VALUE of the pipeline's call, such as height=64; may be given repeatedly."
        ),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of its weights' files, such as fp16.")] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Trace a pipeline and print how its denoiser is driven."""
    named = dict(argument.partition("=")[::2] for argument in arguments or ())
    values = {name: yaml_lines.read(value, f"--argument {name}")[0] for name, value in named.items()}
    opening(pipeline)
    traced = stepdistill.inspect(pipeline, arguments=values or None, variant=variant, config=config)
    facts = traced.summary()
    if "experts" in facts and not as_json:
        from stepdistill.diffusion.experts import in_words

        facts["experts"] = in_words(traced.denoiser.spec.experts)
    if (joint := traced.denoiser.spec.joint) is not None and not as_json:
        facts["joint"] = joint.in_words
    print_facts(facts, as_json)


def convert(
    source: Annotated[
        str, typer.Argument(help="A diffusers folder or hub id with pickled weights (.bin), or a checkpoint file.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    config: Config = None,
) -> None:
    """Write a pipeline as a folder with safetensors: of pickled weights, of which nothing runs, or of a single file."""
    opening(source)
    from stepdistill.pipeline.convert import convert as rewritten  # torch is not needed for --help

    print("\n".join([*rewritten(source, out, revision, config), f"written: {out}"]))


def methods(
    family: Annotated[str | None, typer.Option(help="A part of its name, such as consistency.")] = None,
    images: Annotated[
        bool | None, typer.Option("--images/--no-images", help="Those that can train on images; those that need none.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Those with a recipe of this base, such as sdxl.")] = None,
    gpu: Annotated[float | None, typer.Option(min=0, help="Those with a recipe for so much memory in GB.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Those with a recipe of so many steps.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the distillation methods by family; with --json also their recipe keys."""
    rows = shipped.shipped_methods(family, images, base, gpu, steps)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    header = ("method", "images", "critic", "steps", "what it is")
    for number, name in enumerate(dict.fromkeys(row["family"] for row in rows)):
        cells = [
            (
                *(row["name"], row["images"], "yes" if row["critic"] else "-"),
                *(",".join(map(str, row["steps"])), row["summary"]),
            )
            for row in rows
            if row["family"] == name
        ]
        print("\n" * (number > 0) + name.upper(), shipped.as_table(header, cells), sep="\n")
    if not rows:
        print("no method fits")


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one's file, as in NAME > mine.yaml.")] = None,
    base: Annotated[str | None, typer.Option(help="A part of its teacher's name, such as sdxl or flux.")] = None,
    method: Annotated[str | None, typer.Option(help="The method's name, such as dmd2.")] = None,
    gpu: Annotated[float | None, typer.Option(min=0, help="Memory of the GPU in GB; 0: a CPU.")] = None,
    images: Annotated[bool | None, typer.Option("--images/--no-images", help="Whether it trains on images.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the student.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the shipped recipes, or print one with its comments."""
    if name is not None:
        text = assets.recipe(name).read_text(encoding="utf-8")
        print(json.dumps({"name": name, "text": text}, indent=2) if as_json else text.rstrip())
        return
    rows = shipped.shipped_recipes(base, method, gpu, images, steps)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    header = ("recipe", "base", "method", "student", "steps", "images", "GPU")
    cells = [
        (
            *(row.name, row.base, row.method, row.student, str(row.steps), "yes" if row.images else "-"),
            f"{row.gpu} GB" if row.gpu else "-",
        )
        for row in rows
    ]
    print(shipped.as_table(header, cells) if rows else "no recipe fits")


def init(
    name: Annotated[
        str, typer.Argument(help="A shipped recipe, as `recipes` lists them.", autocompletion=complete_recipe)
    ],
    file: Annotated[Path | None, typer.Argument(help="The file to write; default: NAME.yaml.")] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a shipped recipe with its comments, to be edited."""
    source = assets.recipe(name)
    target = file or Path(source.name)
    if target.exists():
        raise InputError(f"{target}: expected a new file, found one that exists; name another: init {name} FILE")
    try:
        write_text(target, source.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from None
    print_facts({"recipe": str(target), "next": f"stepdistill plan {target}"}, as_json)


def runs(
    folder: Annotated[
        Path | None, typer.Argument(help="Where runs are looked for, up to three folders down; default: runs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs: method, state, step, best metric, and the time since the last sign of life."""
    from stepdistill.training.runs import runs as standings  # --help need not wait for psutil

    place = folder or Path("runs")
    rows = [] if folder is None and not place.exists() else standings(place)  # before the first run
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = [("run", "method", "state", "step", "best", "age")]
    for row in rows:
        best = "-" if row.best is None else f"{row.metric} {row.best:.4g}"
        table.append((row.run, row.method, row.state, f"{row.step}/{row.steps}", best, _age(row.seconds)))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table if rows else [(f"no runs in {place}",)]:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=False)).rstrip())


def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, of a run in progress or of one that has ended.")],
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 up.")
    ] = None,
) -> None:
    """Open a local page on a run: its state, newest preview, curves and last numbers, renewed while it trains."""
    RunFolder(run).check()
    from stepdistill.demo.page import watch as open_page  # gradio takes seconds to import, and is an extra

    open_page(run, port)


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Two run folders or more.")],
    as_json: AsJson = False,
) -> None:
    """Runs side by side: settings that differ, last metrics, and what their reports measured."""
    from stepdistill.training.compare_runs import as_rows, compare_runs  # --help need not wait for psutil

    compared = compare_runs(folders)
    if as_json:
        print(json.dumps(compared, indent=2))
        return
    rows = as_rows(compared)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def clean(
    older: Annotated[float, typer.Option(min=0, help="Days: keep what was used since.")] = 0,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it without a question.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is in the cache (encoded data, trajectories, samples) and remove it; runs make it again."""
    from stepdistill.training.clean_cache import kept, remove, totals

    entries, folder = kept(cache_folder(), older), cache_folder()
    rows = [(kind, str(count), f"{size / 2**20:,.1f} MiB") for kind, count, size in totals(entries)]
    if not as_json:
        print(shipped.as_table((str(folder), "entries", "size"), rows) if rows else f"{folder}: nothing to remove")
    freed = sum(one.bytes for one in entries)
    # Without a terminal nobody can answer, and nothing is removed.
    in_terminal = not (yes or as_json) and entries and sys.stdin.isatty()
    if yes or (in_terminal and typer.confirm(f"Remove {freed / 2**20:,.1f} MiB?")):
        remove(entries)
    elif rows and not as_json:
        print("nothing was removed; --yes removes it")
    if as_json:
        sizes = [{"path": str(one.path), "kind": one.kind, "bytes": one.bytes} for one in entries]
        print(json.dumps({"folder": str(folder), "entries": sizes, "removed": yes}, indent=2))


def doctor(as_json: AsJson = False) -> None:
    """Say what works on this machine, and what to do about what does not."""
    from stepdistill.doctor import doctor as examine

    rows = [asdict(finding) for finding in examine()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{'ok' if row['ok'] else '--'}  {row['name']:33} {row['found']}")
        if row["advice"]:
            print(textwrap.indent(textwrap.fill(row["advice"], 42, break_on_hyphens=False), " " * 38))


def opening(*names: str) -> None:
    """Refuse pipelines that are not there before the libraries are loaded, which takes seconds; a line says so.

    Raises:
        InputError: there is none of a name.
    """
    for name in names:
        check_name(name)
    phase(f"loading {', '.join(names)}")


def _age(seconds: float) -> str:
    """A time in its largest whole unit: 45 s, 12 min, 3 h, 5 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def print_result(result: Any, as_json: bool) -> None:
    """What ``train`` prints at its end: where things are, and what a person does next."""
    facts = {"run": str(result.folder), "step": result.step, "interrupted": result.interrupted}
    if as_json or result.interrupted:
        export = RunFolder(result.folder).export
        facts |= {"export": str(export) if export.is_dir() else None, "report": result.report and str(result.report)}
        print_facts(facts, as_json)
        return
    from stepdistill.exporting.afterwards import afterwards  # the command has loaded torch by now

    page = result.report and str(result.report / "index.html")
    print_facts({"run": facts["run"], "export": str(result.folder / "export"), "report": page}, as_json=False)
    print(f"\n{afterwards(result.folder)}")


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        print(f"{name:{width}}  {'-' if value is None else value}")


def numbers(option: str, text: str) -> list[int]:
    """Positive numbers separated by commas."""
    if not all(one.strip().isdecimal() and int(one) for one in text.split(",")):
        raise InputError(f"{option}: expected numbers separated by commas, found '{text}'")
    return [int(one) for one in text.split(",")]


def picture_size(text: str | None) -> tuple[int, int] | None:
    """HEIGHTxWIDTH as two numbers."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise InputError(f"--size: expected HEIGHTxWIDTH in pixels, such as 832x1216, found '{text}'")
    return int(height), int(width)


def interval_of(text: str) -> tuple[float, float]:
    """LOW,HIGH as two numbers."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise InputError(f"--interval: expected LOW,HIGH, found '{text}'") from None
    return low, high
