"""Compare the methods: train every recipe on the embedded teacher, measure its student, write one table and one plot.

    python scripts/compare.py                                   # every recipes/fashion_*.yaml, seed 0
    python scripts/compare.py --methods dmd2 lcm --seeds 0 1 2 --jobs 2
    python scripts/compare.py --budget 10 --out assets/benchmarks/comparison_x10.json
    python scripts/compare.py --tables-only

Runs lie in --runs, one folder for each recipe and seed; a finished one is not trained again, an interrupted one goes
on, one of an earlier version of the recipe is moved aside. Rows are merged into --out as soon as they are known, so the
comparison can be made in pieces and by several processes. With the default --out, the plot beside it is written, too,
and what stands between the markers in README.md, docs/comparison.md and docs/choosing.md. Files like
comparison_x10.json beside it get tables of their own there. --tables-only writes them from --out alone.
docs/contracts.md has the JSON.

A student is named after its method, or after its recipe (without "fashion_") where a method has several. What there is
to say about a student, such as why it misses a bar, is read from comparison_notes.yaml beside --out: NAME@STEPS: text.
"""

import argparse
import fcntl
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from comparison import FD, NFES, PHASES, base, choices, conclude, first_table, page, plot
from safetensors import safe_open

from stepdistill import assets, recipe
from stepdistill.diffusion.devices import best_device
from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import Sampler
from stepdistill.eval.bench.real_rows import floor
from stepdistill.eval.bench.rows import Bench, open_bench
from stepdistill.eval.bench.run import solver_samplers
from stepdistill.eval.bench.settings import Settings
from stepdistill.eval.bench.sources import device_name, library_versions
from stepdistill.eval.protocol import load_protocol
from stepdistill.eval.report import between_markers
from stepdistill.files import write_json, write_text
from stepdistill.pipeline.set_up import can_run
from stepdistill.run import train
from stepdistill.sampling.meter import metered
from stepdistill.training import checkpoint
from stepdistill.training.finite import NonFiniteError

# Students of more steps keep the teacher's and save its guidance: half the passes.
ADAPTER_STEPS = (25, 50)
PREFIX = "fashion_"
# Recipes that are longer than the comparison's 150,000 evaluations, and the part of them that is run.
SHORTER = {"fashion_dmd2": 0.25, "fashion_tcd": 0.78}
BEGIN, END = "<!-- comparison: written by scripts/compare.py -->", "<!-- end of comparison -->"


@dataclass(frozen=True)
class Task:
    """One student to be: the recipe under its name in the comparison, for one seed, in its run folder."""

    name: str
    recipe: recipe.Recipe
    source: Path
    seed: int
    run: Path


def planned(arguments: argparse.Namespace) -> list[Task]:
    """The tasks of the recipes that --methods names (by student, method, recipe or file), of all without it.

    Raises:
        InputError: a name that nothing has; the message lists those that exist. Or recipes of different teachers.
    """
    wanted = {str(Path(name).resolve()) if name.endswith(".yaml") else name for name in arguments.methods}
    sources = [assets.recipe(name).resolve() for name in assets.recipes() if name.startswith(PREFIX)]
    sources += [Path(name) for name in sorted(wanted) if name.endswith(".yaml")]
    loaded = {source: recipe.load(source) for source in sources}
    methods = [one.method.name for one in loaded.values()]
    ending = "" if arguments.budget == 1 else f"-x{arguments.budget:g}"
    tasks, answered = [], set()
    for source, one in loaded.items():
        stem, method = source.stem.removeprefix(PREFIX), one.method.name
        alone = methods.count(method) == 1 or stem.replace("_", "-") == method
        name = method if alone and ".py:" not in method else stem
        called = {name, method, stem, source.stem, str(source)} & wanted
        answered |= called
        for seed in arguments.seeds if called or not wanted else ():
            run, budget = arguments.runs / f"{stem}-seed{seed}{ending}", arguments.budget * SHORTER.get(source.stem, 1)
            settings = [
                *scaled(one, budget),
                *curve(one, budget, arguments.samples),
                f"train.seed={seed}",
                f"output={run}",
                "report.samples=0",
            ]
            tasks.append(Task(name, recipe.load(source, settings), source, seed, run))
    if strangers := sorted(wanted - answered):
        known = ", ".join(sorted(source.stem.removeprefix(PREFIX) for source in sources))
        raise InputError(f"--methods: expected some of {known}, found {strangers[0]!r}")
    if strangers := [task for task in tasks if task.recipe.teacher != tasks[0].recipe.teacher]:
        raise InputError(f"{strangers[0].source}: has another teacher or scale than {tasks[0].source}; compare equals")
    return tasks


