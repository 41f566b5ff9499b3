"""docs/real_results.md: the results of scripts/real_run.py, one JSON file and one picture for each base.

python scripts/real_page.py        # writes the page again from the stored results
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from stepdistill.eval.bench.sources import command_line, device_name, library_versions
from stepdistill.eval.pictures import shrunk
from stepdistill.eval.render import table_of
from stepdistill.eval.report import read_report
from stepdistill.files import read_json, write_json, write_text
from stepdistill.sampling.image_grid import image_grid
from stepdistill.sampling.sample import sample

PAGE = Path(__file__).parents[1] / "docs" / "real_results.md"
BASES = {
    "sd15": "Stable Diffusion 1.5",
    "sdxl": "Stable Diffusion XL",
    "sd35-medium": "Stable Diffusion 3.5 medium",
    "flux": "FLUX.1-dev",
}
SHOWN = 6
GIB = 2**30


def result_of(
    base: str, hours: float, samples: int, students: Sequence[dict[str, Any]], reports: Sequence[Path]
) -> dict[str, Any]:
    """What a real run found: machine, versions, students with their cost, the reports, and hashes.

    Args:
        base: a key of :data:`BASES`.
        hours: that the run was given.
        samples: images of each measured row.
        students: facts of each, with ``run``, the folder of its run.
        reports: the folders of the reports, one for each protocol.
    """
    exports = [Path(one["run"]) / "export" for one in students]
    return {
        "base": base,
        "command": command_line(),
        "hours": hours,
        "samples": samples,
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": library_versions(),
        "teacher": read_json(exports[0] / "stepdistill.json"),
        "students": [one | {"weights": _hashes(export)} for one, export in zip(students, exports, strict=True)],
        "reports": [read_json(folder / "report.json") for folder in reports],
        "tables": [_table(folder) for folder in reports],
    }


def _hashes(export: Path) -> dict[str, str]:
    """SHA-256 of an export's weights by file."""
    files = sorted(export.rglob("*.safetensors"))
    return {str(file.relative_to(export)): _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _table(folder: Path) -> str:
    """A report's table in Markdown, under the protocol's name, with its verdicts."""
    report = read_report(folder)
    table = table_of(report)
    lines = [f"Protocol `{report.protocol}`.", "", "| " + " | ".join(table.header) + " |"]
    lines.append("|---" * len(table.header) + "|")
    lines += ["| " + " | ".join(cells) + " |" for _, cells in table.rows]
    return "\n".join([*lines, *(f"\n{entry.text}" for entry in report.verdict)])


def picture(file: Path, facts: dict[str, Any], runs: Sequence[Path], prompts: Sequence[str]) -> None:
    """Teacher at 50 steps, teacher in the students' steps, students: the same prompts and noise in every column.

    Args:
        file: where to write the PNG.
        facts: a student's stepdistill.json, which names the teacher, its guidance and the number of steps.
        runs: the students' run folders.
        prompts: one for each column.
    """
    teacher, guidance, steps = facts["teacher"], facts["guidance"], facts["steps"]
    few = {"count": len(prompts), "conditions": list(prompts)}
    rows = [(f"teacher, 50 steps, guidance {guidance:g}", sample(teacher, steps=50, guidance=guidance, **few))]
    rows += [(f"teacher, {steps} steps, guidance {guidance:g}", sample(teacher, steps=steps, guidance=guidance, **few))]
    rows += [(f"{run.name}, {steps} steps", sample(run, steps=steps, **few)) for run in runs]
    strips = [(text, image_grid(shrunk(result.images), columns=len(prompts))) for text, result in rows]
    sheet = Image.new("RGB", (strips[0][1].width, sum(strip.height + 30 for _, strip in strips)), "white")
    draw, top, font = ImageDraw.Draw(sheet), 0, ImageFont.load_default(18)
    for text, strip in strips:
        draw.text((4, top + 4), text, fill="black", font=font)
        sheet.paste(strip, (0, top + 30))
        top += strip.height + 30
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


def section(base: str, result: dict[str, Any] | None, shown: bool) -> str:
    """The page's section of a base; ``shown``: there is a picture."""
    if result is None:
        return f"## {BASES[base]}\n\nNot yet run: `python scripts/real_run.py --base {base} --hours 24`"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [f"## {BASES[base]}", "", f"{result['device']}. {versions}.", "", "```bash", result["command"], "```", ""]
    lines += ["| student | recipe | steps | of the recipe | samples seen | hours | peak memory |", "|---" * 7 + "|"]
    for one in result["students"]:
        peak = "–" if not one["peak_bytes"] else f"{one['peak_bytes'] / GIB:.1f} GiB"
        share = f"{one['steps'] / one['full_steps']:.0%}"
        seen = f"{one['updates'] * one['batch']:,}"
        cells = (one["name"], f"`{one['recipe']}`", one["steps"], share, seen, f"{one['hours']:.2f}", peak)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", f"{result['samples']} images of each row."]
    if shown:
        lines += ["", f"![{BASES[base]}: teacher and students](real_results/{base}.png)"]
    for table in result["tables"]:
        lines += ["", table]
    lines += ["", "SHA-256 of the students' weights:", ""]
    for one in result["students"]:
        lines += [f"- {one['name']}, `{file}`: `{digest}`" for file, digest in one["weights"].items()]
    return "\n".join(lines)


def text(folder: Path) -> str:
    """The page, from the results in ``folder``."""
    lines = [
        "# Results on real weights",
        "",
        "Written by `scripts/real_run.py`, which trains two LoRA students of a base within the hours it is given, and",
        "measures them with their teacher and stock solvers. A base without a result says so: nobody has run it yet.",
    ]
    for base in BASES:
        file = folder / f"{base}.json"
        result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        lines += ["", section(base, result, (folder / f"{base}.png").is_file())]
    return "\n".join(lines) + "\n"


def write_page(page: Path, result: dict[str, Any] | None = None) -> Path:
    """Store ``result`` in the folder beside the page, and write the page again; returns its path."""
    folder = page.with_suffix("")
    if result is not None:
        write_json(folder / f"{result['base']}.json", result)
    write_text(page, text(folder))
    return page


if __name__ == "__main__":
    print(write_page(PAGE))
