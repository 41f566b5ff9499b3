"""Quality, diversity and network passes of the rules of docs/guidance.md on prompts, under protocol emoji-v1.

    python scripts/bench_prompt_rules.py

The shipped teacher of emoji under each rule in few steps, and its shipped student with its teacher's help or away from
a negative prompt. Scales are the student's guidance or a rule's default: nothing is tuned.
Writes assets/benchmarks/guidance_rules_emoji.json and the table in docs/guidance.md; ``--table-only`` repeats that,
``--only adaptive tsg`` measures these of the teacher's rows again and leaves the others.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_rules import REFINED, ROLLBACK, RULES, WEIGHT, chosen, how_made, replaced
from torch import Tensor

from stepdistill import assets
from stepdistill.eval.files import read_prompts
from stepdistill.eval.measure import load_view
from stepdistill.eval.metrics import Moments, clip_score, frechet_distance, kid, prompt_diversity
from stepdistill.eval.names import metric_text
from stepdistill.eval.networks import feature_pass
from stepdistill.eval.protocol import load_protocol
from stepdistill.eval.references import stored_rows
from stepdistill.eval.report import between_markers
from stepdistill.files import write_json
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.trace import Trace
from stepdistill.sampling.collaboration import collaborate
from stepdistill.sampling.generate import generate
from stepdistill.sampling.rules.names import rule_for
from stepdistill.sampling.rules.nasa import away_from
from stepdistill.sampling.rules.steps import StepRule, classifier_free
from stepdistill.sampling.rules.teacher import teacher_first, teacher_refined
from stepdistill.sampling.sample import inspect

TEACHER, STUDENT, SEED = "emoji", "students/emoji", 0
BEGIN = "<!-- rules on prompts: written by scripts/bench_prompt_rules.py -->"
END = "<!-- end of rules on prompts -->"
SHOWN = {"fd_enet": "FD-ENetLite0@{n}", "kid_enet": "KID-ENetLite0@{n} ×1000", "lit_score": "LiT-score"}
SCALES = {"cfg++": 0.6, "sag": 1.0}
"""Of rules that mean something else by w than cfg does."""
NEGATIVE, SMALL = "flat emoji of face", 0.2
REPEATED, TIMES = 25, 4


class Judge:
    """The networks of emoji-v1, its prompts, and what real pictures give."""

    def __init__(self, samples: int):
        spec, data = load_protocol("emoji-v1"), Path("data")
        self.kid = spec.kid.model_dump()
        self.networks = {name: load_view(spec.views[name], data, "cpu") for name in ("enet", "lit")}
        self.real = stored_rows(spec.reference.path(data), "enet")
        self.prompts = read_prompts(spec.prompts.path(data), spec.prompts.count)[:samples]
        self.texts = self.networks["lit"].texts(self.prompts)
        # Each prompt once, and then the first ones several times, for the spread of one prompt alone.
        self.index = torch.cat([torch.arange(len(self.prompts)), torch.arange(REPEATED * TIMES) % REPEATED])

    def rows(self, network: str, images: Tensor) -> Tensor:
        return feature_pass(self.networks[network], images, device="cpu")["rows"]

    def __call__(self, name: str, steps: int, w: float, nfe: float, images: Tensor) -> dict[str, Any]:
        """The facts of one row; image i is of prompt ``index[i]``."""
        n, seen = len(self.prompts), self.rows("enet", images)
        metrics = {
            "fd_enet": frechet_distance(self.real.moments, Moments.of(seen[:n])),
            "kid_enet": kid(self.real.rows(), seen[:n], **self.kid)[0],
            "lit_score": clip_score(self.rows("lit", images[:n]), self.texts),
            "diversity": prompt_diversity(seen[n:], self.index[n:]),
        }
        print(name, round(nfe, 2), {key: round(value, 3) for key, value in metrics.items()}, flush=True)
        return {"name": name, "steps": steps, "guidance": w, "nfe": nfe, "metrics": metrics}


def drawn(
    trace: Trace, judge: Judge, make: Callable[[], StepRule], steps: int, *helpers: Trace
) -> tuple[float, Tensor]:
    """(passes an image, images) under a rule."""
    denoisers = [one.denoiser for one in (trace, *helpers)]
    before = sum(one.evaluations for one in denoisers)
    encoded, settings = encode(trace, judge.prompts), {"steps": steps, "guidance": 1.0, "seed": SEED, "rule": make}
    latents = generate(trace, trace.pipeline.scheduler, encoded, judge.index, **settings)
    return (sum(one.evaluations for one in denoisers) - before) / len(judge.index), decode(trace, latents)


def teachers_rows(teacher: Trace, judge: Judge, steps: int, scale: float, only: Sequence[str]) -> list[dict[str, Any]]:
    """The teacher under each rule, or under those of the rows ``only``."""
    rows, encoded = [], encode(teacher, judge.prompts)
    for name, rule, w, interval in chosen(only):
        w = w if w == 1 else SCALES.get(rule, scale)
        make = rule_for(teacher, encoded, rule, steps=steps, guidance=w, seed=SEED, interval=interval)
        rows.append(judge(name, steps, w, *drawn(teacher, judge, make, steps)))
    return rows


def students_rows(student: Trace, teacher: Trace, judge: Judge, steps: int, scale: float) -> list[dict[str, Any]]:
    """The student alone, away from a prompt, and with its teacher at the first step, correcting, and refining."""
    helper, few, rows = teacher.denoiser, 2, []
    cases = [
        ("student", 1.0, functools.partial(classifier_free, 1.0)),
        (f"away from “{NEGATIVE}”, {SMALL:g}", 1.0, functools.partial(away_from, student, NEGATIVE, SMALL)),
        ("teacher's first step", scale, functools.partial(teacher_first, helper, scale, 1)),
        (f"refine {WEIGHT:g}", scale, functools.partial(teacher_refined, helper, scale, WEIGHT)),
    ]
    for name, w, make in cases:
        rows.append(judge(name, few, w, *drawn(student, judge, make, few, teacher)))
    scorer, asked = judge.networks["lit"], [judge.prompts[i] for i in judge.index.tolist()]

    def oracle(images: Tensor, prompts: list[str]) -> Tensor:
        return torch.cosine_similarity(judge.rows("lit", images), scorer.texts(prompts))

    settings = {"steps": few, "teacher_steps": steps, "rollback": ROLLBACK, "guidance": scale}
    together = functools.partial(collaborate, student, teacher, asked, oracle, count=len(asked), **settings)
    # Drafts of another seed say what is weak.
    threshold = float(together(threshold=-math.inf, seed=SEED + 1).scores.quantile(REFINED))
    found = together(threshold=threshold, seed=SEED)
    name = f"collaboration, {found.refined.float().mean():.0%} refined"
    return [*rows, judge(name, few, scale, found.nfe, found.images)]


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown; diversity is relative to the teacher without guidance."""
    names = [name.format(n=content["samples"]) for name in SHOWN.values()]
    lines = [f"| | w | NFE | {' | '.join(names)} | Diversity a prompt |", "|---|---|---|" + "---|" * (len(names) + 1)]
    first = content["rows"][0]["metrics"]["diversity"]
    for who, rows in (("teacher", content["rows"]), ("student", content["student_rows"])):
        for one in rows:
            values = [metric_text(metric, one["metrics"][metric]) for metric in SHOWN]
            values.append(f"{one['metrics']['diversity'] / first:.3f}")
            facts = [f"{who}, {one['steps']} steps: {one['name']}", f"{one['guidance']:g}", f"{one['nfe']:.4g}"]
            lines.append(f"| {' | '.join([*facts, *values])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of the teacher")
    parser.add_argument("--samples", type=int, default=482, help="prompts of the protocol")
    parser.add_argument("--only", nargs="+", default=(), choices=[one[0] for one in RULES], help="rows of the teacher")
    parser.add_argument("--table-only", action="store_true", help="write the table from the stored rows")
    arguments = parser.parse_args()
    out = assets.root() / "assets" / "benchmarks" / "guidance_rules_emoji.json"
    if not arguments.table_only:
        torch.set_grad_enabled(False)
        place = assets.find(STUDENT)
        scale = json.loads((place / "stepdistill.json").read_text(encoding="utf-8"))["guidance"]
        teacher, student, judge = inspect(TEACHER), inspect(place), Judge(arguments.samples)
        made = how_made("bench_prompt_rules")
        rows = teachers_rows(teacher, judge, arguments.steps, scale, arguments.only)
        if arguments.only:
            content = replaced(json.loads(out.read_text(encoding="utf-8")), rows, made)
        else:
            content = {
                "schema": 1,
                "protocol": "emoji-v1",
                "steps": arguments.steps,
                "samples": len(judge.prompts),
                "seed": SEED,
                **made,
                "rows": rows,
                "student_rows": students_rows(student, teacher, judge, arguments.steps, scale),
            }
        write_json(out, content)
    content = json.loads(out.read_text(encoding="utf-8"))
    between_markers(assets.root() / "docs" / "guidance.md", BEGIN, END, table(content))


if __name__ == "__main__":
    main()
