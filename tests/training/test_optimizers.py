"""Every optimizer of a recipe: it learns, resumes to the bit, keeps what was planned, refuses in one line."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stepdistill.errors import InputError
from stepdistill.recipe import Train, load
from stepdistill.training import checkpoint
from stepdistill.training.moving_average import ScheduleFreeAverage
from stepdistill.training.optimizer import CLASSES, check_optimizers, make_optimizer
from stepdistill.training.optimizer_state import state_bytes_of, state_tensors

PACKAGES = {
    "prodigy": "prodigyopt",
    "schedulefree": "schedulefree",
    "lion": "lion_pytorch",
    "adamw8bit": "bitsandbytes",
}
ARGUMENTS = {"prodigy": {"d0": 1e-3, "slice_p": 2}, "adafactor": {"d": 2.0}, "muon": {"ns_steps": 3}}
NAMES = [name for name in CLASSES if name != "adamw8bit"]  # which has its kernels and its stand-in elsewhere


def make(name: str, **keys: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small network with matrices, a convolution and biases, and its optimizer."""
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3))
    lr = {"prodigy": 1.0, "adafactor": 0.1}.get(name, 0.01)
    chosen = {"name": name} | ARGUMENTS.get(name, {}) if name in ARGUMENTS else name
    train = Train(steps=9, batch_size=1, lr=lr, optimizer=chosen, **keys)
    return network, make_optimizer(network.parameters(), train, "student")


