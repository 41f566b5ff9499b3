"""The commands that look and list: inspect, convert, methods, recipes, doctor; and how facts are printed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import stepdistill
from stepdistill import assets, yaml_lines

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def inspect(
    pipeline: Annotated[str, typer.Argument(help="An embedded teacher, a folder, a run or a hub id.")],
    arguments: Annotated[
        list[str] | None,
        typer.Option(
            "--argument", help="NAME=VALUE of the pipeline's call, such as height=64; may be given repeatedly."
        ),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of its weights' files, such as fp16.")] = None,
    as_json: AsJson = False,
) -> None:
    """Trace a pipeline and print how its denoiser is driven."""
    named = dict(argument.partition("=")[::2] for argument in arguments or ())
    values = {name: yaml_lines.read(value, f"--argument {name}")[0] for name, value in named.items()}
    print_facts(stepdistill.inspect(pipeline, arguments=values or None, variant=variant).summary(), as_json)


def convert(
    source: Annotated[str, typer.Argument(help="A diffusers folder with pickled weights (.bin), or a hub id of one.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Copy a pipeline with its pickled weights as safetensors; nothing in the pickles runs."""
    from stepdistill.convert import convert as rewritten  # torch is not needed for --help

    print("\n".join([*rewritten(source, out, revision), f"written: {out}"]))


def methods(as_json: AsJson = False) -> None:
    """List the distillation methods; with --json also their recipe keys."""
    # Methods import torch, which --help must not wait for.
    from stepdistill.methods import METHODS

    rows = [
        {
            "name": name,
            "summary": method.summary,
            "keys": {
                key: {"default": field.get_default(call_default_factory=True), "description": field.description}
                for key, field in method.Config.model_fields.items()
            },
        }
        for name, method in METHODS.items()
    ]
    _print_list(rows, as_json)


def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    rows = [
        {"name": name, "summary": _headline(assets.recipe(name)), "path": str(assets.recipe(name))}
        for name in assets.recipes()
    ]
    _print_list(rows, as_json)


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
            print(f"{'':37} {row['advice']}")


def _headline(recipe: Path) -> str:
    """The first comment of a recipe."""
    first = recipe.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {'-' if value is None else value}")


def _print_list(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:{width}}  {row['summary']}")
