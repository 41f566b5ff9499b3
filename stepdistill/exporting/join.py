"""Several students, each of a run over one group of conditions, in one folder with the router between them."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stepdistill.diffusion.routing import Router
from stepdistill.errors import InputError
from stepdistill.files import atomic, write_text
from stepdistill.pipeline.exports import FACTS, ExportFacts
from stepdistill.pipeline.students import FOLDER
from stepdistill.training.layout import RunFolder

ALIKE = ("teacher", "revision", "made_of", "guidance", "method", "steps", "sampler", "call_guidance", "form")
"""Facts that all students of a folder share."""


def join(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the exports of ``runs``, one for each group of ``data.groups``, and their router into ``out``.

    ``sample``, ``bench`` and ``demo`` draw each condition with its own student; each export in ``out/students`` is the
    stock folder that it was.

    Args:
        runs: run folders, in any order.
        out: the folder to write; it appears whole or not at all.

    Returns:
        ``out``.

    Raises:
        InputError: a group is missing or there twice, the students differ in more than their weights, or ``out`` is
            something else than an earlier export.
    """
    out, found = Path(out), {}
    if out.exists() and not (out / FACTS).is_file():
        raise InputError(f"{out}: exists and is not an export of stepdistill; choose another folder")
    for run in (Path(run).resolve() for run in runs):
        if run == out.resolve() or run in out.resolve().parents or out.resolve() in run.parents:
            raise InputError(f"{out}: expected a folder beside the runs, found one inside or around {run}")
    for run in map(RunFolder, runs):
        number, facts, router = _student(run)
        if number in found:
            raise InputError(f"{run.path}: expected another group than {found[number][0].path}, found {number} twice")
        found[number] = run, facts, router
    if not found:
        raise InputError("join: expected run folders, found none")
    _, facts, router = next(iter(found.values()))
    if missing := sorted(set(range(len(router))) - found.keys()):
        raise InputError(f"join: expected a run for each of {len(router)} groups, found none for {missing[0]}")
    for run, its, groups in found.values():
        different = [name for name in ALIKE if getattr(its, name) != getattr(facts, name)]
        if different or not groups.alike(router):
            one = different[0] if different else "data.groups or data.conditions"
            raise InputError(f"{run.path}: expected students that differ in their weights alone, found another {one}")
    with atomic(out) as draft:
        for number, (run, _, _) in found.items():
            shutil.copytree(run.export, draft / FOLDER / str(number))
        router.write(draft)
        joined = replace(facts, recipe=facts.recipe | {"data": facts.recipe["data"] | {"groups": 1, "group": 0}})
        joined.write(draft)
        write_text(draft / "README.md", _card(joined, router))
    return out


def _student(run: RunFolder) -> tuple[int, ExportFacts, Router]:
    """A run's group, the facts of its export, and its router."""
    run.check()
    facts = ExportFacts.read(run.export)
    if facts is None:
        raise InputError(f"{run.path}: the run has no export/ yet; finish it")
    if not run.router.is_file():
        raise InputError(f"{run.path}: expected a run with data.groups above 1, found {run.router.name} missing")
    return facts.recipe["data"]["group"], facts, Router.read(run.path)


def _card(facts: ExportFacts, router: Router) -> str:
    """The text for people."""
    by = f"the class ({router.argument})" if router.classes else "the nearest cluster of the prompt's text embedding"
    groups = [f"| {n} | {', '.join(map(str, one))} |" for n, one in enumerate(router.classes)]
    table = "\n".join(["", "| student | classes |", "|---|---|", *groups, ""]) if groups else ""
    return f"""\
---
library_name: diffusers
license: other
license_name: as-the-teacher
tags: [diffusion, distillation, few-step, {facts.method}]
---

# {Path(facts.teacher).name} in {facts.steps} steps, {len(router)} students

Each student draws one group of conditions, and {by} says which (`router.json`). Guidance {facts.guidance:g} of the
teacher is in their weights.
{table}
The router is stepdistill's, and no stock call knows it:

    stepdistill sample PATH_OF_THIS_FOLDER --steps {facts.steps}

`students/0`, `students/1`, ... are exports in stock diffusers format with cards of their own. One of them, loaded by
itself, draws well what is in its group, and other conditions worse.
"""
