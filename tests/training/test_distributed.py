"""Several processes train what one does; what goes wrong in one of them is said once."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import several_processes
import torch
from accelerate.utils import DistributedType
from diffusers import DiTTransformer2DModel
from filelock import FileLock
from test_trainer import GAN, make_recipe, pictures, teacher  # noqa: F401
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import forked
import stepdistill
from data import test_store
from stepdistill import cli
from stepdistill.data import shards, store
from stepdistill.errors import InputError
from stepdistill.run import train
from stepdistill.training import checkpoint, distributed, part_files
from stepdistill.training.distributed import LAUNCHED, Processes, join, process_count

CASES = {
    "gan": (GAN, {"gradient_checkpointing": "elementwise"}),
    "lcm-lora": ({"name": "lcm", "solver_steps": 5}, {"student": {"train": "lora", "rank": 4}}),
    "ladd": ({"name": "ladd", "r1": 0.1}, {"batch_size": 8, "accumulation": 2, "gradient_checkpointing": True}),
}
HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(900)


def test_a_gradient_that_is_missing_here_counts_as_zero():
    """Of experts that take turns one may have got no rows in this process, and some in another."""
    theirs = iter([torch.tensor([1, 1, 0]), torch.tensor([3.0, 5.0])])

    def reduce(ours: torch.Tensor, how: str = "sum") -> torch.Tensor:
        return (ours + next(theirs)) / (2 if how == "mean" else 1)

    accelerator = SimpleNamespace(num_processes=2, process_index=0, device="cpu", reduce=reduce)
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    weights[0].grad = torch.ones(1)
    Processes(accelerator).average_gradients(weights, uneven=True)
    assert [one.grad and float(one.grad) for one in weights] == [2.0, 2.5, None]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)} | more


def newest(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    folder = checkpoint.latest(run / "checkpoints")
    names = {Path(name).parts[0].removesuffix(".safetensors") for name in manifest(folder)}
    files = {name: checkpoint.read(folder / f"{name}.safetensors") for name in names}
    return {f"{name}/{key}": value for name, tensors in files.items() for key, value in tensors.items()}


def manifest(folder: Path) -> list[str]:
    """The names of a checkpoint's files."""
    return list(json.loads((folder / checkpoint.MANIFEST).read_text())["sha256"])


def train_together(recipes: list[dict], place: Path, processes: int) -> None:
    """Train every recipe in this many processes, in order; several_processes.py says what else they do."""
    (place / "recipes.json").write_text(json.dumps(recipes))
    # Waiting for each other keeps processors busy: those of two test workers would be in each other's way.
    with FileLock(place.parent / "processes.lock"):
        if processes > 2 or not forked.safe():
            by_torchrun(place / "recipes.json", processes)
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            forked.start(several_processes.as_rank, rank, processes, port, place / "recipes.json")
            for rank in range(processes)
        ]
        for one in ranks:
            one.join(600)
            one.kill()
    assert [one.exitcode for one in ranks] == [0] * processes


def by_torchrun(place: Path, processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(HERE / "several_processes.py"), str(place)]
    # A launcher that knows nothing of CPUs: where there is no GPU each process could train the whole run by itself.
    plain = environment(CUDA_VISIBLE_DEVICES="")
    del plain["ACCELERATE_USE_CPU"]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_weights(one: dict[str, torch.Tensor], several: dict[str, torch.Tensor]) -> None:
    assert one.keys() == several.keys()
    apart = distances(one, several)
    # A row alone rounds otherwise than several, which Adam enlarges where a gradient is nearly nothing at first.
    assert (apart > 1e-6).double().mean() < 1e-5
    assert apart.max() < 1e-5


