"""Checkpoints are complete, atomic, and never taken for whole when they are not."""

import json
import shutil
from collections import namedtuple

import pytest
import torch

from stepdistill import files
from stepdistill.errors import InputError
from stepdistill.training import checkpoint
from stepdistill.training.finite import NonFiniteError


def make_state(step: int = 0, seed: int = 0) -> checkpoint.State:
    torch.manual_seed(seed)
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for _ in range(3):
        network(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    average = {name: p.detach().clone() + 1 for name, p in network.named_parameters()}
    return checkpoint.State(step, {"student": network}, {"student": optimizer}, {"student": average})


def tensors(state: checkpoint.State) -> dict[str, torch.Tensor]:
    found = {f"w.{k}": v for k, v in state.networks["student"].named_parameters()}
    for i, entries in state.optimizers["student"].state_dict()["state"].items():
        found |= {f"o.{i}.{k}": v for k, v in entries.items()}
    return found | {f"a.{k}": v for k, v in state.averages["student"].items()}


def test_round_trip_restores_every_bit(tmp_path):
    state = make_state(7)
    path = checkpoint.save(tmp_path, state, keep=2)
    other = make_state(seed=1)
    assert checkpoint.load(path, other) == 7
    expected, found = tensors(state), tensors(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, make_state(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_the_one_just_written_stays_whatever_is_there(tmp_path):
    checkpoint.save(tmp_path, make_state(200), keep=1)
    (tmp_path / "step-000200" / "manifest.json").write_text("{}")
    assert checkpoint.save(tmp_path, make_state(10), keep=1).is_dir()
    assert checkpoint.latest(tmp_path).name == "step-000010"


def test_what_is_newer_than_the_start_is_set_aside_and_kept(tmp_path):
    for step in (1, 2, 1_000_000):
        checkpoint.save(tmp_path, make_state(step), keep=3)
    start, *newer = (tmp_path / f"step-{step:06d}" for step in (1, 2, 1_000_000))
    assert checkpoint.latest(tmp_path) == newer[1]
    moved = checkpoint.set_aside(tmp_path, start)
    assert [path.name for path in moved] == ["replaced-1-step-000002", "replaced-1-step-1000000"]
    assert checkpoint.latest(tmp_path) == start and checkpoint.set_aside(tmp_path, start) == []
    assert checkpoint.set_aside(tmp_path, None) == [tmp_path / "replaced-1-step-000001"]


def test_a_checkpoint_of_another_run_becomes_this_ones(tmp_path):
    path = checkpoint.save(tmp_path / "there", make_state(3), keep=1)
    (tmp_path / "here").mkdir()
    own = checkpoint.adopt(path, tmp_path / "here")
    assert own == tmp_path / "here" / "step-000003" and checkpoint.verify(own) == 3
    assert checkpoint.adopt(own, tmp_path / "here") == own  # its own stays as it is
    checkpoint.adopt(path, tmp_path / "here")
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["replaced-1-step-000003", "step-000003"]


FILES = ["manifest.json", "student.safetensors", "student.optimizer.safetensors", "student.average.safetensors"]
DAMAGES = {
    "gone": lambda content: None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"0",
    "first byte": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "last byte": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, name, damage):
    checkpoint.save(tmp_path, make_state(1), keep=5)
    newest = checkpoint.save(tmp_path, make_state(2), keep=5)
    victim = newest / name
    assert {path.name for path in newest.iterdir()} == set(FILES)
    damaged = DAMAGES[damage](victim.read_bytes())
    victim.unlink() if damaged is None else victim.write_bytes(damaged)
    state = make_state(seed=1)
    before = {key: value.clone() for key, value in tensors(state).items()}
    for check in (checkpoint.verify, checkpoint.examine, lambda path: checkpoint.load(path, state)):
        # Only reading every byte finds a flipped bit among the numbers; a manifest is read as a whole by all.
        if check is not checkpoint.verify and damage == "last byte" and name != checkpoint.MANIFEST:
            continue
        with pytest.raises(InputError, match=name) as raised:
            check(newest)
        assert str(newest) in str(raised.value)
    assert all(torch.equal(value, before[key]) for key, value in tensors(state).items())
    messages = []
    assert checkpoint.latest(tmp_path, messages.append, checkpoint.verify).name == "step-000001"
    assert len(messages) == 1 and name in messages[0] and str(newest) in messages[0]


def test_looking_for_a_checkpoint_reads_no_weights(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make_state(1), keep=5)
    read = []
    monkeypatch.setattr(checkpoint, "sha256", read.append)
    assert checkpoint.latest(tmp_path).name == "step-000001" and read == []
    with pytest.raises(InputError, match="SHA-256"):
        checkpoint.verify(tmp_path / "step-000001")


@pytest.mark.parametrize("content", ["[]", "1", '{"sha256": [], "step": 1}', '{"schema": 1, "sha256": {}, "step": 2}'])
def test_a_manifest_that_is_another_file_is_no_manifest(tmp_path, content):
    newest = checkpoint.save(tmp_path, make_state(2), keep=5)
    (newest / checkpoint.MANIFEST).write_text(content)
    with pytest.raises(InputError, match="no valid manifest"):
        checkpoint.verify(newest)


def test_every_byte_of_a_manifest_counts(tmp_path):
    """A flipped bit is found, or changes nothing that is read."""
    newest = checkpoint.save(tmp_path, make_state(2), keep=5)
    content = (newest / checkpoint.MANIFEST).read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 7
        (newest / checkpoint.MANIFEST).write_bytes(damaged)
        try:
            assert checkpoint.verify(newest) == 2
            assert json.loads(damaged) == json.loads(content)
        except InputError:
            pass


def test_a_write_that_fails_leaves_nothing_and_harms_nothing(tmp_path, monkeypatch):
    """Whichever call of the disk it is that fails."""
    checkpoint.save(tmp_path, make_state(1), keep=1)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "step-000001").iterdir()}
    for module, name in ((checkpoint, "save_file"), (checkpoint, "sha256"), (files, "sync")):
        for number in range(1, 4):
            calls, original = iter(range(1, 100)), getattr(module, name)

            def failing(*args, calls=calls, number=number, original=original):
                if next(calls) == number:
                    raise OSError(28, "No space left on device")
                return original(*args)

            with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
                patch.setattr(module, name, failing)
                checkpoint.save(tmp_path, make_state(2), keep=1)
            assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
            assert {path.name: path.read_bytes() for path in (tmp_path / "step-000001").iterdir()} == kept


def test_another_process_than_the_first_writes_nothing_and_hears_of_errors(tmp_path):
    """``once`` answers it with what the first process did."""
    asked = []
    path = checkpoint.save(tmp_path, make_state(2), 1, once=lambda work: asked.append(1) or tmp_path, first=False)
    assert path == tmp_path and not list(tmp_path.iterdir())
    assert len(asked) == 5  # to begin, three files, to end: the same exchanges in every process

    def full(work) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, make_state(2), 1, once=full, first=False)


