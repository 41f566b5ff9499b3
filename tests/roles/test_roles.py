"""Who is a copy and who an adapter: student and critic choose for themselves, and a run goes on as it began."""

import pytest
import torch
from safetensors.torch import load_file

from pipeline.tiny import tiny_dit, tiny_sd
from pipeline.toy import ToyNetwork, toy
from stepdistill.errors import InputError
from stepdistill.methods import METHODS, DistillMethod
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.trace import trace
from stepdistill.planning.plan import plan
from stepdistill.recipe import load
from stepdistill.roles.build import LoRA, build_roles
from stepdistill.roles.views import AdapterView, lora_targets, plain_network
from stepdistill.run import train
from stepdistill.training import checkpoint
from stepdistill.training.session import build

WITH_CRITIC = sorted(name for name, method in METHODS.items() if "critic" in method.extra_roles)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    save_pipeline(tiny_sd(), folder / "sd")
    save_pipeline(tiny_dit(), folder / "dit")
    return folder


def recipe_of(place, out="unused", **sections):
    tree = {
        "teacher": {"pipeline": str(place / "sd")},
        "student": {"steps": 2, "train": "lora", "rank": 4},
        "data": {"conditions": ["a red shoe", "rain"]},
        "method": {"name": "dmd2", "critic_steps": 1},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "preview_every": 100, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(out),
    }
    tree = {key: value | sections.pop(key, {}) if isinstance(value, dict) else value for key, value in tree.items()}
    return tree | sections


@pytest.mark.parametrize("name", WITH_CRITIC)
@pytest.mark.parametrize("student", ["full", "lora"])
def test_every_method_with_a_critic_takes_both_kinds(name, student, teacher):
    for critic in ("full", "lora", None):
        method = {"name": name, "critic": critic} | ({"critic_steps": 2} if name == "rcm" else {})
        steps = {"steps": 1} if name == "emd" else {}
        images = {"images": str(teacher)} if METHODS[name].data_needs(METHODS[name].Config()).images else {}
        recipe = recipe_of(teacher, student={"train": student} | steps, method=method, data=images)
        training = load(recipe).role_training
        others = dict.fromkeys(METHODS[name].extra_roles, critic or student)
        assert training == {"student": student, "critic": critic or student} | others


def test_the_critic_of_vsd_is_an_adapter_where_nothing_is_said(teacher):
    for name in ("vsd", "pg-sb"):
        recipe = load(recipe_of(teacher, student={"train": "full"}, method={"name": name}))
        assert recipe.role_training == {"student": "full", "critic": "lora"}


def test_an_adapter_beside_a_critic_that_is_trained_whole(teacher):
    roles = build(load(recipe_of(teacher, method={"critic": "full"})), torch.device("cpu")).method.roles
    assert isinstance(roles.student.network, AdapterView) and roles.student.network.adapter == "student"
    critic = roles.critic.network
    assert not isinstance(critic, AdapterView)
    backbone = roles.student.network.backbone
    assert sum(p.numel() for p in critic.parameters()) == sum(p.numel() for p in tiny_sd().unet.parameters())
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in backbone.parameters()}
    assert not any("critic" in name for name, _ in backbone.named_parameters())