def distances(one: dict[str, torch.Tensor], several: dict[str, torch.Tensor]) -> torch.Tensor:
    # Attention does not change when all keys move alike: their biases' gradient is rounding noise, which Adam enlarges.
    names = [name for name in one if not name.endswith("to_k.bias")]
    return torch.cat([(one[name].double() - several[name].double()).abs().flatten() for name in names])


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first test worker fills and that all use; tests of one module go to several workers."""
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{place}.lock"):
        if not (place / "made").exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            make(place)
            (place / "made").touch()
    return place


SHARDS = pytest.mark.skipif(torch.__version__ < (2, 7), reason="needs torch 2.7")


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=SHARDS), pytest.param(4, marks=[SHARDS, pytest.mark.slow])]
)
def runs(request, teacher, pictures, tmp_path_factory) -> Path:  # noqa: F811
    """Every case trained by one process in folder CASE-1, by several in CASE-copies and, with shards, in CASE-shards.

    Case gan-shards begins in one process, goes on in several, and ends in one; several take up ladd-shards twice.
    """
    count = request.param
    return made_once(tmp_path_factory, f"shards-{count}", lambda place: make_runs(place, count, teacher, pictures))


def make_runs(place: Path, processes: int, teacher: Path, pictures: Path) -> None:  # noqa: F811
    def recipe(case: str, kind: str, steps: int = 3) -> dict:
        method, changes = CASES[case]
        changes = {"steps": steps, "lr": 2e-4} | copy.deepcopy(changes)
        made = make_recipe(teacher, place / f"{case}-{kind}", method, pictures, **changes)
        return made | {"distributed": {"shard": kind == "shards"}}

    together = [recipe(case, "copies") for case in CASES]
    together += [recipe(case, "shards", steps=2 if case == "gan" else 3) for case in CASES]
    together.insert(len(CASES), recipe("ladd", "shards", steps=1))
    for alone in [*(recipe(case, "1") for case in CASES), recipe("gan", "shards", steps=1)]:
        train(alone)
    train_together(together, place, processes)
    train(recipe("gan", "shards"))


@pytest.mark.parametrize("kind", ["copies", "shards"])
@pytest.mark.parametrize("case", CASES)
def test_several_processes_train_what_one_does(case, kind, runs):
    one, several = newest(runs / f"{case}-1"), newest(runs / f"{case}-{kind}")
    assert_same_weights(one, several)
    lines = [
        [json.loads(line) for line in (runs / f"{case}-{n}" / "metrics.jsonl").read_text().splitlines()]
        for n in (1, kind)
    ]
    assert [line["step"] for line in lines[1]] == [1, 2, 3]
    for alone, together in zip(*lines, strict=True):
        # The end of a run shows a preview; two cases ended before their end.
        assert alone["evaluations"] == together["evaluations"] or (kind == "shards" and case in ("gan", "ladd"))
        for key in alone:
            if "/loss/" in key:
                assert together[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-6), key
    assert (runs / f"{case}-{kind}" / "export" / "model_index.json").is_file()


@pytest.mark.parametrize("runs", [2], indirect=True)
def test_what_the_processes_tell_each_other(runs):
    first, second = (json.loads((runs / f"recipes.json.{rank}").read_text()) for rank in (0, 1))
    assert first.pop("share") == [[0, 4], 2] and second.pop("share") == [[2, 6], 2]
    assert first == second
    assert first["patience"] == 24 * 3600  # the first process may encode data or evaluate for hours
    assert first["once"] == "from 0" and first["refused"] == "InputError: no room"
    assert first["refused first"] == "TraceError: trace: check 'call' failed: no room"
    assert first["any"] == [False, True]
    assert first["mean"] == {"a": 0.5, "b": 3.0}
    assert first["equal"] == "nothing" and first["unequal"].startswith("RuntimeError: the processes have drifted apart")
    assert "train.batch_size: expected a multiple of processes x train.accumulation (2 x 1), found 3" in first["odd"]


def test_several_processes_make_the_store_of_one(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", test_store.SHARD)
    store.ensure(tmp_path / "one", "key", test_store.content)
    assert test_store.files(runs / "store") == test_store.files(tmp_path / "one")


@pytest.mark.skipif(not part_files.SUPPORTED, reason="needs torch 2.9")
@pytest.mark.parametrize("runs", [2], indirect=True)
def test_each_process_writes_the_shards_that_it_has(runs, tmp_path):
    folder = checkpoint.latest(runs / "ladd-shards" / "checkpoints")
    parts = sorted(name for name in manifest(folder) if name.startswith("student/"))
    assert parts == [f"student/shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]
    first, second = ((folder / part).stat().st_size for part in parts)
    assert first == pytest.approx(second, rel=0.1)
    lora = checkpoint.latest(runs / "lcm-lora-shards" / "checkpoints")
    assert "student.safetensors" in manifest(lora)  # adapters are copies

    stepdistill.export(runs / "ladd-shards", tmp_path / "export")
    exported = DiTTransformer2DModel.from_pretrained(tmp_path / "export" / "transformer")
    stored = checkpoint.read(folder / "student.average.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in exported.named_parameters())

    damaged = shutil.copytree(folder, tmp_path / folder.name)
    content = bytearray((damaged / parts[1]).read_bytes())
    content[-1] ^= 1
    (damaged / parts[1]).write_bytes(content)
    with pytest.raises(InputError, match=f"damaged checkpoint, {parts[1]} does not match its SHA-256"):
        checkpoint.verify(damaged)
    content[-1] ^= 1
    (damaged / parts[1]).write_bytes(content)
    checkpoint.verify(damaged)
    (damaged / "student" / "shard-3.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged checkpoint, student/shard-3\.safetensors is not of it"):
        checkpoint.verify(damaged)


@pytest.mark.skipif(not part_files.SUPPORTED, reason="needs torch 2.9")
@pytest.mark.parametrize("runs", [2], indirect=True)
def test_what_goes_wrong_with_one_processs_shards_is_raised_in_all(runs):
    first, second = (json.loads((runs / f"recipes.json.{rank}").read_text()) for rank in (0, 1))
    assert first["not finite"] == "NonFiniteError: student: weight holds numbers that are not finite after step 1"
    assert first["not writable"].startswith("FileExistsError: ")
    assert first["left"] == [] and first["put together"] == [0, 0, 1, 1]
    for answer in ("not finite", "not writable", "left", "put together"):
        assert first[answer] == second[answer]


@pytest.mark.slow  # half a minute of three processes' imports
def test_a_launched_run_ends_with_one_line_and_the_code_of_a_wrong_input(teacher, tmp_path):  # noqa: F811
    recipe = make_recipe(teacher, tmp_path / "run", {"name": "dmd2"}) | {"distributed": {"processes": 2}}
    recipe["teacher"]["arguments"] = {"nothing": 1}
    done = launched(recipe, tmp_path)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(lines) == 2 and "no argument 'nothing'" in lines[1], lines


def launched(recipe: dict, folder: Path) -> subprocess.CompletedProcess:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "stepdistill", "train", str(folder / "recipe.yaml")]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("codes, expected", [((2, 1), 2), ((1, 1), 1)])
def test_a_launch_ends_with_the_code_of_its_processes(codes, expected, monkeypatch):
    def fail(*_):
        raise ChildFailedError("stepdistill", {r: ProcessFailure(r, 1, code, "") for r, code in enumerate(codes)})

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(distributed, "elastic_launch", lambda *_: fail)
    assert distributed.launch(["train", "recipe.yaml"], 2) == expected


def test_a_batch_that_cannot_be_shared_starts_no_process(teacher, tmp_path, monkeypatch, capsys):  # noqa: F811
    recipe = make_recipe(teacher, tmp_path / "run", {"name": "dmd2"}, batch_size=3) | {"distributed": {"processes": 2}}
    (tmp_path / "three.yaml").write_text(json.dumps(recipe))
    monkeypatch.setattr(distributed, "launch", lambda *_: pytest.fail("launched"))
    assert cli.run(["train", str(tmp_path / "three.yaml")]) == 2
    line = "error: train.batch_size: expected a multiple of processes x train.accumulation (2 x 1), found 3\n"
    assert capsys.readouterr().err == f"loading libraries\n{line}"


@pytest.mark.parametrize("launcher", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_cannot_join_are_refused(launcher, monkeypatch):
    alone = SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO)
    monkeypatch.setattr("stepdistill.training.distributed.Accelerator", lambda **_: alone)
    monkeypatch.setenv(launcher, "2")
    with pytest.raises(InputError, match=r"expected the 2 processes that the launcher has started, found 1"):
        join()


@pytest.mark.parametrize(
    "launcher, stated, expected",
    [(None, 3, 3), (None, None, 1), ("LOCAL_RANK", 3, 1), ("OMPI_COMM_WORLD_SIZE", 3, 1), ("PMI_SIZE", 3, 1)],
)
def test_how_many_processes_a_run_starts(launcher, stated, expected, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "0")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    assert process_count(stated) == expected
