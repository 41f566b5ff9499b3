"""The results of scripts/gpu_check.sh, or of one benchmark, as Markdown tables for docs/hardware.md.

python scripts/hardware_table.py FOLDER_OR_FILE
"""

import argparse
import json
from pathlib import Path


def kernel_table(report: dict) -> list[str]:
    """A row for each kernel, shape and type."""
    lines = ["| kernel | microseconds | of copy bandwidth | over eager | over torch.compile |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        compiled = row["compiled_over_kernel"]
        over = "–" if compiled is None else f"{compiled}x"
        name = row["case"] if row["runs"] == "kernel" else f"{row['case']} (reference: no kernel ran)"
        share, eager = f"{row['bandwidth_share']:.0%}", f"{row['eager_over_kernel']}x"
        lines.append(f"| {name} | {row['microseconds']['kernel']} | {share} | {eager} | {over} |")
    return lines


def step_table(report: dict) -> list[str]:
    """A row for each implementation of each method on each network."""
    columns = ["step", "seconds", "over the bare passes", "activations MiB", "peak MiB", "host reads"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in report["rows"]:
        names = ("seconds", "ratio_to_floor", "activations_mib", "peak_mib", "host_reads")
        facts = (row[name] for name in names)
        lines.append(f"| {row['case']} | {' | '.join(map(str, facts))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="where gpu_check.sh wrote, or a file of one benchmark")
    results = parser.parse_args().results
    for path in sorted(results.glob("*.json")) if results.is_dir() else [results]:
        report = json.loads(path.read_text(encoding="utf-8"))
        kernels = "microseconds" in report["rows"][0]
        setting = [f"{key.replace('_', ' ')} {report[key]}" for key in ("batch_size", "precision") if key in report]
        setting += ["torch.compile"] if report.get("compile") else []
        setting += ["shrunk networks"] if report.get("tiny") else []
        print(f"### {path.stem}\n\n{', '.join([report['device'], *setting])}\n")
        print("\n".join(kernel_table(report) if kernels else step_table(report)) + "\n")


if __name__ == "__main__":
    main()
