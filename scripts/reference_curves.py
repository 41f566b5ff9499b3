"""Write docs/curves.md: what the lines of a run look like when all is well, and when it is not.

    python scripts/reference_curves.py               # trains what is missing below build/curves, then draws
    python scripts/reference_curves.py --draw        # from assets/benchmarks/curves.json, nothing is run

Each case is recipes/quickstart.yaml on the embedded teacher with a few keys changed, one seed.
"""

import argparse
import json
import shlex
import textwrap
from pathlib import Path

import torch

import stepdistill
from stepdistill.eval.bench.sources import device_name, library_versions
from stepdistill.eval.pictures import training_plot

ROOT = Path(__file__).parents[1]
STORED = ROOT / "assets" / "benchmarks" / "curves.json"
PICTURES = ROOT / "docs" / "pictures" / "curves"
LOGGED = ("train.log_every=1", "train.preview_every=10", "report.steps=[4]", "report.solvers=false")
CASES = {
    "as_shipped": (
        "All is well",
        (),
        """Regression on the teacher's trajectories (to step 55), the critic alone (to 85), then both. The losses are
        noisy and fall little: a row's loss depends on the step of the grid and on the time that it drew, and the critic
        follows a student that moves. The student's gradient norm goes down slowly, the critic's stays level. The
        spread of the latents stays within a few per cent of the teacher's and settles.""",
    ),
    "no_start": (
        "From the teacher's own weights",
        ("method.regression_steps=0", "train.steps=150"),
        """What most runs on other pipelines look like: without the first phase the student begins blurred, its spread
        below the teacher's. It gains contrast, goes past the teacher and levels off a tenth above it. That is
        oversaturated, and it shows in the score. A start by regression, as above, is one remedy.""",
    ),
    "high_rate": (
        "The student's rate is twenty times too high",
        ("train.lr=2.0e-3",),
        """The first loss leaps to a multiple of its first value and the gradient norm spikes; afterwards the drift
        swings from preview to preview where the good run's creeps. The losses of the second half look *better* than the
        good run's, smooth and falling. They say nothing of quality.""",
    ),
    "slow_critic": (
        "The critic cannot follow",
        (
            "method.regression_steps=0",
            "train.steps=150",
            "method.critic_steps=1",
            "method.critic_warmup=0",
            "train.critic_lr=1.0e-6",
        ),
        """Its denoising loss and gradient norm climb from the first steps: it does not know the student's pictures any
        more. The student's loss falls thirtyfold all the same: its gradient is divided by the distance between its
        pictures and what the teacher makes of them, and that grows. The spread runs away within twenty steps. Raise
        `train.critic_lr` or `method.critic_steps`, and give the critic a warm-up.""",
    ),
}
HEAD = """# Loss curves: what good and bad runs look like

Written by `scripts/reference_curves.py`: recipes/quickstart.yaml (DMD2, 4 steps) as it is, and spoilt on purpose; one
seed each. Every run's `metrics.jsonl` holds such numbers, and its report draws them like this. On other pipelines
losses have another size; these signs are what to look for there.

Look at the previews first, at the drift second, at losses last.
"""
SHOWN = ("/loss/", "/grad_norm", "drift/")


def trained(name: str, overrides: tuple[str, ...], folder: Path) -> dict:
    """The lines and the final scores of a case, which is run if its folder holds no report yet."""
    run = folder / name
    if not (run / "report" / "report.json").is_file():
        stepdistill.train(ROOT / "recipes" / "quickstart.yaml", [*overrides, *LOGGED, f"output={run}"])
    report = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    scores = {row["role"]: row["metrics"] for row in report["rows"]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "overrides": overrides,
        "protocol": report["protocol"],
        "samples": next(row["samples"] for row in report["rows"]),
        "scores": {role: {"fd_classifier": round(found["fd_classifier"], 2)} for role, found in scores.items()},
        "lines": [
            {key: value for key, value in line.items() if key == "step" or any(part in key for part in SHOWN)}
            for line in lines
        ],
    }


def page(stored: dict) -> str:
    """docs/curves.md."""
    parts = [HEAD]
    for name, case in stored["cases"].items():
        title, _, text = CASES[name]
        student, teacher = (case["scores"][role]["fd_classifier"] for role in ("student", "teacher"))
        command = shlex.join(["stepdistill", "train", "quickstart", *case["overrides"], *LOGGED, f"output=runs/{name}"])
        parts.append(
            f"## {title}\n\nFD-classifier@{case['samples']} {student:.2f}; the teacher's at 50 steps: {teacher:.2f}."
            f"\n\n![Losses, gradient norms and drift](pictures/curves/{name}.png)\n\n"
            f"{textwrap.fill(' '.join(text.split()), 120)}\n\n```bash\n{command}\n```\n"
        )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "curves")
    parser.add_argument("--draw", action="store_true", help="only draw what is stored")
    arguments = parser.parse_args()
    if not arguments.draw:
        cases = {name: trained(name, overrides, arguments.work) for name, (_, overrides, _) in CASES.items()}
        stored = {"device": device_name(torch.device("cpu")), "libraries": library_versions(), "cases": cases}
        STORED.write_text(json.dumps(stored) + "\n", encoding="utf-8")
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    PICTURES.mkdir(parents=True, exist_ok=True)
    (ROOT / "docs" / "curves.md").write_text(page(stored), encoding="utf-8")
    for name, case in stored["cases"].items():
        training_plot(case["lines"]).save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