def scaled(stated: recipe.Recipe, budget: float) -> list[str]:
    """Overrides that make a run ``budget`` times as long: its steps, its phases, and what happens every so often."""
    train, method = stated.train, stated.method.model_extra or {}
    lengths = {f"train.{key}": getattr(train, key) for key in ("steps", "lr_warmup", "checkpoint_every")}
    lengths |= {f"method.{key}": method[key] for key in PHASES if key in method}
    if budget == 1:
        return []
    return [f"{key}={max(1, round(budget * length)) if length else 0}" for key, length in lengths.items()]


def curve(stated: recipe.Recipe, budget: float, samples: int) -> list[str]:
    """Overrides that measure a student of a few steps ten times in its run; the last checkpoint is exported."""
    if stated.student.steps > max(NFES):
        return []
    every = max(1, round(budget * stated.train.steps / 10))
    settings = {"every": every, "metric": FD, "samples": samples, "keep_best": 0, "patience": "null"}
    return [f"evaluation.{key}={value}" for key, value in settings.items()]


def work(task: Task, arguments: argparse.Namespace) -> bool:
    """Train the task's student where that has not been done, measure it, and merge; False when it was interrupted."""
    facts = {"name": task.name, "recipe": task.source.stem, "seed": task.seed}
    rows, failures = None, []
    try:
        if not finished(task) and not distil(task):
            return False
        bench = instruments(arguments)
        rows = [row | {"training": training(task, bench.device)} for row in measured(bench, task)]
    except (InputError, NonFiniteError) as error:
        print(f"{task.name}, seed {task.seed}: {error}", file=sys.stderr)
        failures.append(facts | {"error": f"{type(error).__name__}: {error}"})
    with opened(arguments) as content:
        content["failures"] = [one for one in content["failures"] if facts.items() - one.items()] + failures
        if rows is not None:
            others = [row for row in content["rows"] if (base(row), seed_of(row)) != (task.name, task.seed)]
            content["rows"] = others + rows
    return True


def seed_of(row: dict[str, Any]) -> int | None:
    """The training seed of a student's row; None of any other."""
    return row.get("training", {}).get("seed")


def finished(task: Task) -> bool:
    """Whether the run folder holds the whole run of this very recipe, exported."""
    facts = task.run / "export" / "stepdistill.json"
    return facts.is_file() and same(task) and json.loads(facts.read_text())["trained_steps"] == task.recipe.train.steps


def same(task: Task) -> bool:
    """Whether the run folder's recipe trains what the task's does."""
    try:
        trees = [one.model_dump(mode="json") for one in (recipe.load(task.run / "recipe.yaml"), task.recipe)]
    except InputError:
        return False
    for tree in trees:
        for key in ("output", "resume", "report", "evaluation"):
            del tree[key]
        for key in ("checkpoint_every", "keep_checkpoints", "preview_every", "log_every", "tracker"):
            del tree["train"][key]
    return trees[0] == trees[1]


def distil(task: Task) -> bool:
    """Train and export; False when that was interrupted. What it cost is kept in the run's cost.json."""
    other = (task.run / "recipe.yaml").is_file() and not same(task)
    with metered(best_device()) as cost:
        result = train(task.recipe, ["resume=never"] if other else [])
    path = task.run / "cost.json"
    before = json.loads(path.read_text()) if path.is_file() else {"seconds": 0.0, "peak_memory_mib": 0.0}
    seconds, memory = before["seconds"] + cost.seconds, max(before["peak_memory_mib"], cost.peak_memory_mib)
    write_json(path, {"seconds": seconds, "peak_memory_mib": memory})
    return not result.interrupted


