"""What saves memory leaves the numbers alone, or says what it changes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from pipeline.tiny import tiny_dit, tiny_sd
from stepdistill.errors import InputError
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.recipe import Train, load
from stepdistill.training import checkpoint, recompute
from stepdistill.training.make_method import compile_networks
from stepdistill.training.optimizer import make_optimizer
from stepdistill.training.session import Session, build, build_without_data
from stepdistill.training.trainer import Trainer

TEACHERS = {"dit": tiny_dit, "unet": tiny_sd}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    for name, make in TEACHERS.items():
        save_pipeline(make(), folder / name)
    return folder


def session(
    teacher: Path, how: str, method: str | dict = "sid", precision: str = "fp32", device: str = "cpu", **train
) -> Session:
    recipe = {
        "teacher": {"pipeline": str(teacher), "precision": precision},
        "student": {"steps": 2, "train": how, "rank": 2},
        "data": {"conditions": ["0", "3"] if teacher.name == "dit" else ["a red shoe", "rain"]},
        "method": {"name": method} if isinstance(method, str) else method,
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3} | train,
    }
    made = build(load(recipe), torch.device(device))
    # A fresh adapter adds nothing, and then it does not matter which one is on.
    noise = torch.Generator().manual_seed(5)
    for role in [one for one in ("student", "critic") if one in made.method.roles]:
        for parameter in getattr(made.method.roles, role).network.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise).to(device)
    return made


def test_compiled_networks_give_the_same_gradients(teachers, monkeypatch):
    torch._dynamo.reset()  # another test's graphs fit these networks too
    graphs = torch._dynamo.utils.counters["stats"]
    original = torch.nn.Module.compile
    # Capturing, guards and recompilation, without the generated code, which takes minutes.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: original(self, backend="eager"))
    plain, compiled = (session(teachers / "dit", "full", "dmd2", compile=on) for on in (False, True))
    before = graphs["unique_graphs"]
    expected = gradients(plain, "student")
    assert graphs["unique_graphs"] == before
    found = gradients(compiled, "student")
    assert graphs["unique_graphs"] > before
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("option", "mode"), [(True, None), ("cuda-graphs", "reduce-overhead")])
def test_graphs_are_a_mode_of_compiling_and_end_with_each_step(option, mode, teachers, monkeypatch, tmp_path):
    modes, marks = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: modes.append(mode))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    trainer = Trainer(session(teachers / "dit", "full", "dmd2", compile=option), Accelerator(cpu=True), tmp_path)
    trainer.step(0)
    trainer.step(1)
    assert modes == [mode] * 3  # teacher, student, critic
    assert len(marks) == (2 if mode else 0)


def test_compiled_networks_give_the_gradient_of_each_loss_term(teachers, monkeypatch, tmp_path):
    """A logged step goes through one graph once for each term; "aot_eager" cuts out the graphs that Inductor gets."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: original(self, backend="aot_eager"))
    found = []
    for on in (False, True):
        made = session(teachers / "dit", "full", "dmd2", compile=on)
        whole = made.method.losses
        made.method.losses = lambda *asked, whole=whole: {
            half: 0.5 * loss for loss in whole(*asked).values() for half in ("one", "other")
        }
        trainer = Trainer(made, Accelerator(cpu=True), tmp_path)
        found.append(trainer.step(0, log=True))
    plain, compiled = ({name: v for name, v in one.items() if name != "seconds"} for one in found)
    assert compiled == pytest.approx(plain, rel=1e-3)
    assert {f"{player}/grad_norm/{half}" for player in ("student", "critic") for half in ("one", "other")} <= set(plain)