def test_what_a_kill_left_is_removed_by_the_next_save(tmp_path):
    for name in (".writing-000001", ".writing-step-000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "student.safetensors").write_bytes(b"half")
    checkpoint.save(tmp_path, make_state(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


@pytest.mark.parametrize("part", ["networks", "optimizers", "averages"])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, part):
    state = make_state(3)
    parameter = next(state.networks["student"].parameters())
    values = {
        "networks": parameter.data,
        "optimizers": state.optimizers["student"].state[parameter]["exp_avg_sq"],
        "averages": state.averages["student"]["bias"],
    }
    values[part].view(-1)[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"^student.*: \S+ holds numbers that are not finite after step 3$"):
        checkpoint.save(tmp_path, state, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_the_space_that_checkpoints_will_take_is_known_before(tmp_path, monkeypatch):
    state = make_state(1)
    size = sum(path.stat().st_size for path in checkpoint.save(tmp_path / "one", state, keep=1).glob("*.safetensors"))
    needed = 4 * (8 + 8 + 2 * 8)  # 8 numbers: weights, average, two moments
    assert needed < size < needed + 1500  # names and shapes
    usage = namedtuple("usage", "total used free")
    for free, fits in ((3 * needed, True), (3 * needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        if fits:
            checkpoint.check_space(tmp_path / "run" / "checkpoints", state, keep=2)
        else:
            with pytest.raises(InputError, match=r"^output: 3 checkpoints \(train.keep_checkpoints \+ 1\) of "):
                checkpoint.check_space(tmp_path / "run" / "checkpoints", state, keep=2)
    # The best ones stay beside the newest.
    best = tmp_path / "run" / "best"
    for free, fits in ((5 * needed, True), (5 * needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        if fits:
            checkpoint.check_space(tmp_path / "run" / "checkpoints", state, 2, best, keep_best=2)
        else:
            with pytest.raises(InputError, match=r"5 checkpoints \(train.keep_checkpoints \+ evaluation.keep_b"):
                checkpoint.check_space(tmp_path / "run" / "checkpoints", state, 2, best, keep_best=2)
    # What is there will be replaced.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    checkpoint.check_space(tmp_path / "one", state, keep=1)
    checkpoint.check_space(tmp_path / "one", state, 0, tmp_path / "one", keep_best=1)


def test_an_unfinished_write_is_never_a_checkpoint(tmp_path):
    checkpoint.save(tmp_path, make_state(1), keep=5)
    (tmp_path / "step-000001").rename(tmp_path / ".writing-000001")
    assert checkpoint.latest(tmp_path) is None


def test_other_networks_are_refused(tmp_path):
    path = checkpoint.save(tmp_path, make_state(1), keep=5)
    state = make_state()
    state.networks = {"student": torch.nn.Linear(4, 2)}
    with pytest.raises(InputError, match="shape"):
        checkpoint.load(path, state)
    state.networks = {"student": torch.nn.Sequential(torch.nn.Linear(3, 2))}
    with pytest.raises(InputError, match="other networks"):
        checkpoint.load(path, state)
