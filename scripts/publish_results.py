"""Publish finished runs: copy their reports to assets/benchmarks, draw a picture, write docs/comparison.md's tables.

    python scripts/publish_results.py runs/fashion_dmd2 runs/fashion_tcd runs/quickstart
    python scripts/publish_results.py runs/emoji_dmd2

The picture of the example report shows the first run's student, where that draws clothes. The tables between the
markers in docs/comparison.md, one for each protocol, are written from the stored reports with the most samples, so
``--table-only`` repeats them without the runs.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from stepdistill import assets
from stepdistill.eval.names import metric_name, metric_text
from stepdistill.eval.report import between_markers
from stepdistill.sampling.image_grid import image_grid
from stepdistill.sampling.sample import sample

BEGIN, END = "<!-- results: written by scripts/publish_results.py -->", "<!-- end of results -->"
ZOOM = 2
# Columns of a protocol.
SHOWN = {
    "fashion-v1": ("fd_classifier", "fd_enet", "kid_enet", "precision", "recall", "accuracy"),
    "emoji-v1": (
        "fd_enet",
        "kid_enet",
        "lit_score",
        "lit_score_styles",
        "lit_score_concepts",
        "memorised",
        "diversity",
    ),
}
PICTURE = "four_steps.png"
REAL = {"fashion-v1": "real test images (the floor)", "emoji-v1": "real pictures of the captions"}


def picture(run: Path, out: Path) -> None:
    """Teacher at 4 steps, student at 4, teacher at 50: every class twice, the same seeds in every column."""
    facts = json.loads((run / "export" / "stepdistill.json").read_text())
    teacher, w, n = facts["teacher"], facts["guidance"], facts["steps"]
    count = 20
    rows = [
        (f"teacher, {n} steps, no guidance: {n} NFE", sample(teacher, steps=n, count=count)),
        (f"student, {n} steps: {n} NFE", sample(run, steps=n, count=count)),
        (f"teacher, 50 steps, guidance {w:g}: 100 NFE", sample(teacher, steps=50, guidance=w, count=count)),
    ]
    font = ImageFont.load_default(18)
    strips = [(text, image_grid(result.images, columns=count)) for text, result in rows]
    width = strips[0][1].width * ZOOM
    height = sum(strip.height * ZOOM + 30 for _, strip in strips)
    canvas, y = Image.new("RGB", (width, height), "white"), 0
    for text, strip in strips:
        ImageDraw.Draw(canvas).text((4, y + 4), text, fill="black", font=font)
        canvas.paste(strip.convert("RGB").resize((width, strip.height * ZOOM), Image.Resampling.NEAREST), (0, y + 30))
        y += strip.height * ZOOM + 30
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(out, optimize=True)


def table(reports: list[dict[str, Any]]) -> str:
    """One Markdown table of reports with the same N; rows measured in several stand once, solvers but the best not."""
    first = reports[0]
    protocol, samples, shown = first["protocol"], first["rows"][0]["samples"], SHOWN[first["protocol"]]
    names = [first.get("labels", {}).get(metric) or metric_name(metric, samples) for metric in shown]
    lines = [f"| | NFE | {' | '.join(names)} |", "|---|---|" + "---|" * len(shown)]
    seen = set()
    for report in reports:
        solvers = [row for row in report["rows"] if row["role"] == "solver"]
        best = min(solvers, key=lambda row: row["metrics"][shown[0]], default=None)
        for row in report["rows"]:
            if row["role"] == "solver" and row is not best:
                continue
            key = (row["name"], row["steps"], row["guidance"])
            if key in seen:
                continue
            seen.add(key)
            values = " | ".join(metric_text(metric, row["metrics"].get(metric)) for metric in shown)
            name = f"**{row['name']}**" if row["role"] == "student" else row["name"]
            name += f" (best of {len(solvers)} settings of stock solvers)" if row is best else ""
            steps = "1 step" if row["steps"] == 1 else f"{row['steps']} steps"
            lines.append(f"| {name}, {steps} | {row['nfe']} | {values} |")
    for name, found in {REAL[protocol]: first["floor"], **first.get("controls", {})}.items():
        values = " | ".join(metric_text(metric, found.get(metric)) for metric in shown)
        lines.append(f"| {name} | | {values} |")
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines.append(f"\nProtocol {protocol}, N = {samples}, seed {first['seed']}, {first['device']}; {versions}.")
    return "\n".join(lines)


def tables(folder: Path) -> list[str]:
    """Of the reports in ``folder``: one for each protocol, of those with the most samples."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if "verdict" in report:  # other files hold other things
            groups.setdefault(report["protocol"], []).append(report)
    most = {protocol: max(report["rows"][0]["samples"] for report in found) for protocol, found in groups.items()}
    return [
        table([report for report in groups[protocol] if report["rows"][0]["samples"] == most[protocol]])
        for protocol in sorted(groups)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--table-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    benchmarks = assets.root() / "assets" / "benchmarks"
    benchmarks.mkdir(parents=True, exist_ok=True)
    if not arguments.table_only:
        for run in arguments.runs:
            shutil.copy(run / "report" / "report.json", benchmarks / f"{run.name}.json")
        if json.loads((benchmarks / f"{arguments.runs[0].name}.json").read_text())["protocol"] == "fashion-v1":
            picture(arguments.runs[0], assets.root() / "assets" / "pictures" / PICTURE)
    between_markers(assets.root() / "docs" / "comparison.md", BEGIN, END, "\n\n".join(tables(benchmarks)))


if __name__ == "__main__":
    main()
