"""What each process of a launched run executes: every recipe of a JSON file, in order, and what they tell each other.

torchrun ... tests/several_processes.py RECIPES.json: the answers of process N come to RECIPES.json.N
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from stepdistill.distributed import Processes, leave
from stepdistill.errors import InputError
from stepdistill.exporting import export
from stepdistill.generation import run_samples
from stepdistill.trainer import train
from stock_here import call_here


def fails(work) -> str:
    """What ``work`` raises, in words."""
    try:
        work()
    except (InputError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def answers(processes: Processes) -> dict[str, object]:
    rank = processes.rank

    def refuse() -> None:
        assert rank == 0
        raise InputError("no room")

    return {
        "once": processes.once(lambda: f"from {rank}"),
        "refused": fails(lambda: processes.once(refuse)),
        "any": [processes.any(False), processes.any(rank == 1)],
        "mean": processes.mean({"a": float(rank), "b": 3.0}),
        "equal": fails(lambda: processes.check_equal(7, [torch.ones(2)])),
        "unequal": fails(lambda: processes.check_equal(7, [torch.full((2,), float(rank))])),
        "share": processes.share(8, 2),
        "odd": fails(lambda: processes.share(3, 1)),
    }


if __name__ == "__main__":
    place = Path(sys.argv[1])
    export.call_elsewhere = call_here
    run_samples.TEACHER_STEPS = 2
    for recipe in json.loads(place.read_text()):
        train(recipe)
    processes = Processes(Accelerator())
    Path(f"{place}.{processes.rank}").write_text(json.dumps(answers(processes)))
    leave()