def test_a_call_under_an_adapter_does_not_walk_through_the_network(monkeypatch):
    """A walk through a large network takes the host as long as a small step takes a GPU."""
    traced = trace(tiny_dit())
    training = {"student": "lora", "critic": "lora"}
    roles = build_roles(traced.denoiser, training, 1.0, LoRA(4))
    x, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([0.5]), {"class_labels": torch.tensor([3])}
    with torch.no_grad():
        for layer in roles.student.network.backbone.modules():
            if (up := getattr(layer, "lora_B", None)) is not None:
                up["student"].weight += 0.1
    walks = []
    monkeypatch.setattr("stepdistill.roles.views.peft_layers", lambda network: walks.append(network) or [])
    outputs = [role(x, t, cond).raw for role in (roles.student, roles.critic, roles.teacher)]
    assert walks == [] and torch.equal(outputs[1], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_the_critics_adapter_has_a_rank_an_alpha_and_layers_of_its_own(teacher):
    critic = {"rank": 6, "alpha": 9, "targets": ["to_q", "to_v"]}
    recipe = load(recipe_of(teacher, student={"alpha": 1}, critic=critic))
    roles = build(recipe, torch.device("cpu")).method.roles
    backbone = roles.critic.network.backbone
    layers = [m for m in backbone.modules() if hasattr(m, "scaling")]
    hers = {name for name, _ in roles.critic.network.named_parameters()}
    assert hers and all("to_q" in name or "to_v" in name for name in hers)
    for layer in layers:
        assert layer.scaling["student"] == 1 / 4 and layer.r["student"] == 4
        assert layer.scaling.get("critic", 1.5) == 1.5 and layer.r.get("critic", 6) == 6
    # Layers that only one of them has: both run, and a plain copy of each is itself.
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.9]), {"encoder_hidden_states": torch.randn(2, 5, 16)}
    with torch.no_grad():
        for role in (roles.student, roles.critic):
            for parameter in role.network.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        said = {name: getattr(roles, name)(x, t, cond).raw for name in ("teacher", "student", "critic")}
        assert len({value.sum().item() for value in said.values()}) == 3
        for name in ("student", "critic"):
            role = getattr(roles, name)
            again = role.on(plain_network(role.network))(x, t, cond).raw
            torch.testing.assert_close(again, said[name], rtol=1e-4, atol=1e-5)


def test_what_the_critics_section_leaves_open_is_the_students(teacher):
    for student, critic, scale in (
        ({"alpha": 1}, {}, 1 / 4),
        ({"alpha": 1}, {"rank": 8}, 1 / 8),
        ({}, {"rank": 8}, 1),
        ({}, {"alpha": 2}, 1 / 2),
    ):
        roles = build(load(recipe_of(teacher, student=student, critic=critic)), torch.device("cpu")).method.roles
        layer = next(m for m in roles.critic.network.backbone.modules() if hasattr(m, "scaling"))
        assert layer.scaling["critic"] == scale


def test_an_adapters_section_that_nothing_reads_is_refused(teacher):
    with pytest.raises(InputError, match=r"critic\.rank: expected null for a critic that is trained whole, found 8"):
        load(recipe_of(teacher, method={"critic": "full"}, critic={"rank": 8}))
    method = {"name": "sfd", "substeps": 2}
    sfd = recipe_of(teacher, critic={"alpha": 8}) | {"method": method}
    with pytest.raises(InputError, match=r"critic\.alpha: expected null for a method without a critic, found 8"):
        load(sfd)
    with pytest.raises(InputError, match=r"critic\.targets: expected endings of layers .* found 'to_qq'"):
        build(load(recipe_of(teacher, critic={"targets": ["to_qq"]})), torch.device("cpu"))
    whole = recipe_of(teacher, teacher={"precision": "bf16", "quantize": "nf4"}, method={"critic": "full"})
    with pytest.raises(InputError, match=r"method\.critic: expected 'lora' beside teacher\.quantize"):
        load(whole)