def step(network: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    x = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(number % 2))
    loss = (network(x) - x.mean((1, 2, 3)).unsqueeze(1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_learns_and_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    (whole, steps), (first, before), (second, after) = make(name), make(name), make(name)
    losses = [step(whole, steps, i) for i in range(9)]
    assert losses[8] < losses[0]
    for i in range(5):
        step(first, before, i)
    kept = checkpoint.State(5, {"student": first}, {"student": before})
    path = checkpoint.save(tmp_path, kept, keep=1)
    assert checkpoint.load(path, checkpoint.State(0, {"student": second}, {"student": after})) == 5
    for i in range(5, 9):
        step(second, after, i)
    assert all(map(torch.equal, whole.parameters(), second.parameters()))
    one, other = state_tensors(steps), state_tensors(after)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_the_state_are_known_before_the_first_step(name: str) -> None:
    network, optimizer = make(name)
    planned = state_bytes_of(optimizer)
    step(network, optimizer, 0)
    kept = {key: value for key, value in state_tensors(optimizer).items() if value.ndim and "kind" not in key}
    assert sum(value.numel() * 4 for value in kept.values()) == planned


def test_adamw_stays_torchs_to_the_bit_and_its_file_as_it_was() -> None:
    network, optimizer = make("adamw", betas=[0.8, 0.9], weight_decay=0.1)
    other, _ = make("adamw")
    plain = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, fused=True)
    for i in range(3):
        step(network, optimizer, i)
        step(other, plain, i)
    assert all(map(torch.equal, network.parameters(), other.parameters()))
    assert set(state_tensors(optimizer)) == {
        f"{i}.{key}" for i in range(6) for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_muon_moves_matrices_and_adamw_the_rest() -> None:
    network, optimizer = make("muon")
    step(network, optimizer, 0)
    for parameter in network.parameters():
        assert ("momentum_buffer" in optimizer.state[parameter]) == (parameter.ndim == 2)


def test_schedule_free_weights_are_those_of_its_own_eval_and_training_goes_on_from_the_same_bits() -> None:
    network, optimizer = make("schedulefree")
    average = ScheduleFreeAverage(network, optimizer)
    assert torch.equal(average.weights["0.bias"], network[0].bias)
    for i in range(4):
        step(network, optimizer, i)
    before = [p.detach().clone() for p in network.parameters()]
    with average.applied():
        applied = [p.detach().clone() for p in network.parameters()]
    assert all(map(torch.equal, before, network.parameters()))
    optimizer.eval()
    assert all(map(torch.equal, applied, network.parameters()))
    assert (applied[0] - before[0]).abs().max() > 1e-6


def test_another_optimizers_state_is_not_loaded(tmp_path: Path) -> None:
    network, optimizer = make("adamw")
    step(network, optimizer, 0)
    path = checkpoint.save(tmp_path, checkpoint.State(1, {}, {"student": optimizer}), keep=1)
    _, other = make("adafactor")
    with pytest.raises(InputError, match=r"expected a checkpoint with the state of Adafactor, .* found that of AdamW"):
        checkpoint.load(path, checkpoint.State(0, {}, {"student": other}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optimizer": "adam"}, r"train\.optimizer: expected one of 'adamw', .*, found 'adam'"),
        ({"optimizer": {"name": "adam"}}, r"train\.optimizer\.name: expected one of 'adamw', .*, found 'adam'"),
        ({"optimizer": {"eps": 1e-6}}, r"train\.optimizer\.name: missing; expected one of"),
        ({"optimizer": 3}, r"train\.optimizer: expected one of .* or a section with the keys name, found 3"),
        ({"optimizer": {"name": "lion", "lr": 1e-4}}, r"train\.optimizer\.lr: expected it as train\.lr"),
        (
            {"critic_optimizer": "adafactor", "betas": [0.5, 0.9]},
            r"train\.betas: expected the default beside adafactor",
        ),
        ({"optimizer": "schedulefree", "lr_decay": "cosine"}, r"train\.lr_decay: expected 'constant' beside schedule"),
        ({"optimizer": "schedulefree", "betas": [0.0, 0.9]}, r"train\.betas: expected a first one above 0"),
    ],
)
def test_a_wrong_optimizer_is_refused_with_its_key(keys: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(
            "quickstart",
            ["student.ema=0", "train.lr_decay=constant", *(f"train.{key}={value}" for key, value in keys.items())],
        )


def test_a_section_with_a_name_alone_is_the_name() -> None:
    train = load("quickstart", ["train.optimizer={name: adamw}", "train.critic_optimizer={name: lion, eps: 1.0}"]).train
    assert train.optimizer == "adamw" and train.optimizer_of("student").name == "adamw"
    assert train.model_dump(mode="json")["critic_optimizer"] == {"name": "lion", "eps": 1.0}
    assert load("quickstart", ["train.optimizer=lion"]).train.optimizer_of("critic").name == "lion"


def test_schedule_free_averages_itself() -> None:
    with pytest.raises(InputError, match=r"student\.ema: expected 0 beside schedulefree"):
        load("quickstart", ["train.optimizer=schedulefree", "student.ema=0.9"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"optimizer": {"name": "adafactor", "beta2_dekay": 1}},
            r"train\.optimizer\.beta2_dekay: .* mean 'beta2_decay'",
        ),
        ({"optimizer": {"name": "adamw", "quick": 1}}, r"train\.optimizer\.quick: unknown .*; adamw takes amsgrad,"),
        ({"critic_optimizer": {"name": "adamw", "eps": -1}}, r"train\.critic_optimizer: adamw refuses .*epsilon"),
        ({"optimizer": {"name": "adamw", "eps": "x"}}, r"train\.optimizer: adamw refuses {'eps': 'x'}"),
    ],
)
def test_a_wrong_argument_is_found_before_anything_is_loaded(keys: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_optimizers(Train(steps=1, batch_size=1, lr=0.1, **keys))


@pytest.mark.parametrize(
    ("name", "install"),
    [("prodigy", "prodigyopt"), ("schedulefree", "schedulefree"), ("lion", "lion-pytorch"), ("muon", "torch>=")],
)
def test_a_missing_package_is_one_line(name: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES.get(name, "-"), None)
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(InputError, match=rf"train\.optimizer: {name} needs .*\(pip install '?{install}"):
        check_optimizers(Train(steps=1, batch_size=1, lr=0.1, optimizer=name))