def training(task: Task, device: torch.device) -> dict[str, Any]:
    """What a student's training was and cost, from its run folder."""
    lines = [json.loads(line) for line in (task.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [line["evaluations"] for line in lines if "evaluations" in line]
    weights = checkpoint.latest(task.run / "checkpoints") / "student.safetensors"
    with safe_open(weights, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    path = task.run / "cost.json"
    cost = json.loads(path.read_text()) if path.is_file() else {"seconds": None, "peak_memory_mib": None}
    return {
        "recipe": task.source.stem,
        "method": task.recipe.method.name,
        "seed": task.seed,
        "steps": task.recipe.student.steps,
        "train_steps": task.recipe.train.steps,
        "evaluations": evaluations[-1] if evaluations else None,
        "curve": [[line["evaluations"], line[f"evaluation/{FD}"]] for line in lines if f"evaluation/{FD}" in line],
        "trainable_parameters": sum(torch.Size(shape).numel() for shape in shapes),
        **cost,
        "device": device_name(device),
    }


def instruments(arguments: argparse.Namespace) -> Bench:
    """A benchmark under the comparison's protocol; stored rows must have every metric."""
    settings = Settings(protocol=arguments.protocol, networks=arguments.networks, complete=True, alone=True)
    return open_bench(settings, arguments.samples, seed=0)


def measured(bench: Bench, task: Task) -> list[dict[str, Any]]:
    """Rows of a run's export at every number of steps that it is compared at and its scheduler allows."""
    trained = task.recipe.student.steps
    student = bench.sampler(str(task.run / "export"), name=task.name, role="student", steps=trained, guidance=1.0)
    wanted = {trained, *(NFES if trained <= max(NFES) else ADAPTER_STEPS)}
    able = [steps for steps in sorted(wanted) if steps == trained or can_run(student.trace, steps)]
    return rows_of(bench, [replace(student, name=f"{task.name}@{steps}", steps=steps) for steps in able])


def references(bench: Bench, teacher: str, scale: float) -> list[dict[str, Any]]:
    """The teacher's rows with and without guidance, and those of the stock solvers at every NFE."""
    steps = bench.protocol.teacher.steps
    guided = bench.sampler(teacher, name=Path(teacher).name, role="teacher", steps=steps, guidance=scale)
    samplers = [
        replace(guided, name=f"{guided.name} w={w:g}", guidance=w) for w in dict.fromkeys((guided.guidance, 1.0))
    ]
    return rows_of(bench, [*samplers, *(one for nfe in NFES for one in solver_samplers(guided, nfe))])


def rows_of(bench: Bench, samplers: Sequence[Sampler]) -> list[dict[str, Any]]:
    """Rows as the comparison keeps them."""
    return [asdict(bench.row(sampler, bench.real)) for sampler in samplers]


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The comparison's content, to be changed; written back whole, and never by two processes at once.

    Raises:
        InputError: the file holds a comparison under another protocol, number of samples or budget.
    """
    path = arguments.out
    lock = Path(tempfile.gettempdir()) / f"stepdistill-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.lock"
    stated = {
        "protocol": load_protocol(arguments.protocol).id,
        "samples": arguments.samples,
        "budget": arguments.budget,
    }
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if content is None:
            device = best_device()
            content = {"schema": 1, **stated, "seed": 0, "command": "make compare"}
            content |= {"versions": library_versions(), "device": device_name(device), "floor": {}, "rows": []}
            content |= {"failures": []}
        for key, value in stated.items():
            if content[key] != value:
                raise InputError(
                    f"{path}: holds a comparison with {key} {content[key]}, found {value}; choose another --out"
                )
        yield content
        notes = path.with_name(f"{path.stem}_notes.yaml")
        said = yaml.safe_load(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
        write_text(path, by_rows(conclude(content, said)))


def by_rows(content: dict[str, Any]) -> str:
    """The comparison as JSON with a line for each row: it has hundreds of them, of dozens of numbers."""
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in content["rows"])
    head = json.dumps({key: value for key, value in content.items() if key != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n]\n}}\n'


def publish(content: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write the plot beside --out and, for the default --out, the tables in README.md and on two pages of docs/."""
    plot(content).save(arguments.out.with_suffix(".png"), optimize=True)
    if arguments.out != default_out():
        return
    beside = sorted(arguments.out.parent.glob(f"{arguments.out.stem}_x*.json"))
    others = [json.loads(path.read_text(encoding="utf-8")) for path in beside]
    every = argparse.Namespace(**vars(arguments) | {"methods": []})
    tasks = {task.name: task for task in planned(every)}
    names = list(tasks)
    imaged = [name for name, task in tasks.items() if task.recipe.data.images is not None]
    between_markers(assets.root() / "README.md", BEGIN, END, first_table(content))
    between_markers(assets.root() / "docs" / "comparison.md", BEGIN, END, page(content, others, names))
    between_markers(assets.root() / "docs" / "choosing.md", BEGIN, END, choices(content, imaged))


def default_out() -> Path:
    return assets.root() / "assets" / "benchmarks" / "comparison.json"


def spawn(task: Task, arguments: argparse.Namespace, cores: queue.Queue) -> int:
    """Run one task in a process of its own, on one core and one thread: memory and failures are its own."""
    core = cores.get()
    try:
        command = [sys.executable, __file__, "--child", "--methods", str(task.source), "--seeds", str(task.seed)]
        for key in ("budget", "out", "runs", "samples", "protocol"):
            command += [f"--{key}", str(getattr(arguments, key))]
        command += ["--networks", *arguments.networks]
        single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if core is not None else {}
        task.run.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{task.run}.log", "a", encoding="utf-8") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | single)
            if core is not None:
                os.sched_setaffinity(child.pid, {core})
            return child.wait()
    finally:
        cores.put(core)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=[], help="names of students, methods or recipes; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training; measuring always uses seed 0")
    parser.add_argument("--budget", type=float, default=1.0, help="factor on the recipes' steps and phases")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; more than 1: pinned, one thread each")
    parser.add_argument("--out", type=Path, default=default_out(), help="the JSON file to merge into")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"), help="folder of the run folders")
    parser.add_argument("--samples", type=int, default=1000, help="images per row")
    parser.add_argument("--protocol", default="fashion-v1")
    parser.add_argument("--networks", nargs="+", default=["classifier", "enet"])
    parser.add_argument("--tables-only", action="store_true", help="train and measure nothing, write tables and plot")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out, arguments.runs = arguments.out.resolve(), arguments.runs.resolve()
    if arguments.child:
        return 0 if all([work(task, arguments) for task in planned(arguments)]) else 1
    tasks = [] if arguments.tables_only else planned(arguments)
    if tasks:
        bench, teacher = instruments(arguments), tasks[0].recipe.teacher
        rows, real = references(bench, teacher.pipeline, teacher.guidance.scale), floor(bench)
        with opened(arguments) as content:
            content["rows"] = rows + [row for row in content["rows"] if row["role"] == "student"]
            content["floor"] = real
    cores: queue.Queue = queue.Queue()
    available = sorted(os.sched_getaffinity(0))
    for job in range(arguments.jobs):
        cores.put(available[job % len(available)] if arguments.jobs > 1 else None)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for task, code in zip(tasks, pool.map(lambda task: spawn(task, arguments, cores), tasks), strict=True):
            result = f"stopped with exit code {code}, see {task.run}.log" if code else "done"
            print(f"{task.name}, seed {task.seed}: {result}", flush=True)
    with opened(arguments) as content:
        pass
    publish(content, arguments)
    for one in content["failures"]:
        print(f"failed: {one['name']}, seed {one['seed']}: {one['error']}", file=sys.stderr)
    return 1 if content["failures"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
