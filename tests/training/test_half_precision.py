"""Half precision: what is refused, what is computed outside of it, and what never starts from rounded weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline.tiny import tiny_dit, tiny_sd
from pipeline.zoo import ZOO
from stepdistill.diffusion import float32
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.schedule import FlowSchedule, VPSchedule
from stepdistill.errors import InputError
from stepdistill.methods.parts.gan import Discriminator
from stepdistill.methods.parts.trigflow import LogVariance, TrigFlow
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.trace import trace
from stepdistill.recipe import load
from stepdistill.roles.heads import Heads
from stepdistill.sampling.rules.steps import Adaptive
from stepdistill.training.half_precision import LIMIT, check_scheduler, latest_start, rounding_noise
from stepdistill.training.session import build

SD = VPSchedule(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0))
LINEAR = VPSchedule(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    save_pipeline(tiny_sd(), folder / "sd")
    save_pipeline(
        tiny_dit(prediction_type="epsilon", beta_schedule="linear", beta_start=1e-4, beta_end=0.02), folder / "dit"
    )
    return folder


def recipe_of(place, name="dmd2", train="full", precision="fp32", teacher="fp32", **method):
    return load(
        {
            "teacher": {"pipeline": str(place), "precision": teacher},
            "student": {"steps": 1, "train": train, "rank": 2},
            "data": {"conditions": ["0", "3"] if place.name == "dit" else ["a red shoe", "rain"]},
            "method": {"name": name} | method,
            "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "precision": precision},
        }
    )


def test_the_noise_of_rounding_is_what_was_measured():
    """White noise in x_0 from bf16 outputs: .024 on Stable Diffusion at 999, .26 on PixArt, .0034 there at 400."""
    found = [rounding_noise(s, "epsilon", t) for s, t in ((SD, 1.0), (LINEAR, 1.0), (LINEAR, 400 / 999))]
    assert found == pytest.approx([0.0285, 0.307, 0.0034], rel=0.2)
    raw = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.ones(len(raw), dtype=torch.float64)
    for schedule, kind in ((SD, "epsilon"), (LINEAR, "epsilon"), (SD, "v"), (FlowSchedule(), "flow")):
        rounded = raw.bfloat16().double()
        noise = schedule.to_x0(rounded, raw, t, kind) - schedule.to_x0(raw, raw, t, kind)
        assert 0.5 < float(noise.square().mean().sqrt()) / rounding_noise(schedule, kind, 1.0) < 1.2
        assert (rounding_noise(schedule, kind, 1.0) > LIMIT) == (schedule is LINEAR)
    assert latest_start(SD, "epsilon") == 899 and latest_start(LINEAR, "epsilon") == 799


def test_a_table_too_noisy_for_bf16_is_refused_before_weights_are_loaded(teachers, monkeypatch):
    monkeypatch.setattr(
        "stepdistill.training.session.open_teacher", lambda *_, **__: pytest.fail("weights were loaded")
    )
    said = r"train\.precision: expected fp32, or student\.start: 799; at the first timestep, 999, .* of 0\.31 in x_0"
    with pytest.raises(InputError, match=said):
        build(recipe_of(teachers / "dit", precision="bf16"), torch.device("cpu"))
    with pytest.raises(InputError, match=r"teacher\.precision: expected fp32"):
        build(recipe_of(teachers / "dit", train="lora", teacher="bf16"), torch.device("cpu"))
    for fine in (
        recipe_of(teachers / "dit"),
        recipe_of(teachers / "dit", teacher="bf16"),  # the student is a whole copy, in float32
        recipe_of(teachers / "sd", precision="bf16"),
    ):
        check_scheduler(fine)


def test_a_table_that_is_seen_late_is_refused_too(teachers, monkeypatch):
    """A hub's pipeline: its scheduler is known once it is loaded."""
    monkeypatch.setattr("stepdistill.training.session.check_scheduler", lambda recipe: None)
    with pytest.raises(InputError, match=r"train\.precision: expected fp32"):
        build(recipe_of(teachers / "dit", precision="bf16"), torch.device("cpu"))


def test_heads_are_float32_under_autocast():
    torch.manual_seed(0)
    heads, states = Heads([(5, 8), (6, 4, 4)]), [torch.randn(2, 5, 8), torch.randn(2, 6, 4, 4)]
    expected = heads(states)
    with torch.autocast("cpu", torch.bfloat16):
        logits = heads(states)
        assert logits.dtype == torch.float32 and torch.equal(logits, expected)
        assert heads([state.bfloat16() for state in states]).dtype == torch.float32
        angle = torch.linspace(0.1, 1.5, 7)
        variance = LogVariance()
        nn.init.normal_(variance.linear.weight)
        assert variance(angle).dtype == torch.float32