@pytest.mark.gpu
def test_cuda_graphs_train_what_plain_calls_do(teachers, tmp_path):
    found = []
    for option in (False, "cuda-graphs"):
        made = session(teachers / "dit", "full", "dmd2", device="cuda", compile=option)
        trainer = Trainer(made, Accelerator(), tmp_path)
        for step in range(4):
            trainer.step(step)
        found.append({p: [v.detach().clone() for v in trainer.parameters[p]] for p in ("student", "critic")})
    for player in ("student", "critic"):
        for one, other in zip(*(each[player] for each in found), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def gradients(made: Session, player: str) -> list[torch.Tensor]:
    parameters = [p.requires_grad_() for module in made.method.modules(player) for p in module.parameters()]
    with recompute.forward_passes(made.recipe.train, made.device.type):
        loss = sum(made.method.losses(player, made.batch(0, 0, 2)).values())
    return [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("name", TEACHERS)
def test_recomputed_activations_give_the_same_gradients(name, how, teachers, monkeypatch):
    """SiD's student sends gradients through student, teacher and critic, which share the backbone as LoRAs."""
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    plain = gradients(session(teachers / name, how), "student")
    assert not calls
    saving = gradients(session(teachers / name, how, gradient_checkpointing=True), "student")
    assert len(calls) >= 6
    assert len(plain) == len(saving) and all(map(torch.equal, plain, saving))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("name", TEACHERS)
def test_recomputed_activation_functions_give_the_same_gradients(name, how, device, teachers, monkeypatch):
    made = []
    original = recompute.unpack
    monkeypatch.setattr(recompute, "unpack", lambda kept: made.append(type(kept)) or original(kept))
    plain = gradients(session(teachers / name, how, device=device), "student")
    assert not made
    how_little = {"gradient_checkpointing": "elementwise"}
    saving = gradients(session(teachers / name, how, device=device, **how_little), "student")
    assert made.count(recompute.Again) >= 6
    assert len(plain) == len(saving) and all(map(torch.equal, plain, saving))


EMBEDDED = {"name": "w-embed", "real": "teacher", "real_rows": 4, "real_steps": 2}


@pytest.mark.parametrize(("method", "how"), [("tbcm", "full"), (EMBEDDED, "full"), (EMBEDDED, "lora")])
@pytest.mark.parametrize("name", TEACHERS)
def test_what_hooks_add_is_there_in_recomputed_blocks(name, how, method, teachers):
    """Blocks of DiT embed the time themselves."""
    plain, saving = (
        gradients(session(teachers / name, how, method=method, gradient_checkpointing=option), "student")
        for option in (False, True)
    )
    assert len(plain) == len(saving) and all(map(torch.equal, plain, saving))


def test_a_guidance_adapter_is_not_recomputed(teachers):
    with pytest.raises(
        InputError, match=r"train\.gradient_checkpointing: expected false for a student with a guidance"
    ):
        session(teachers / "dit", "full", method="agd", gradient_checkpointing=True)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_half_precision_is_for_what_is_frozen(how, teachers):
    made = session(teachers / "dit", how, precision="bf16")
    roles = made.method.roles
    assert made.trace.network.pos_embed.proj.weight.dtype == torch.bfloat16
    for role in (roles.student, roles.critic):
        assert {p.dtype for p in role.network.parameters()} == {torch.float32}
    half, exact = (gradients(one, "student") for one in (made, session(teachers / "dit", how)))
    assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in half)
    a, b = (torch.cat([g.flatten() for g in one]) for one in (half, exact))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9


class EightBit(torch.optim.AdamW):
    """Stands for bitsandbytes' class: the same arguments, and a count of steps that is a plain number."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

    def step(self):
        super().step()
        for state in self.state.values():
            state["steps"] = state.get("steps", 0) + 1

    def state_dict(self):
        """As version 0.50 writes it: what is quantised in a dict of its own, which load_state_dict takes flat too."""
        stated = super().state_dict()
        for number, state in stated["state"].items():
            kept = {key: value for key, value in state.items() if key != "exp_avg"}
            stated["state"][number] = kept | {"__bnb_optimizer_quant_state__": {"exp_avg": state["exp_avg"]}}
        return stated


def test_eight_bit_adam_is_bitsandbytes_and_survives_a_checkpoint(monkeypatch, tmp_path):
    library = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=EightBit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    train = Train(steps=1, batch_size=1, lr=0.1, betas=[0.5, 0.9], weight_decay=0.3, optimizer="adamw8bit")
    layer = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(layer.parameters(), train, "student")
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, EightBit)
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.5, 0.9), 0.3)
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    path = checkpoint.save(tmp_path, checkpoint.State(1, {"student": layer}, {"student": optimizer}), keep=1)
    again = make_optimizer(layer.parameters(), train, "student")
    checkpoint.load(path, checkpoint.State(0, {"student": layer}, {"student": again}))
    steps = [state["steps"] for state in again.state.values()]
    assert steps == [1, 1] and all(type(count) is int for count in steps)
    for before, after in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert before.keys() == after.keys() and torch.equal(before["exp_avg"], after["exp_avg"])


def test_eight_bit_adam_without_its_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    train = Train(steps=1, batch_size=1, lr=0.1, optimizer="adamw8bit")
    with pytest.raises(InputError, match=r"train\.optimizer: adamw8bit needs bitsandbytes \(pip"):
        make_optimizer(torch.nn.Linear(1, 1).parameters(), train, "student")


@pytest.mark.parametrize("method", ["agd", "w-embed"])
def test_compiled_networks_show_what_was_added_to_them(method, teachers, monkeypatch):
    """A preview's order: the teacher plain, the student's training, the student without gradients, on one module."""
    torch._dynamo.reset()
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: original(self, backend="eager"))
    recipe = {
        "teacher": {"pipeline": str(teachers / "dit"), "guidance": {"scale": 2.0}},
        "student": {"steps": 2, "train": "full" if method == "agd" else "lora", "rank": 2},
        "data": {"conditions": ["0", "3"]},
        "method": {"name": method} | ({"paths": 2, "path_steps": 2} if method == "agd" else {}),
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3},
    }
    if method == "w-embed":
        recipe["data"]["images"] = "fashion-mnist"
    made = build_without_data(load(recipe), torch.device("cpu"))
    roles, noise = made.method.roles, torch.Generator().manual_seed(5)
    for parameter in roles.student.network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
    batch = made.batch(0, 0, 2)
    x, t = batch.noise("x"), torch.tensor([0.4, 0.9], dtype=torch.float64)

    def seen() -> list[torch.Tensor]:
        with torch.no_grad():
            plain = roles.teacher(x, t, batch.cond).raw
        trained = roles.student(x, t, batch.cond).raw.detach()
        with torch.no_grad():
            return [plain, trained, roles.student(x, t, batch.cond).raw]

    expected = seen()
    assert (expected[2] - expected[0]).abs().max() > 1e-3
    compile_networks(roles)
    for found, wanted in zip(seen(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
