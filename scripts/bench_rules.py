"""Quality, diversity and network passes of the rules of docs/guidance.md, under the demo protocol.

    OMP_NUM_THREADS=1 python scripts/bench_rules.py

The embedded teacher under each rule in few steps, and a student of two steps whom its teacher helps. Scales are the
teacher's of all recipes or a rule's default: nothing is tuned. The student is ``stepdistill train fashion_tcd``'s.
Writes assets/benchmarks/guidance_rules.json and the table in docs/guidance.md; ``--table-only`` repeats the table,
``--only adaptive tsg`` measures these of the teacher's rows again and leaves the others.
"""

import argparse
import functools
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import assets
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.eval.bench.rows import Bench, open_bench
from stepdistill.eval.bench.settings import Settings
from stepdistill.eval.bench.sources import device_name, library_versions
from stepdistill.eval.measure import measure_classes
from stepdistill.eval.names import metric_name, metric_text
from stepdistill.eval.networks import feature_pass
from stepdistill.eval.report import between_markers
from stepdistill.files import write_json
from stepdistill.pipeline.conditioning import Conditioning, encode
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.trace import Trace
from stepdistill.sampling.collaboration import collaborate
from stepdistill.sampling.generate import generate
from stepdistill.sampling.rules.names import rule_for
from stepdistill.sampling.rules.steps import StepRule, classifier_free
from stepdistill.sampling.rules.teacher import teacher_first, teacher_refined
from stepdistill.sampling.sample import inspect

TEACHER, SCALE, SEED = "fashion-dit", 1.5, 0
BEGIN, END = "<!-- rules: written by scripts/bench_rules.py -->", "<!-- end of rules -->"
SHOWN = ("fd_classifier", "fd_enet", "precision", "recall", "accuracy")
# The name of the row, the rule, w, the interval.
RULES: tuple[tuple[str, str, float, tuple[float, float] | None], ...] = (
    ("no guidance", "cfg", 1.0, None),
    ("cfg", "cfg", SCALE, None),
    ("cfg, interval 0.2-0.8", "cfg", SCALE, (0.2, 0.8)),
    ("cfg++", "cfg++", 0.6, None),
    ("adaptive", "adaptive", SCALE, None),
    ("linear", "linear", SCALE, None),
    ("linear, interval 0.5-1", "linear", SCALE, (0.5, 1.0)),
    ("icg", "icg", SCALE, None),
    ("tsg", "tsg", SCALE, None),
    ("sag", "sag", 1.0, None),
    ("s2", "s2", SCALE, None),
)
STUDENT_STEPS, WEIGHT = 2, 0.3
# Of the collaboration: the share of drafts that the teacher refines, its steps, how far it goes back.
REFINED, ROLLBACK = 0.3, 0.5


@dataclass(frozen=True)
class Model:
    """A traced pipeline with the protocol's classes encoded."""

    trace: Trace
    conditioning: Conditioning


def chosen(only: Sequence[str]) -> list[tuple[str, str, float, tuple[float, float] | None]]:
    """The rules of these rows, of all where none is named."""
    return [one for one in RULES if not only or one[0] in only]


def replaced(stored: dict[str, Any], rows: list[dict[str, Any]], made: dict[str, Any]) -> dict[str, Any]:
    """The stored content with these rows instead of those of their names; how they were ``made`` stands in each."""
    again = {one["name"]: one | made for one in rows}
    return stored | {"rows": [again.get(one["name"], one) for one in stored["rows"]]}


def how_made(script: str) -> dict[str, Any]:
    """The command, the versions and the device of this run."""
    command = shlex.join(["python", f"scripts/{script}.py", *sys.argv[1:]])
    return {"command": command, "versions": library_versions(), "device": device_name(torch.device("cpu"))}


def row(name: str, steps: int, w: float, nfe: float, images: Tensor, bench: Bench) -> dict[str, Any]:
    """The facts of one row; image i is of class i modulo their number."""
    labels = torch.arange(len(images)) % len(bench.protocol.classes)
    found = measure_classes(bench.protocol, bench.networks, bench.real, images.cpu(), labels)
    print(name, round(nfe, 2), {key: round(value, 3) for key, value in found.metrics.items()}, flush=True)
    facts = {"name": name, "steps": steps, "guidance": w, "nfe": nfe}
    return facts | {"metrics": found.metrics, "diagnostics": found.diagnostics}


def drawn(
    model: Model, make: Callable[[], StepRule], steps: int, samples: int, denoisers: Sequence[Denoiser]
) -> tuple[float, Tensor]:
    """(passes an image, images) under a rule."""
    before = sum(one.evaluations for one in denoisers)
    index = torch.arange(samples) % len(model.conditioning)
    settings = {"steps": steps, "guidance": 1.0, "seed": SEED, "rule": make}
    latents = generate(model.trace, model.trace.pipeline.scheduler, model.conditioning, index, **settings)
    return (sum(one.evaluations for one in denoisers) - before) / samples, decode(model.trace, latents)


