"""Publish finished runs: copy their reports to assets/benchmarks, write docs/comparison.md's tables.

    python scripts/publish_results.py runs/fashion_dmd2 runs/fashion_tcd runs/quickstart
    python scripts/publish_results.py runs/emoji_dmd2
    python scripts/publish_results.py              # the tables alone

The tables between the markers in docs/comparison.md, one for each protocol, are written from the stored reports with
the most samples, so that they are repeated without runs.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from stepdistill import assets
from stepdistill.eval.names import metric_name, metric_text
from stepdistill.eval.report import between_markers

BEGIN, END = "<!-- results: written by scripts/publish_results.py -->", "<!-- end of results -->"
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
REAL = {"fashion-v1": "real test images (the floor)", "emoji-v1": "real pictures of the captions"}


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
    arguments = parser.parse_args()
    benchmarks = assets.root() / "assets" / "benchmarks"
    benchmarks.mkdir(parents=True, exist_ok=True)
    for run in arguments.runs:
        shutil.copy(run / "report" / "report.json", benchmarks / f"{run.name}.json")
    between_markers(assets.root() / "docs" / "comparison.md", BEGIN, END, "\n\n".join(tables(benchmarks)))


if __name__ == "__main__":
    main()
