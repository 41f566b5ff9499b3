"""The first run on real weights: train a DMD2 LoRA and a consistency LoRA, measure both, write docs/real_results.md.

    python scripts/real_run.py --base sdxl --hours 24                   # needs a GPU; downloads the base and networks
    python scripts/real_run.py --base sd15 --hours 6 --captions my/captions.txt
    python scripts/real_run.py --base sdxl --hours 24 --teacher /models/sdxl --offline

The machine is checked first: memory against the plan of each recipe, free disk. Then a few updates and a few of the
teacher's images are timed, and the recipes' steps and the number of measured images are cut down to the hours. What
that leaves of the recipes is printed before the training starts. Everything lies in --work: the same command goes on
after an interruption. Captions are those of --captions, else of data/prompts.txt, else made from a small grammar. The
last fifth is kept for measuring.

The second student is TCD on Stable Diffusion 1.5 and XL. The stock TCD scheduler has no flow matching, so on SD 3.5 and
FLUX it is LCM. Both learn from images that the teacher makes, so no pictures are needed.
"""

import argparse
import gc
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from make_prompts import captions as made_captions
from real_page import SHOWN, picture, result_of, write_page

import stepdistill
from stepdistill.errors import InputError, RunError
from stepdistill.files import cache_folder, read_json, read_text, write_json, write_text
from stepdistill.planning import plan as planning
from stepdistill.progress import WorkProgress, say
from stepdistill.recipe import Recipe, load, yaml_lines
from stepdistill.training.distributed import join
from stepdistill.training.session import build
from stepdistill.training.trainer import Trainer

GIB = 2**30
PROTOCOLS = ("teacher-fid-5k-v1", "teacher-clip-5k-v1")
CAPTIONS = 20_000
HELD_OUT = 0.2
SAMPLES = (5000, 2500, 1000, 500, 200)
TEACHER_STEPS = 50
STEPS = (1, 2, 4)
"""At which students are measured."""
MEASURING, SPARE = 0.25, 0.05
"""Shares of the hours for measuring, and for starting, exporting and checking; training gets the rest."""
ROWS = 1.35
"""Images of all rows and repeats, in those of the teacher's row: solvers and students take few steps."""
LOADED = ("teacher", planning.AUTOENCODER, planning.ENCODERS)
"""What is on the device when images are drawn."""
FEWEST = 20
"""Student updates below which nothing is learned and the run is refused."""

TEACHER_MADE = ("data.images=null", "data.conditions=everyday", "method.real=teacher")
LCM = "method={name: lcm, real: teacher, target_ema: 0.95}"


@dataclass(frozen=True)
class Student:
    """One student: its run's name, the shipped recipe it starts from, and what is changed in it."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()


STUDENTS = {
    "sd15": (
        Student(
            "dmd2",
            "sd15_dmd2",
            ("student={steps: 4, train: lora, rank: 64, alpha: 8}", "method.critic=full", "train.lr=5.0e-5"),
        ),
        Student("tcd", "sd15_tcd_lora", TEACHER_MADE),
    ),
    "sdxl": (Student("dmd2", "sdxl_dmd2_lora"), Student("tcd", "sdxl_tcd_lora", TEACHER_MADE)),
    "sd35-medium": (
        Student("dmd2", "sd35_medium_dmd2_lora"),
        Student("lcm", "sd35_medium_dmd2_lora", (LCM, "train.lr=1.0e-5", "train.steps=10000")),
    ),
    "flux": (
        Student("dmd2", "flux_dev_dmd2_lora"),
        Student("lcm", "flux_dev_dmd2_lora", (LCM, "train.lr=1.0e-5", "train.steps=10000")),
    ),
}


@dataclass(frozen=True)
class Size:
    """What the hours leave of a student's recipe; ``seconds`` of a step, ``updates`` of the student in ``steps``."""

    name: str
    steps: int
    full_steps: int
    updates: int
    full_updates: int
    batch: int
    seconds: float

    @property
    def share(self) -> float:
        return self.steps / self.full_steps


