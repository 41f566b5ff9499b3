"""The plan is what a run takes: predicted without weights, measured on the CPU's allocator."""

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.tiny import CLASSES, redraw, tiny_sd, tiny_vae
from stepdistill import assets, cli, plan, yaml_lines
from stepdistill.errors import InputError
from stepdistill.pipeline.blueprint import blueprint, without_data
from stepdistill.pipeline.load import save_pipeline
from stepdistill.recipe import load
from stepdistill.session import build
from stepdistill.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A DiT whose parameters and activations both count: 0.2 M parameters on 64 tokens."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=16,
        patch_size=2,
    )
    folder = tmp_path_factory.mktemp("teacher") / "dit"
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    save_pipeline(DiTPipeline(redraw(transformer, 0), tiny_vae(1), scheduler, dict(enumerate(CLASSES))), folder)
    return folder


def recipe_of(teacher: Path, how: str = "full", method: str = "dmd2", **train) -> dict:
    return {
        "teacher": {"pipeline": str(teacher), "guidance": {"scale": 2.0}},
        "student": {"steps": 2, "train": how, "rank": 4, "ema": 0.5},
        "method": {"name": method},
        "train": {"steps": 20, "batch_size": 8, "lr": 1e-4} | train,
    }


def measured(recipe: dict, folder: Path) -> int:
    """Bytes at the peak of a real step: what stands, and the most that the allocator handed out on top of it."""
    session = build(load(recipe), CPU)
    trainer = Trainer(session, Accelerator(cpu=True), folder)
    step = max(range(6), key=lambda step: len(set(session.method.turns(step))))
    trainer.step(step)  # makes the optimizer's moments
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.step(step)
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    modules = [m for m in session.trace.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    roles = session.method.roles
    modules += [getattr(roles, name).network for name in ("student", *session.method.extra_roles)]
    standing = [t for m in modules for t in (*torch.nn.Module.parameters(m), *m.buffers())]
    standing += [t for o in trainer.optimizers.values() for s in o.state.values() for t in s.values()]
    standing += trainer.average.values()
    return peak + sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in standing}.values())


@pytest.mark.parametrize(
    ("how", "method", "train"),
    [
        ("lora", "dmd2", {"precision": "bf16", "accumulation": 2}),
        ("full", "sid", {"gradient_checkpointing": True}),
    ],
)
def test_the_expected_peak_is_the_measured_one(how, method, train, teacher, tmp_path):
    recipe = recipe_of(teacher, how, method, **train)
    expected, found = plan.plan(recipe).peak, measured(recipe, tmp_path)
    print(f"{how} {method} {train}: expected {expected / 2**20:.2f} MiB, measured {found / 2**20:.2f} MiB")
    assert expected == pytest.approx(found, rel=0.15)


def test_a_line_for_every_role(teacher):
    found = plan.plan(recipe_of(teacher, "full"))
    lines = {line.name: line for line in found.lines}
    teacher_line, student, critic = lines["teacher"], lines["student"], lines["critic"]
    assert list(lines) == ["teacher", "student", "critic", "encoders and autoencoder", "stored conditions and images"]
    assert student.parameters == critic.parameters == teacher_line.parameters > 100_000
    assert 4 * student.parameters == student.gradients == student.average == student.optimizer // 2
    assert 0 < student.weights - student.gradients < 50_000  # the table of positions is no parameter
    assert (critic.average, teacher_line.gradients, teacher_line.activations) == (0, 0, 0)
    assert student.activations > 0 and critic.activations > 0
    assert lines["stored conditions and images"].weights == 10 * 8  # ten class numbers
    rest = sum(line.weights + line.optimizer + line.average for line in found.lines)
    assert found.peak == rest + max(line.gradients + line.activations for line in found.lines)


def test_no_weight_is_read(teacher, tmp_path):
    """The configs are enough: the folder of the plan holds no weights at all."""
    bare = tmp_path / "bare"
    for file in teacher.rglob("*.json"):
        target = bare / file.relative_to(teacher)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    drawn = blueprint(bare, None, torch.bfloat16)
    assert drawn.trace.latent_shape == (4, 16, 16) and list(drawn.condition) == ["class_labels"]
    assert {p.dtype for p in drawn.trace.denoiser.network.parameters()} == {torch.bfloat16}