@pytest.mark.parametrize(
    "mixed",
    [
        {"method": {"critic": "full"}, "student": {"alpha": 1}},
        {"student": {"train": "full"}, "method": {"critic": "lora"}, "critic": {"rank": 3, "alpha": 6}},
        pytest.param({"method": {"name": "sid-lsg", "critic": "full"}}, marks=pytest.mark.slow),
    ],
)
def test_a_run_with_both_kinds_goes_on_as_it_began(mixed, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.run.check_conventions", lambda session: None)
    monkeypatch.setattr("stepdistill.run.export_trained", lambda *_: None)
    weights = []
    for stops in ([4], [2, 4]):
        for steps in stops:
            recipe = recipe_of(teacher, tmp_path / str(len(stops)), **mixed)
            recipe["train"]["steps"] = steps
            folder = train(recipe).folder
        last = checkpoint.latest(folder / "checkpoints")
        weights.append({name: load_file(last / f"{name}.safetensors") for name in ("student", "critic")})
    for name, values in weights[0].items():
        assert values and all(torch.equal(value, weights[1][name][key]) for key, value in values.items())


TWO_JUDGES = """
from stepdistill.methods import DistillMethod


class TwoJudges(DistillMethod):
    summary = "two more networks that learn, and one that follows slowly, under names of their own"
    sampler_name = "ddim"
    players = ("student", "judge", "second_judge")
    extra_roles = ("judge", "second_judge", "memory")
    slow = ("memory",)

    def losses(self, player, batch):
        x, t = batch.noise("x"), self.times(1.0, batch)
        role = getattr(self.roles, player)
        target = self.roles.memory if player == "student" else self.roles.student
        return {"match": (role(x, t, batch.cond).x0 - 2 * target(x, t, batch.cond).x0.detach()).square().mean()}

    def after_update(self, player):
        if player == "student":
            self.average(self.roles.memory, 0.5)
"""


def test_roles_have_any_names(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.run.export_trained", lambda *_: None)
    (tmp_path / "mine.py").write_text(TWO_JUDGES)
    recipe = recipe_of(teacher, tmp_path / "run") | {"method": {"name": f"{tmp_path / 'mine.py'}:TwoJudges"}}
    last = checkpoint.latest(train(recipe).folder / "checkpoints")
    names = ("student", "judge", "second_judge", "memory")
    saved = {name: load_file(last / f"{name}.safetensors") for name in names}
    assert len({next(iter(values.values())).sum().item() for values in saved.values()}) == 4
    assert {file.name.split(".")[0] for file in last.glob("*.optimizer.*")} == set(names) - {"memory"}
    for how in ("lora", "full"):
        built = build(load(recipe, [f"student.train={how}"]), torch.device("cpu")).method.roles
        assert [name for name, _ in built.items()] == ["teacher", *names]
        pairs = zip(built.memory.network.parameters(), built.student.network.parameters(), strict=True)
        assert all(torch.equal(slow, fast) for slow, fast in pairs)
    assert set(names) <= {line.name for line in plan(recipe).lines}


def test_a_role_that_is_not_there_is_named_beside_those_that_are(teacher):
    roles = build(load(recipe_of(teacher)), torch.device("cpu")).method.roles
    with pytest.raises(AttributeError, match=r"no role 'teacher2': this run has teacher, student, critic;"):
        roles.teacher2  # noqa: B018
    assert "critic" in roles and "target" not in roles


@pytest.mark.parametrize("name", ["teacher", "a/b", "decode"])
def test_names_that_no_role_can_have_are_refused(name):
    with pytest.raises(TypeError, match=f"Mine.extra_roles: .* found '{name}'"):
        type("Mine", (DistillMethod,), {"extra_roles": (name,)})


def test_roles_of_a_plain_denoiser():
    denoiser = trace(tiny_dit()).denoiser
    roles = build_roles(denoiser, {"student": "lora", "critic": "full"}, 1.0, LoRA(4, 2.0))
    layer = next(m for m in roles.student.network.backbone.modules() if hasattr(m, "scaling"))
    assert layer.scaling == {"student": 0.5}
    assert dict(roles.items()) == {"teacher": roles.teacher, "student": roles.student, "critic": roles.critic}


class ByName(ToyNetwork):
    """Gives one layer its input by name, as AnimateDiff's motion modules do."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(8, 8)

    def forward(self, picture, noise_level, extra):
        return (self.out(input=super().forward(picture, noise_level, extra)[0]),)


def test_a_layer_that_is_given_its_input_by_name_gets_no_lora():
    pipeline = toy()
    pipeline.network = ByName()
    traced = trace(pipeline)
    assert lora_targets(traced.network) == ["blocks.0", "blocks.1", "speed"]
    with pytest.raises(InputError, match=r"gives its input by name, .* found out"):
        lora_targets(traced.network, ["speed", "out"])
    x, cond = torch.zeros(1, *traced.latent_shape), {"extra.what": torch.tensor([1])}
    roles = build_roles(traced.denoiser, {"student": "lora"}, 1.0, LoRA(2))
    assert torch.equal(roles.student(x, torch.tensor([0.5]), cond).raw, roles.teacher(x, torch.tensor([0.5]), cond).raw)