@dataclass(frozen=True)
class RealRun:
    """The choices of the command line."""

    base: str
    hours: float
    work: Path
    data: Path
    captions: Path | None = None
    teacher: str | None = None
    overrides: Sequence[str] = ()
    samples: int | None = None
    protocols: Sequence[str] = PROTOCOLS
    offline: bool = False
    cpu: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def recipe(self, student: Student, more: Sequence[str] = ()) -> Recipe:
        """The student's recipe with this run's prompts, teacher and folder."""
        source = [f"teacher.pipeline={yaml_lines.scalar(self.teacher)}"] if self.teacher else []
        prompts = f"data.conditions={yaml_lines.scalar(str(self.work / 'train.txt'))}"
        output = f"output={yaml_lines.scalar(str(self.work / student.name))}"
        return load(student.recipe, [*student.overrides, *source, prompts, output, "report.samples=0", *more])


def check_machine(run: RealRun) -> dict[str, list[str]]:
    """What each student's recipe must change to fit this machine's GPU, as overrides.

    Raises:
        InputError: no GPU, too little memory or disk; nothing was changed.
    """
    if run.device.type == "cpu" and not run.cpu:
        raise InputError("--base: expected a machine with a CUDA device, found none; --cpu runs it all the same")
    gpu = None if run.device.type == "cpu" else torch.cuda.get_device_properties(0).total_memory / GIB
    changes, weights = {}, 0
    for student in STUDENTS[run.base]:
        source = [*student.overrides, *run.overrides]
        if run.teacher:
            source.append(f"teacher.pipeline={yaml_lines.scalar(run.teacher)}")
        first, found = planning.fit(student.recipe, source, gpu or 1e6)
        last = found[-1].plan if found else first
        if gpu and not last.fits(gpu):
            raise InputError(
                f"--base: {run.base} needs {last.peak / GIB + planning.RESERVE:.1f} GiB for {student.name}, "
                f"this GPU has {gpu:.1f} GiB"
            )
        whole = 4 * sum(line.parameters for line in [*first.lines, first.encoders] if line.name in LOADED)
        if gpu and whole / GIB + planning.RESERVE > gpu:
            need = whole / GIB + planning.RESERVE
            raise InputError(
                f"--base: measuring {run.base} in float32 needs {need:.1f} GiB, this GPU has {gpu:.1f} GiB"
            )
        changes[student.name] = [f"{change.key}={yaml_lines.scalar(change.value)}" for change in found]
        weights = max(weights, sum(line.weights for line in [*first.lines, first.encoders]))
        changed = ", ".join(changes[student.name]) or "none"
        say(f"{student.name}: expected peak {last.peak / GIB:.1f} GiB; changes to fit: {changed}")
    run.work.mkdir(parents=True, exist_ok=True)
    free, host = shutil.disk_usage(run.work).free, psutil.virtual_memory().total
    for what, have, need in (("disk", free, 3 * weights), ("host memory", host, 2 * weights)):
        if have < need:
            raise InputError(f"--work: expected {need / GIB:.0f} GiB of {what}, found {have / GIB:.0f} GiB")
    return changes


def prepare_captions(run: RealRun) -> tuple[int, int]:
    """Write work/train.txt and work/data/prompts.txt; returns how many captions each holds.

    Raises:
        InputError: the file has too few captions.
    """
    train, measured = run.work / "train.txt", run.work / "data" / "prompts.txt"
    source = run.captions or next((path for path in (run.data / "prompts.txt",) if path.is_file()), None)
    if source is None:
        lines = made_captions(CAPTIONS)
    else:
        lines = list(dict.fromkeys(line.strip() for line in read_text(source).splitlines() if line.strip()))
    if len(lines) < 10:
        raise InputError(f"{source}: expected 10 captions or more, one a line, found {len(lines)}")
    held = min(SAMPLES[0], int(len(lines) * HELD_OUT))
    measured.parent.mkdir(parents=True, exist_ok=True)
    for file, part in ((train, lines[:-held]), (measured, lines[-held:])):
        write_text(file, "".join(f"{line}\n" for line in part))
    say(f"captions: {len(lines) - held} for training, {held} for measuring, {source or 'made from a grammar'}")
    return len(lines) - held, held


