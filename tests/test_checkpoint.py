"""Checkpoints are complete, atomic, and never taken for whole when they are not."""

import pytest
import torch

from stepdistill import checkpoint
from stepdistill.errors import InputError


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


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, damage):
    checkpoint.save(tmp_path, make_state(1), keep=5)
    newest = checkpoint.save(tmp_path, make_state(2), keep=5)
    victim = newest / ("manifest.json" if damage == "manifest" else "student.safetensors")
    content = victim.read_bytes()
    if damage == "remove":
        victim.unlink()
    elif damage == "flip":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=victim.name):
        checkpoint.verify(newest)
    messages = []
    assert checkpoint.latest(tmp_path, messages.append).name == "step-000001"
    assert victim.name in messages[0]


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
