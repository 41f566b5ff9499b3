"""Publish finished runs: copy their reports to assets/benchmarks, draw the README's picture, write its table.

    python scripts/publish_results.py runs/fashion_dmd2 runs/fashion_tcd runs/quickstart

The picture shows the first run's student. The table between the markers in README.md is written from the stored
reports alone, so ``--table-only`` repeats it without the runs.
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
from stepdistill.eval.pictures import image_grid
from stepdistill.eval.report import between_markers
from stepdistill.generation.sampling import sample

BEGIN, END = "<!-- results: written by scripts/publish_results.py -->", "<!-- end of results -->"
SHOWN = ("fd_classifier", "fd_enet", "kid_enet", "precision", "recall", "accuracy")
COLUMNS, ZOOM = 20, 2


def picture(run: Path, out: Path) -> None:
    """Teacher at 4 steps, student at 4, teacher at 50: the same seeds in every column."""
    facts = json.loads((run / "export" / "stepdistill.json").read_text())
    teacher, w, n = facts["teacher"], facts["guidance"], facts["steps"]
    rows = [
        (f"teacher, {n} steps, no guidance: {n} NFE", sample(teacher, steps=n, count=COLUMNS)),
        (f"student, {n} steps: {n} NFE", sample(run, steps=n, count=COLUMNS)),
        (f"teacher, 50 steps, guidance {w:g}: 100 NFE", sample(teacher, steps=50, guidance=w, count=COLUMNS)),
    ]
    font = ImageFont.load_default(18)
    strips = [(text, image_grid(result.images, columns=COLUMNS)) for text, result in rows]
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
    """One Markdown table of reports with the same N; rows measured in several of them stand once."""
    first = reports[0]
    samples = first["rows"][0]["samples"]
    lines = [
        "| | NFE | " + " | ".join(metric_name(metric, samples) for metric in SHOWN) + " |",
        "|---|---|" + "---|" * len(SHOWN),
    ]
    seen = set()
    for report in reports:
        for row in report["rows"]:
            key = (row["name"], row["steps"], row["guidance"])
            if key in seen:
                continue
            seen.add(key)
            values = " | ".join(metric_text(metric, row["metrics"].get(metric)) for metric in SHOWN)
            name = f"**{row['name']}**" if row["role"] == "student" else row["name"]
            lines.append(f"| {name}, {row['steps']} steps | {row['nfe']} | {values} |")
    floor = " | ".join(metric_text(metric, first["floor"].get(metric)) for metric in SHOWN)
    lines.append(f"| real test images (the floor) | | {floor} |")
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines.append(f"\nProtocol {first['protocol']}, N = {samples}, seed {first['seed']}, {first['device']}; {versions}.")
    return "\n".join(lines)


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
        picture(arguments.runs[0], assets.root() / "assets" / "pictures" / "four_steps.png")
    paths = [path for path in sorted(benchmarks.glob("*.json")) if not path.stem.startswith("comparison")]
    stored = [json.loads(path.read_text()) for path in paths]
    tables = [
        table([report for report in stored if report["rows"][0]["samples"] == samples])
        for samples in sorted({report["rows"][0]["samples"] for report in stored}, reverse=True)
    ]
    joined = "\n\n".join(tables)
    between_markers(assets.root() / "README.md", BEGIN, END, joined)


if __name__ == "__main__":
    main()