def timed_steps(recipe: Recipe) -> tuple[float, float]:
    """(seconds of a training step, student updates in a step), from one update of the student to the next."""
    accelerator = join()
    trainer = Trainer(build(recipe, accelerator.device, cache=cache_folder()), accelerator, Path(recipe.output))
    turns = trainer.method.turns
    # Late steps: the first ones may belong to a warm-up of some players.
    first, last = [step for step in range(recipe.train.steps) if "student" in turns(step)][-2:]
    period = last - first
    for step in range(max(0, first - period), first):
        trainer.step(step)
    _finished()
    start = time.perf_counter()
    for step in range(first, last):
        trainer.step(step)
    _finished()
    seconds = (time.perf_counter() - start) / period
    updates = sum(turn == "student" for step in range(first, last) for turn in turns(step)) / period
    return seconds, updates


def decide(run: RealRun, changes: dict[str, list[str]], began: float) -> tuple[int, list[Size]]:
    """The number of measured images, and each student's size, within the hours; kept in work/sizes.json.

    Raises:
        InputError: the hours are too few for any useful run.
    """
    file = run.work / "sizes.json"
    if file.is_file():
        kept = read_json(file)
        return kept["samples"], [Size(**one) for one in kept["students"]]
    sizes, timed, budget = [], [], run.hours * 3600
    for student in STUDENTS[run.base]:
        say(f"timing updates of {student.name}")
        recipe = run.recipe(student, [*changes[student.name], *run.overrides])
        timed.append((student, recipe, *timed_steps(recipe)))
        _release()
    # Conditions are encoded and the teacher's samples made by now; they are kept for the training.
    left = budget * (1 - MEASURING - SPARE) - (time.perf_counter() - began)
    for student, recipe, seconds, updates in timed:
        full = recipe.train.steps
        steps = min(full, max(0, int(left / len(timed) / seconds)))
        least = FEWEST / updates
        if steps < min(least, full):
            hours = run.hours - left / 3600 + least * seconds * len(timed) / 3600
            raise InputError(
                f"--hours: expected {hours:.2g} or more for {run.base} on this machine, found {run.hours:g}"
            )
        sizes.append(
            Size(student.name, steps, full, int(steps * updates), int(full * updates), recipe.train.batch_size, seconds)
        )
    samples = run.samples or _affordable(run, recipe, budget * MEASURING)
    write_json(file, {"samples": samples, "students": [asdict(size) for size in sizes]})
    return samples, sizes


def _affordable(run: RealRun, recipe: Recipe, budget: float) -> int:
    """How many images of each row fit into ``budget`` seconds, from a few images of the teacher."""
    say("timing the teacher's images")
    few = {"steps": TEACHER_STEPS, "guidance": recipe.teacher.guidance.scale, "conditions": ["a red shoe"], "count": 2}
    stepdistill.sample(recipe.teacher.pipeline, **(few | {"steps": 2}))
    seconds = stepdistill.sample(recipe.teacher.pipeline, **few).seconds / few["count"]
    return next((n for n in SAMPLES if n * seconds * ROWS <= budget), SAMPLES[-1])


def costs(run: RealRun, samples: int, sizes: Sequence[Size]) -> str:
    """What the hours leave, and what that costs in quality, for people."""
    lines = [f"{run.base} within {run.hours:g} h:"]
    for size in sizes:
        seen = size.updates * size.batch
        line = (
            f"  {size.name}: {size.steps} of {size.full_steps} steps, {size.updates} student updates, "
            f"{seen} samples, {size.steps * size.seconds / 3600:.2f} h"
        )
        if size.share < 1:
            line += f"; {size.share:.0%} of the recipe: expect a worse student than the recipe's"
        lines.append(line)
    line = f"  measuring: {samples} images of each row"
    if samples < SAMPLES[0]:
        line += f"; below {SAMPLES[0]} FID is higher and its interval wider: compare only within this run"
    return "\n".join([*lines, line])


