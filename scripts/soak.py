"""Kills runs with SIGKILL at random moments, goes on after each kill, and compares the end with a run left in peace.

    python scripts/soak.py                           # 15 minutes over every method x precision; make soak
    python scripts/soak.py --kills 4 --methods sfd   # one short round
    python scripts/soak.py --encode --kills 10       # of stepdistill encode, while it writes shards

A run is killed in a training step, while a checkpoint is written, in the export and in the benchmark, so many
microseconds after that phase began as a random number says. After every kill all that has its final name must be whole;
at the end weights, export, metrics and report must be those of the undisturbed run, to the bit. The teacher is a tiny
network with random weights. Every run is a process of its own, forked before anything has been computed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from stepdistill import run
from stepdistill.data import shards
from stepdistill.eval.bench import rows
from stepdistill.eval.protocol import TeacherSpec, load_protocol
from stepdistill.exporting import check
from stepdistill.pipeline import latents
from stepdistill.training import checkpoint, run_samples, trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pipeline.tiny import save_dit, tiny_dit
from stock_here import call_here

STEPS = 6
METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"method": {"gan_weight": 0.05, "critic_steps": 2, "critic_warmup": 1}, "data": {"images": "pictures"}},
    "sfd": {"method": {"substeps": 1}},
    "lcm": {"method": {"solver_steps": 5}, "student": {"train": "lora", "rank": 4}, "data": {"images": "pictures"}},
    "sid": {"method": {}},
    "pd": {"method": {"start_steps": 8, "phase_steps": 2}, "data": {"images": "pictures"}},
    "ladd": {"method": {"r1": 0.1}, "data": {"images": "pictures"}},
}
# What is called in the phase of that name.
PHASES = {"step": (trainer.Trainer, "step"), "checkpoint": (checkpoint, "save")}
PHASES |= {"export": (run, "export_trained"), "benchmark": (run, "write_report")}
PATIENCE = 300
"""Seconds after which a run that neither ends nor begins a phase counts as hanging."""


@dataclass
class Round:
    """One method and precision: how often it was killed in each phase, and what was wrong afterwards."""

    name: str
    kills: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    problems: list[str] = field(default_factory=list)


def recipe(place: Path, method: str, precision: str, out: str) -> dict[str, Any]:
    """The recipe of a run in ``place``, beside which its data are."""
    own = METHODS[method]
    return {
        "teacher": {"pipeline": str(place.parent / "teacher"), "guidance": {"scale": 1.5}},
        "student": {"steps": 2, "ema": 0.9} | own.get("student", {}),
        "data": {key: str(place.parent / name) for key, name in own.get("data", {}).items()},
        "method": {"name": method} | own["method"],
        "train": {"steps": STEPS, "batch_size": 4, "lr": 1e-3, "precision": precision}
        | {"log_every": 1, "preview_every": 4, "checkpoint_every": 2, "tracker": "none"},
        "report": {"samples": 10, "steps": [2], "networks": ["classifier"], "solvers": False},
        "output": str(place / out),
    }


def child(stated: dict[str, Any], marks: int, log: Path, cache: Path) -> None:
    """Run the recipe and say on ``marks`` when a phase begins and ends; never returns."""
    code = 1
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["STEPDISTILL_CACHE"] = str(cache)
        for name, (owner, attribute) in PHASES.items():
            setattr(owner, attribute, marked(getattr(owner, attribute), name, marks))
        # Starting a Python for the stock call and the teacher's many steps would take most of the time.
        check.call_elsewhere = call_here
        run_samples.TEACHER_STEPS = 4
        few = {"teacher": TeacherSpec(steps=4, guidance=None)}
        rows.load_protocol = lambda name: load_protocol(name).model_copy(update=few)
        run.train(stated)
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def encoding(stated: dict[str, Any], marks: int, log: Path, cache: Path) -> None:
    """Fill the recipe's stores, in shards of a few images, and mark each shard; never returns."""
    code = 1
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["STEPDISTILL_CACHE"] = str(cache)
        shards.SHARD, latents._together = 2**10, lambda _shape: 2
        shards._Writer.write = marked(shards._Writer.write, "shard", marks)
        run.encode(stated)
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def marked(function: Any, name: str, marks: int) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        os.write(marks, f"{name} {time.monotonic()}\n".encode())
        try:
            return function(*arguments, **named)
        finally:
            os.write(marks, f"- {time.monotonic()}\n".encode())

    return call