def test_a_text_pipeline_shows_its_conditions(tmp_path):
    save_pipeline(tiny_sd(), tmp_path)
    drawn = blueprint(tmp_path, None, torch.float32)
    assert drawn.trace.component == "unet" and drawn.trace.conditioning == {"encoder_hidden_states": (40, 16)}
    assert (drawn.trace.denoiser.spec.sample, drawn.trace.denoiser.spec.timestep) == ("sample", "timestep")


def test_proposals_fit_and_are_written_into_the_recipe(teacher, tmp_path, capsys, monkeypatch):
    """Of a device without room, first what costs no quality; comments and order of the file stay."""
    monkeypatch.setattr(plan, "RESERVE", 0.0)
    file = tmp_path / "mine.yaml"
    file.write_text(f"""# Mine.
teacher:
  pipeline: {teacher}
student:
  steps: 2
method:
  name: sfd
train:   # how long
  gradient_checkpointing: false  # for now
  steps: 20
  batch_size: 4
  lr: 0.0001   # as the paper
report:
  samples: 0
""")
    peak = plan.plan(file).peak
    first, changes = plan.fit(file, (), 0.9 * peak / plan.GIB)
    assert first.peak == peak and changes[-1].plan.peak <= 0.9 * peak
    # One block: to compute it again saves nothing, so that is left out.
    assert changes[0].key == "train.accumulation" and changes[0].value == 4
    monkeypatch.setattr(plan, "fit", lambda *_: (first, changes))
    assert cli.run(["plan", str(file), "--gpu", "1", "--fit", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["peak"] == peak and [one["key"] for one in facts["proposals"]] == [change.key for change in changes]
    written = file.read_text()
    assert written.startswith("# Mine.\n") and "lr: 0.0001   # as the paper" in written
    assert "train:   # how long" in written and "gradient_checkpointing: false  # for now\n" in written
    assert load(file).train.accumulation == 4


def test_what_cannot_be_written_is_said(tmp_path):
    text = "train: {steps: 1}\nreport:\n  samples: 0\n"
    for keys, wanted in ((("train", "steps"), r"x:1: cannot be rewritten; put 'steps: 2'"),):
        with pytest.raises(InputError, match=wanted):
            yaml_lines.put(text, keys, 2, "x")
    assert yaml_lines.put(text, ("report", "samples"), 5, "x") == text.replace("0", "5")
    assert yaml_lines.put(text, ("report", "solvers"), False, "x") == text + "  solvers: false\n"
    assert yaml_lines.put(text, ("export", "keys"), "kohya", "x") == text + "export:\n  keys: kohya\n"


def test_the_commands_rules(teacher, tmp_path, monkeypatch, capsys):
    assert cli.run(["plan", "quickstart", "--fit"]) == 2
    assert "--fit: expected --gpu" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    change = plan.Change("train.accumulation", 64, "", plan.Plan([], 0, "student"))
    assert plan.write_fit("quickstart", [change]) == Path("quickstart.yaml")
    assert "accumulation: 64" in Path("quickstart.yaml").read_text()
    assert assets.recipe("quickstart").read_text() != Path("quickstart.yaml").read_text()
    with pytest.raises(InputError, match=r"quickstart\.yaml: exists"):
        plan.write_fit("recipes/quickstart", [change])


def test_a_copy_of_a_network_without_data_stays_in_its_mode():
    """torch's own copy takes the mode along, and copies of modes corrupt memory."""
    mode = FakeTensorMode()
    with without_data(mode):
        layer = nn.Linear(2, 3)
        layer.bias.requires_grad_(False)
        layer.twin = layer.weight
        other = copy.deepcopy(layer)
    assert other.weight.fake_mode is mode and other.weight is not layer.weight and other.twin is other.weight
    assert isinstance(other.weight, nn.Parameter)
    assert other.weight.requires_grad and not other.bias.requires_grad