@pytest.mark.parametrize("frozen", [True, False])
def test_the_penalty_on_heads_is_taken_in_float32(frozen):
    class Given(Discriminator):
        def features(self, x0, batch):
            return [x0.bfloat16() if frozen else (x0 * self.scale).bfloat16()]

    torch.manual_seed(0)
    part, x = Given(r1=1.0), torch.randn(4, 5, 8)
    part.scale, part.heads = torch.ones((), requires_grad=True), Heads([(5, 8)])
    with torch.autocast("cpu", torch.bfloat16):
        loss = part.loss_of_heads(x, x, None)
    states = x.bfloat16().float().requires_grad_()
    slope = torch.autograd.grad(part.heads([states]).sum(), states)[0]
    plain = Given()
    plain.scale, plain.heads = part.scale, part.heads
    penalty = slope.square().sum() / (4 * 5) / 2
    torch.testing.assert_close(loss - plain.loss_of_heads(x, x, None), penalty, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["finite", "forward"])
def test_a_tangent_is_that_of_float32(mode, teachers):
    made = build(recipe_of(teachers / "sd", "tbcm", route=3, jvp=mode), torch.device("cpu"))
    method, batch = made.method, made.batch(0, 0, 2)
    tangent = getattr(method, f"{mode}_tangent")
    with torch.no_grad():
        for parameter in method.roles.student.network.parameters():
            parameter.mul_(1.02)
        t = torch.tensor([0.5, 0.8], dtype=torch.float64)
        teacher = method.teacher(batch.noise("x"), t, batch)
        trig = TrigFlow(method.schedule, t, 1.0)
        exact = tangent(trig, teacher, method.student(teacher.x_t, t, batch), batch.cond)
        with torch.autocast("cpu", torch.bfloat16):
            found = tangent(trig, teacher, method.student(teacher.x_t, t, batch), batch.cond)
    assert torch.equal(found, exact)


def test_what_is_trained_whole_starts_from_weights_that_were_not_rounded(teachers):
    recipe = recipe_of(teachers / "sd", teacher="bf16", critic="full")
    roles = build(recipe, torch.device("cpu")).method.roles
    exact = load_pipeline(teachers / "sd").unet.state_dict()
    assert any(not torch.equal(value, value.bfloat16().float()) for value in exact.values())
    for role in (roles.student, roles.critic):
        assert all(torch.equal(value, exact[name]) for name, value in role.network.state_dict().items())
    assert {p.dtype for p in roles.teacher.network.parameters()} == {torch.bfloat16}
    lora = build(recipe_of(teachers / "sd", train="lora", teacher="bf16", critic="full"), torch.device("cpu"))
    critic = lora.method.roles.critic.network.state_dict()
    assert all(torch.equal(value, exact[name]) for name, value in critic.items())


@pytest.mark.parametrize("name", ["sana", "z-image", "sd", "sd3", "qwen-image", "lumina2"])
def test_a_teacher_in_bf16_is_replayed_whatever_it_guides_in(name):
    """Sana and Z-Image cast the outputs to float32 before they combine them, others do not."""
    exhibit = ZOO[name]
    traced = trace(exhibit.build().to(torch.bfloat16), exhibit.arguments)
    assert traced.denoiser.network.dtype == torch.bfloat16


def test_guidance_is_combined_in_float32():
    traced = trace(tiny_dit().to(torch.bfloat16))
    cond, null = ({"class_labels": torch.tensor([one, one])} for one in (3, 10))
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.4, 0.9])
    with torch.no_grad():
        found = guided(traced.denoiser, x, t, cond, null, 4.0).raw
        one, other = (traced.denoiser(x, t, rows).raw for rows in (cond, null))
    assert one.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found, other.float() + 4 * (one.float() - other.float()), rtol=1e-2, atol=1e-2)
    assert not torch.equal(found, found.bfloat16().float())


def test_two_guided_scores_in_bf16_are_warned_of(teachers, capfd):
    for name, method, said in (("vsd", {}, True), ("sid-lsg", {}, True), ("sid", {}, False), ("dmd2", {}, False)):
        build(recipe_of(teachers / "sd", name, precision="bf16", **method), torch.device("cpu"))
        assert ("fp32 is better" in " ".join(capfd.readouterr().err.split())) == said, name


def test_float32_runs_use_tf32_on_gpus_but_for_differences_of_scores():
    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before, gpu = state(), torch.device("cuda")
    for precision, both, device, expected in (
        ("fp32", False, gpu, ("high", True)),
        ("fp32", True, gpu, ("highest", False)),
        ("bf16", False, gpu, before),
        ("fp32", False, torch.device("cpu"), before),
    ):
        with float32.passes(precision, both, device):
            assert state() == expected
            with float32.exact(torch.device("cpu")):
                assert state() == ("highest", False) and float32.is_exact(gpu)
        assert state() == before
    with torch.autocast("cpu", torch.bfloat16):
        assert not float32.is_exact(torch.device("cpu"))


def test_adaptive_guidance_runs_on_a_teacher_in_bf16():
    traced = trace(tiny_dit().to(torch.bfloat16))
    cond, null = ({"class_labels": torch.tensor([one, one])} for one in (3, 10))
    step = SimpleNamespace(x_t=torch.randn(2, 4, 8, 8), t=torch.tensor([0.4, 0.9]), cond=cond, null=null)
    with torch.no_grad():
        rule = Adaptive(4.0, 0.9)
        assert rule(traced.denoiser, step).raw.dtype == torch.float32