def launch(
    stated: dict[str, Any], log: Path, cache: Path, aim: tuple[str, int, float] | None = None, work: Any = child
) -> tuple[int, list[tuple[str, float]]]:
    """Run a recipe to its end, or kill it: (exit code, the phases that began and how many seconds each took).

    Args:
        aim: (phase, which of them, seconds after it began). The last phase of a killed run took what it had.
        work: what runs it: :func:`child` or :func:`encoding`.
    """
    read, write = os.pipe()
    if not (process := os.fork()):
        os.close(read)
        work(stated, write, log, cache)
    os.close(write)
    phases: list[list[Any]] = []
    hanging = signal.signal(signal.SIGALRM, lambda *_: os.kill(process, signal.SIGABRT))
    with open(read, encoding="ascii") as marks:
        while line := marks.readline():
            signal.alarm(PATIENCE)
            name, moment = line.split()
            if name == "-":
                phases[-1][1] = float(moment) - phases[-1][2]
                continue
            phases.append([name, 0.0, float(moment)])
            if aim and name == aim[0] and sum(phase[0] == name for phase in phases) == aim[1] + 1:
                time.sleep(max(0.0, float(moment) + aim[2] - time.monotonic()))
                os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, hanging)
    return os.waitstatus_to_exitcode(status), [(name, took) for name, took, _ in phases]


def partial(run: Path) -> list[str]:
    """What has its final name in a run folder and is not whole."""
    found = []
    for folder in run.glob("checkpoints/step-*"):
        try:
            checkpoint.verify(folder)
        except ValueError as error:
            found.append(str(error))
    readers = {".safetensors": load_file, ".json": lambda path: json.loads(path.read_text())}
    for path in (path for part in ("export", "report") for path in (run / part).rglob("*") if path.suffix in readers):
        try:
            readers[path.suffix](path)
        except Exception as error:
            found.append(f"{path}: {error}")
    if (run / "export").is_dir() and not (run / "export" / "model_index.json").is_file():
        found += (
            [] if (run / "export" / "pytorch_lora_weights.safetensors").is_file() else [f"{run}/export: no weights"]
        )
    page = run / "report" / "index.html"
    if page.is_file() and not page.read_text().rstrip().endswith("</html>"):
        found.append(f"{page}: cut short")
    return found


def outcome(run: Path) -> dict[str, Any]:
    """What two runs that made the same must have in common."""
    newest = checkpoint.latest(run / "checkpoints")
    facts: dict[str, Any] = {f"checkpoint {path.name}": path.read_bytes() for path in newest.iterdir()}
    facts |= {f"export {path.name}": path.read_bytes() for path in sorted((run / "export").rglob("*.safetensors"))}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line} - {"seconds"}
    facts |= {f"metrics {key}": [(line["step"], line[key]) for line in lines if key in line] for key in keys}
    report = json.loads((run / "report" / "report.json").read_text())
    facts["report"] = [(row["role"], row["steps"], row["metrics"]) for row in report["rows"]]
    return facts


