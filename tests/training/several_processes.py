"""What each process of a launched run executes: every recipe of a JSON file, in order, and what they tell each other.

torchrun ... tests/training/several_processes.py RECIPES.json, or main() in each process: the answers of process N come
to RECIPES.json.N
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stepdistill.data import shards, store
from stepdistill.errors import InputError
from stepdistill.exporting import check
from stepdistill.pipeline.call import TraceError
from stepdistill.run import train
from stepdistill.training import checkpoint, part_files
from stepdistill.training.distributed import Processes, leave

sys.path.insert(0, str(Path(__file__).parents[1]))  # what pytest does for a test
from data import test_store
from short_samples import shorten
from stock_here import call_here


def fails(work) -> str:
    """What ``work`` raises, in words."""
    try:
        work()
    except (InputError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def answers(processes: Processes) -> dict[str, object]:
    rank = processes.rank

    def refuse() -> None:
        assert rank == 0
        raise InputError("no room")

    def refuse_a_pipeline() -> None:
        assert rank == 0
        raise TraceError("call", "no room")

    def refuse_first() -> None:
        with processes.encoders.after_the_first():
            refuse_a_pipeline()

    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    return {
        "patience": group.options._timeout.total_seconds(),
        "once": processes.once(lambda: f"from {rank}"),
        "refused": fails(lambda: processes.once(refuse)),
        "refused first": fails(refuse_first),
        "any": [processes.any(False), processes.any(rank == 1)],
        "mean": processes.mean({"a": float(rank), "b": 3.0}),
        "equal": fails(lambda: processes.check_equal(7, [torch.ones(2)])),
        "unequal": fails(lambda: processes.check_equal(7, [torch.full((2,), float(rank))])),
        "share": processes.share(8, 2),
        "odd": fails(lambda: processes.share(3, 1)),
    }


def fill_a_store(processes: Processes, folder: Path) -> None:
    """That of tests/data/test_store.py, each process its part."""
    shards.SHARD = test_store.SHARD
    store.ensure(folder, "key", test_store.content, processes.encoders)


def written_shards(processes: Processes, folder: Path) -> dict[str, object]:
    """A number that is none in the last process's shard, a folder that is a file where it writes, and a torch that
    cannot write shards."""
    network = torch.nn.Linear(3, 2 * processes.count)
    mesh = init_device_mesh("cpu", (processes.count,))
    fully_shard(network, mesh=mesh)

    def save() -> None:
        checkpoint.save(folder, checkpoint.State(1, {"student": network}), 1, processes.once, processes.first)

    last, write = processes.rank == processes.count - 1, part_files.WRITER
    with torch.no_grad():
        network.weight.to_local().fill_(float("inf") if last else 0.0)
    answers = {"not finite": fails(save)}
    with torch.no_grad():
        network.weight.to_local().zero_()
    part_files.WRITER = lambda path, **more: write(__file__ if last else path, **more)
    answers["not writable"] = fails(save)
    part_files.WRITER = write
    answers["left"] = processes.once(lambda: [path.name for path in folder.iterdir()])
    with torch.no_grad():
        network.weight.to_local().fill_(processes.rank)
    part_files.SUPPORTED = False
    save()
    weight = load_file(folder / "step-000001" / "student.safetensors")["weight"]
    return answers | {"put together": weight[:, 0].tolist()}


def main(place: Path) -> None:
    check.call_elsewhere = call_here
    shorten()
    for recipe in json.loads(place.read_text()):
        train(recipe)
    processes = Processes(Accelerator())
    told = answers(processes)
    fill_a_store(processes, place.parent / "store")
    if part_files.SUPPORTED:
        told |= written_shards(processes, place.parent / "written")
    Path(f"{place}.{processes.rank}").write_text(json.dumps(told))
    leave()


def as_rank(rank: int, count: int, port: int, place: Path) -> None:
    """What torchrun does for a process, in one that was started otherwise."""
    AcceleratorState._reset_state(reset_partial_state=True)
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in named.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os.environ.pop("ACCELERATE_USE_CPU", None)
    main(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