def teachers_rows(
    teacher: Model, bench: Bench, steps: int, samples: int, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The teacher under each rule, or under those of the rows ``only``."""
    rows = []
    for name, rule, w, interval in chosen(only):
        settings = {"steps": steps, "guidance": w, "seed": SEED, "interval": interval}
        make = rule_for(teacher.trace, teacher.conditioning, rule, **settings)
        nfe, images = drawn(teacher, make, steps, samples, [teacher.trace.denoiser])
        rows.append(row(name, steps, w, nfe, images, bench))
    return rows


def students_rows(student: Model, teacher: Model, bench: Bench, steps: int, samples: int) -> list[dict[str, Any]]:
    """The student alone, and with its teacher at the first step, correcting it, and refining the weak drafts."""
    helper, rows = teacher.trace.denoiser, []
    cases = [
        ("student", 1.0, functools.partial(classifier_free, 1.0)),
        ("teacher's first step", SCALE, functools.partial(teacher_first, helper, SCALE, 1)),
        (f"refine {WEIGHT:g}", SCALE, functools.partial(teacher_refined, helper, SCALE, WEIGHT)),
    ]
    for name, w, make in cases:
        nfe, images = drawn(student, make, STUDENT_STEPS, samples, [student.trace.denoiser, helper])
        rows.append(row(name, STUDENT_STEPS, w, nfe, images, bench))
    classifier, labels = bench.networks["classifier"], list(bench.protocol.classes)

    def oracle(images: Tensor, asked: Sequence[str]) -> Tensor:
        numbers = torch.tensor([labels.index(name) for name in asked])
        return feature_pass(classifier, images.cpu())["logits"].log_softmax(1).gather(1, numbers[:, None])[:, 0]

    together = functools.partial(collaborate, student.trace, teacher.trace, range(len(labels)), oracle, count=samples)
    together = functools.partial(together, steps=STUDENT_STEPS, teacher_steps=steps, rollback=ROLLBACK, guidance=SCALE)
    # Drafts of another seed say what is weak.
    threshold = float(together(threshold=-math.inf, seed=SEED + 1).scores.quantile(REFINED))
    found = together(threshold=threshold, seed=SEED)
    name = f"collaboration, {found.refined.float().mean():.0%} refined"
    return [*rows, row(name, STUDENT_STEPS, SCALE, found.nfe, found.images, bench)]


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown; diversity is relative to the teacher without guidance."""
    samples = content["samples"]
    lines = [
        f"| | w | NFE | {' | '.join(metric_name(metric, samples) for metric in SHOWN)} | Diversity-ENetLite0 |",
        "|---|---|---|" + "---|" * (len(SHOWN) + 1),
    ]
    for title, rows in (("teacher", content["rows"]), (content["student"], content["student_rows"])):
        for one in rows:
            metrics = one["metrics"]
            values = [metric_text(metric, metrics[metric]) for metric in SHOWN]
            values.append(f"{metrics['diversity_enet'] / content['rows'][0]['metrics']['diversity_enet']:.3f}")
            facts = [f"{title}, {one['steps']} steps: {one['name']}", f"{one['guidance']:g}", f"{one['nfe']:.4g}"]
            lines.append(f"| {' | '.join([*facts, *values])} |")
    error = max(one["diagnostics"]["fd_classifier_error"] for one in content["rows"])
    lines.append(f"\nOther samples would move FD-classifier by up to {error:.2f} (one standard error).")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/fashion_tcd", help="a run of the teacher's")
    parser.add_argument("--steps", type=int, default=10, help="of the teacher")
    parser.add_argument("--samples", type=int, default=500, help="images per row")
    parser.add_argument("--only", nargs="+", default=(), choices=[one[0] for one in RULES], help="rows of the teacher")
    parser.add_argument("--table-only", action="store_true", help="write the table from the stored rows")
    arguments = parser.parse_args()
    out = assets.root() / "assets" / "benchmarks" / "guidance_rules.json"
    if not arguments.table_only:
        bench = open_bench(Settings(device="cpu", alone=True))
        paths = {"teacher": TEACHER} | ({} if arguments.only else {"student": arguments.student})
        traced, classes = {role: inspect(path) for role, path in paths.items()}, range(len(bench.protocol.classes))
        models = {role: Model(one, encode(one, classes)) for role, one in traced.items()}
        settings, made = {"steps": arguments.steps, "samples": arguments.samples}, how_made("bench_rules")
        rows = teachers_rows(models["teacher"], bench, **settings, only=arguments.only)
        if arguments.only:
            content = replaced(json.loads(out.read_text(encoding="utf-8")), rows, made)
        else:
            content = {
                "schema": 1,
                "protocol": bench.protocol.id,
                **settings,
                "seed": SEED,
                **made,
                "rows": rows,
                "student": Path(arguments.student).name,
                "student_rows": students_rows(models["student"], models["teacher"], bench, **settings),
            }
        write_json(out, content)
    content = json.loads(out.read_text(encoding="utf-8"))
    between_markers(assets.root() / "docs" / "guidance.md", BEGIN, END, table(content))


if __name__ == "__main__":
    main()