def soak(place: Path, method: str, precision: str, kills: int, draws: random.Random, ends: float) -> Round:
    """Kill one run ``kills`` times, or until the time is over; then let it end."""
    done, log = Round(f"{method} {precision}"), place / "log.txt"
    whole = recipe(place, method, precision, "whole")
    code, phases = launch(whole, log, place / "cache-whole")
    if code:
        done.problems.append(f"the undisturbed run ended with {code}, see {log}")
        return done
    took = {name: [seconds for phase, seconds in phases if phase == name] for name in PHASES}
    killed, run = recipe(place, method, precision, "killed"), place / "killed"
    # Training is behind a run that has come to its export.
    wanted = sorted([list(PHASES)[number % len(PHASES)] for number in range(kills)], key=list(PHASES).index)
    while wanted and time.monotonic() < ends:
        newest = checkpoint.latest(run / "checkpoints")
        left = STEPS - (int(newest.name[5:]) if newest else 0)
        phase = wanted[0]
        if left == 0 and phase in ("step", "checkpoint"):
            wanted.pop(0)
            continue
        most = {"step": left, "checkpoint": max(1, left // 2)}.get(phase, 1)
        code, phases = launch(
            killed, log, place / "cache-killed", (phase, draws.randrange(most), draws.random() * max(took[phase]))
        )
        done.problems += partial(run)
        if code == -signal.SIGKILL:
            done.kills[phases[-1][0] if phases[-1][1] == 0 else "between"] += 1
            wanted.pop(0)
        elif code == 0:
            done.missed += 1
            shutil.rmtree(place / "cache-killed")  # the benchmark would not have to measure again
            shutil.rmtree(run / "report")
        else:
            done.problems.append(f"a run that went on after a kill ended with {code}, see {log}")
            return done
    code, _ = launch(killed, log, place / "cache-killed")
    if code:
        done.problems.append(f"the last run ended with {code}, see {log}")
        return done
    expected, found = outcome(place / "whole"), outcome(run)
    different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    done.problems += [f"differs from the undisturbed run: {name}" for name in sorted(different)]
    return done


def soak_encode(place: Path, kills: int, draws: random.Random) -> Round:
    """Kill ``kills`` times what fills one store, then let it end; the files must be those of an undisturbed one."""
    place.mkdir()
    make_pictures(place.parent / "pictures", 60)
    done, log, stated = Round("encode"), place / "log.txt", recipe(place, "lcm", "fp32", "run")
    code, phases = launch(stated, log, place / "whole", work=encoding)
    if code:
        done.problems.append(f"the undisturbed command ended with {code}, see {log}")
        return done
    took, total = max(seconds for _, seconds in phases), len(phases)
    for number in range(kills):
        # Among those that are left when so many kills are still to come.
        left = total - len(list((place / "killed").rglob("[0-9]*.safetensors")))
        aim = ("shard", draws.randrange(max(1, left // (kills - number))), draws.random() * took)
        code, phases = launch(stated, log, place / "killed", aim, encoding)
        done.kills[phases[-1][0] if phases and phases[-1][1] == 0 else "between"] += code == -signal.SIGKILL
        done.missed += code == 0
    code, _ = launch(stated, log, place / "killed", work=encoding)
    stores = [  # folders; what is known of the pipeline lies beside them
        {path.relative_to(cache): path.read_bytes() for path in cache.glob("*/*")}
        for cache in (place / "whole", place / "killed")
    ]
    names = [name for name in stores[0].keys() | stores[1].keys() if stores[0].get(name) != stores[1].get(name)]
    done.problems += [f"differs from the undisturbed store: {name}" for name in sorted(names)]
    return done


def make_data(place: Path) -> None:
    save_dit(tiny_dit(), place / "teacher")
    (place / "pictures").mkdir()
    make_pictures(place / "pictures", 6)


def make_pictures(folder: Path, count: int) -> None:
    pixels, names = np.random.default_rng(0), ("Trouser", "Bag", "Dress")
    for number in range(count):
        Image.fromarray(pixels.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(names[number % 3])


def counts(kills: Counter[str]) -> str:
    return ", ".join(f"{count} {phase}" for phase, count in sorted(kills.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=15, help="no kill after this")
    parser.add_argument("--kills", type=int, default=8, help="of each run")
    parser.add_argument("--rounds", type=int, help="over methods x precisions; default: until the time is over")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--encode", action="store_true", help="kill stepdistill encode instead of runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draws, began = random.Random(options.seed), time.monotonic()
    ends, kills, missed, problems, runs = began + 60 * options.minutes, Counter(), 0, 0, 0
    cases = [(method, precision) for method in options.methods for precision in options.precisions]
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        tempfile.tempdir = folder
        make_data(Path(folder))
        if options.encode:
            done = soak_encode(Path(folder) / "place", options.kills, draws)
            print(f"encode: {counts(done.kills)}, {done.missed} missed: {'; '.join(done.problems) or 'the same bytes'}")
            return 1 if done.problems else 0
        while time.monotonic() < ends and (options.rounds is None or runs < options.rounds * len(cases)):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                done = soak(Path(place), *cases[runs % len(cases)], options.kills, draws, ends)
                if done.problems:
                    shutil.copy(Path(place) / "log.txt", f"soak-{done.name.replace(' ', '-')}.txt")
            runs, kills, missed = runs + 1, kills + done.kills, missed + done.missed
            problems += bool(done.problems)
            print(
                f"{done.name:12} {counts(done.kills)}: {'; '.join(done.problems) or 'the same to the bit'}", flush=True
            )
    minutes = (time.monotonic() - began) / 60
    print(f"{runs} runs, {sum(kills.values())} kills ({counts(kills)}), {problems} runs with a problem,")
    print(f"{missed} ended before they were to be killed, {minutes:.1f} minutes")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