def _finished() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train_all(run: RealRun, sizes: Sequence[Size], changes: dict[str, list[str]]) -> list[dict] | None:
    """Train every student; facts of each, or None if it was interrupted."""
    facts = []
    for student, size in zip(STUDENTS[run.base], sizes, strict=True):
        saves, previews = (max(1, min(500, size.steps // 10)), max(1, size.steps // 4))
        steps = [f"train.steps={size.steps}", f"train.checkpoint_every={saves}", f"train.preview_every={previews}"]
        recipe = run.recipe(student, [*changes[student.name], *run.overrides, *steps])
        done = run.work / f"{student.name}.json"
        kept = read_json(done) if done.is_file() else {"hours": 0.0, "peak_bytes": 0, "finished": False}
        if not kept["finished"]:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            result = stepdistill.train(recipe)
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            hours = kept["hours"] + (time.perf_counter() - start) / 3600  # of all parts of an interrupted run
            kept = {"hours": hours, "peak_bytes": max(peak, kept["peak_bytes"]), "finished": not result.interrupted}
            write_json(done, kept)
            if result.interrupted:
                return None
        facts.append(kept | asdict(size) | {"recipe": student.recipe, "run": str(run.work / student.name)})
        _release()
    return facts


def measure(run: RealRun, samples: int) -> list[Path]:
    """A report of all students, their teacher and stock solvers under each protocol; returns the folders."""
    runs, folders = [run.work / student.name for student in STUDENTS[run.base]], []
    networks = run.work / "data"
    for name in ("inception", "clip"):  # networks that are there already are not downloaded again
        if (run.data / name).is_dir() and not (networks / name).exists():
            (networks / name).symlink_to((run.data / name).resolve())
    for protocol in run.protocols:
        folder = run.work / "report" / Path(protocol).stem
        with WorkProgress() as progress:
            stepdistill.bench(
                runs,
                STEPS,
                samples,
                out=folder,
                protocol=protocol,
                data=networks,
                offline=run.offline,
                progress=progress,
                device=run.device,
            )
        folders.append(folder)
        _release()
    return folders


def go(run: RealRun, page: Path) -> Path | None:
    """All phases; returns the page, or None if training was interrupted.

    Raises:
        InputError: the machine, the captions or the hours do not suffice.
    """
    began = time.perf_counter()
    changes = check_machine(run)
    prepare_captions(run)
    samples, sizes = decide(run, changes, began)
    print(costs(run, samples, sizes), file=sys.stderr)
    facts = train_all(run, sizes, changes)
    if facts is None:
        say("stopped; the same command goes on")
        return None
    folders = measure(run, samples)
    result = result_of(run.base, run.hours, samples, facts, folders)
    prompts = read_text(run.work / "data" / "prompts.txt").splitlines()[:SHOWN]
    runs = [run.work / student.name for student in STUDENTS[run.base]]
    picture(page.with_suffix("") / f"{run.base}.png", result["teacher"], runs, prompts)
    return write_page(page, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", required=True, choices=STUDENTS)
    parser.add_argument("--hours", required=True, type=float, help="of this machine, for everything")
    parser.add_argument("--captions", type=Path, help="a text file with a caption a line")
    parser.add_argument("--teacher", help="a folder or hub id in place of the recipe's base, of the same kind")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="of both recipes"
    )
    parser.add_argument("--samples", type=int, help="images of each row; default: what the hours allow")
    parser.add_argument("--protocols", nargs="+", default=PROTOCOLS)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of captions and measuring networks")
    parser.add_argument("--work", type=Path, help="default: runs/real_BASE")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "real_results.md")
    parser.add_argument("--offline", action="store_true", help="download no measuring networks")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU, to try the script on a tiny pipeline")
    given = parser.parse_args(arguments)
    if given.hours <= 0:
        parser.error(f"--hours: expected a number above 0, found {given.hours:g}")
    given.work = given.work or Path("runs") / f"real_{given.base}"
    page, run = given.page, RealRun(**{name: value for name, value in vars(given).items() if name != "page"})
    try:
        page = go(run, page)
    except (InputError, RunError, torch.OutOfMemoryError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(page or run.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
