"""The plan is what a run takes: predicted without weights, measured on the CPU's allocator."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline import zoo
from pipeline.tiny import CLASSES, redraw, tiny_flux, tiny_sd, tiny_vae
from stepdistill import assets, cli
from stepdistill.errors import InputError
from stepdistill.pipeline.components import modules
from stepdistill.pipeline.conditioning import together
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.trace import trace
from stepdistill.planning import plan
from stepdistill.planning.fake_pipeline import blueprint, without_data
from stepdistill.recipe import IPAdapter, Teacher, load
from stepdistill.roles.stored_weights import Frozen, stored_layers
from stepdistill.training.session import build
from stepdistill.training.trainer import Trainer

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


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
        "method": {"name": method} | ({"substeps": 1} if method == "sfd" else {}),
        "train": {"steps": 20, "batch_size": 8, "lr": 1e-4} | train,
    }


def measured(recipe: dict, folder: Path) -> int:
    """Bytes at the peak of a real step."""
    spec = importlib.util.spec_from_file_location("plan_sizes", ROOT / "scripts" / "plan_sizes.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    trainer = Trainer(build(load(recipe), CPU), Accelerator(cpu=True), folder)
    step = max(range(6), key=lambda step: len(set(trainer.method.turns(step))))
    trainer.step(step)  # makes the optimizer's moments
    return script.cpu_peak(trainer, step)


@pytest.mark.parametrize(
    ("how", "method", "train"),
    [
        ("lora", "dmd2", {"precision": "bf16", "accumulation": 2}),
        ("full", "sid", {"gradient_checkpointing": True}),
        ("full", "sid", {"gradient_checkpointing": "elementwise"}),
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
    assert list(lines) == ["teacher", "student", "critic", "autoencoder and others", "data of a batch"]
    assert student.parameters == critic.parameters == teacher_line.parameters > 100_000
    assert 4 * student.parameters == student.gradients == student.average == student.optimizer // 2
    assert 0 < student.weights - student.gradients < 50_000  # the table of positions is no parameter
    assert (critic.average, teacher_line.gradients, teacher_line.activations) == (0, 0, 0)
    assert student.activations > 0 and critic.activations > 0
    assert found.stored == 10 * 8  # ten class numbers
    rest = sum(line.weights + line.optimizer + line.average for line in found.lines)
    assert found.peak == rest + max(line.gradients + line.activations for line in found.lines)


def test_the_optimizers_state_and_speed_are_each_players_own(teacher):
    recipe = recipe_of(teacher, optimizer={"name": "prodigy", "slice_p": 4}, critic_optimizer="adafactor")
    found = plan.plan(recipe)
    student, critic = (next(line for line in found.lines if line.name == name) for name in ("student", "critic"))
    assert 10 * student.parameters <= student.optimizer < 10.1 * student.parameters
    assert 0 < critic.optimizer < critic.parameters
    speeds = {check.name: check for check in found.checks if check.name.endswith(" speed")}
    assert all("not of Adam's size" in check.value and check.verdict == "ok" for check in speeds.values())
    assert "adafactor" in speeds["critic speed"].value and "prodigy" in speeds["student speed"].value


def test_encoders_count_only_while_they_work(tmp_path):
    save_pipeline(tiny_sd(), tmp_path / "sd")
    recipe = recipe_of(tmp_path / "sd", "lora", "sfd", batch_size=1) | {"data": {"conditions": ["a red shoe"]}}
    found, pipeline = plan.plan(recipe), tiny_sd()
    lines = {line.name: line.weights for line in found.lines}
    held = {name: sum(t.nbytes for t in (*one.parameters(), *one.buffers())) for name, one in modules(pipeline).items()}
    assert (found.encoders.name, found.encoders.weights) == ("encoders", held["text_encoder"])
    assert lines["autoencoder and others"] == held["vae"] and "encoders" not in lines
    prompt = 40 * 16 * 4  # is there as the pipeline's own and as it was caught, for both halves of guidance
    assert found.encoding == sum(held.values()) + 2 * 2 * prompt and found.peak > found.encoding
    rest = sum(line.weights + line.optimizer + line.average for line in found.lines)
    assert found.peak == rest + max(line.gradients + line.activations for line in found.lines)
    text = plan.as_text(found, [], 24)
    assert "in the host's memory" in text and max(map(len, text.splitlines())) <= 80
    stays = plan.plan(recipe | {"data": {"conditions": ["a red shoe"], "encode": "live"}})
    assert stays.stored == 0 and found.stored == prompt
    assert stays.peak - found.peak == held["text_encoder"] + 2 * 2 * prompt
    assert "while conditions are encoded" in text and "are encoded" not in plan.as_text(stays, [], 24)
    comes = plan.plan(recipe | {"data": {"conditions": ["a red shoe"], "encode": "live-offloaded"}})
    assert comes.lines == stays.lines[:-2] + stays.lines[-1:] and comes.peak == stays.peak - held["text_encoder"]
    assert comes.encoding == rest + 2 * 2 * prompt + held["text_encoder"] and comes.offloaded == held["text_encoder"]
    heavy = plan.Plan(found.lines, found.encoding, plan.ENCODERS, found.encoders, found.encoding)
    assert "while conditions are encoded" in plan.as_text(heavy, [], None)


def test_many_prompts_are_the_disks_matter(tmp_path):
    """Conditions are in a store: host and device have a chunk or a batch at a time."""
    save_pipeline(tiny_sd(), tmp_path / "sd")
    recipe, row = recipe_of(tmp_path / "sd", "lora", "sfd", batch_size=2), 40 * 16 * 4
    for count in (64, 100_000):
        (tmp_path / f"{count}.txt").write_text("".join(f"prompt {i}\n" for i in range(count)))
    few, many = (
        plan.plan(recipe | {"data": {"conditions": str(tmp_path / f"{count}.txt")}}) for count in (64, 100_000)
    )
    assert (few.peak, few.encoding) == (many.peak, many.encoding)
    assert (few.stored, many.stored) == (64 * row, 100_000 * row)
    assert few.host == many.host == 2 * 32 * row
    assert "0.238 GiB on disk, 0.000 GiB in the host's memory" in plan.as_text(many, [], None)


def test_conditions_with_lengths_of_their_own_are_encoded_by_eight(tmp_path, monkeypatch):
    """The plan counts as many at once as the run encodes: each is padded to the longest beside it."""
    pipeline, arguments = zoo.ZOO["pixart-sigma"].build(), zoo.ZOO["pixart-sigma"].arguments
    tokenize = type(pipeline.tokenizer).__call__

    def to_the_longest(self, *texts, **given):
        return tokenize(self, *texts, **given | ({"padding": "longest"} if given.get("max_length") == 300 else {}))

    save_pipeline(pipeline, tmp_path / "teacher")
    recipe = recipe_of(tmp_path / "teacher", "lora", "sfd", batch_size=2)
    recipe["teacher"]["arguments"] = arguments
    for grows in (False, True):
        if grows:
            monkeypatch.setattr(type(pipeline.tokenizer), "__call__", to_the_longest)
        drawn = blueprint(load(recipe).teacher, torch.float32)
        assert together(drawn.trace) == together(trace(pipeline, arguments)) == (8 if grows else 32)
        row = sum(rows.nbytes for rows in drawn.condition.values())
        one, many = (plan.plan(recipe | {"data": {"conditions": ["rain"] * count}}).encoding for count in (1, 40))
        assert many - one == 2 * 2 * (together(drawn.trace) - 1) * row


def test_a_quantized_backbone_is_smaller(teacher):
    recipe = recipe_of(teacher, "lora", "sfd")
    recipe["teacher"]["precision"] = "bf16"
    plain, found = (plan.plan(recipe | {"teacher": recipe["teacher"] | {"quantize": how}}) for how in (None, "nf4"))
    before, after = ({line.name: line for line in one.lines} for one in (plain, found))
    network = load_pipeline(teacher).transformer
    linear = sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))
    # Four bits and a float32 for each block of 64 weights, for 16 bits.
    saved = linear * (2 - 0.5 - 4 / 64)
    assert before["teacher"].weights - after["teacher"].weights == pytest.approx(saved, abs=1)
    assert plain.peak - found.peak == pytest.approx(saved, abs=1) and before["student"] == after["student"]
    assert before["teacher"].parameters == after["teacher"].parameters


def test_the_hosts_memory_is_counted_by_phase(teacher):
    pipeline, recipe = load_pipeline(teacher), recipe_of(teacher, "lora")
    network, vae = (sum(p.numel() for p in one.parameters()) for one in (pipeline.transformer, pipeline.vae))
    recipe["teacher"]["precision"] = "bf16"
    lora = plan.plan(recipe, ["export.check=off"])
    assert lora.host_phases["encode"] == lora.host_phases["train"] == lora.host > 0
    assert lora.host_phases["load"] == pytest.approx(2 * (network + vae), rel=0.05)  # and buffers
    # diffusers loads no LoRA for this class: the student is merged into exact weights.
    assert lora.host_phases["export"] == pytest.approx(2 * (network + vae) + 4 * network, rel=0.05)
    whole = plan.plan(recipe, ["student.train=full", "teacher.offload=group"])
    assert whole.host_phases["export"] == 4 * (network + vae) + 2 * 4 * network
    assert whole.host_phases["train"] == whole.host + whole.offloaded > whole.host
    names = [check.name for check in plan.checks_of(whole, None)]
    assert names[-4:] == [f"memory: {phase} (host)" for phase in ("load", "encode", "train", "export")]


def test_stored_weights_are_counted_where_they_are(teacher):
    """In 8 bits on the device, or of one layer at a time; a restored weight is as large as it was."""
    recipe = recipe_of(teacher, "lora", "sfd")
    ways = ({}, {"storage": "fp8"}, {"offload": "group"}, {"storage": "fp8", "offload": "group"})
    plain, eight, away, both = (plan.plan(recipe | {"teacher": recipe["teacher"] | keys}) for keys in ways)
    pipeline = load_pipeline(teacher)
    network, vae = pipeline.transformer, sum(p.nbytes for p in pipeline.vae.parameters())  # at rest with the layers
    layers = list(stored_layers(network, Frozen(None, "fp8", "group")))
    sizes = [(layer.weight.nbytes, layer.weight.numel() if small else layer.weight.nbytes) for layer, small in layers]
    assert len({small for _, small in layers}) == 2  # diffusers leaves norms alone
    whole, held = (sum(column) for column in zip(*sizes, strict=True))
    restored = max(a for (a, _), (_, small) in zip(sizes, layers, strict=True) if small)
    largest = max(a for a, _ in sizes)
    before, *after = (
        next(line for line in one.lines if line.name == "teacher").weights for one in (plain, eight, away)
    )
    assert after == [before - whole + held + restored, before - whole + 2 * largest]
    assert plain.peak - eight.peak == before - after[0] and plain.peak - away.peak == before - after[1] + vae
    assert (plain.offloaded, away.offloaded, both.offloaded) == (0, whole + vae, held + vae)
    assert f"{(whole + vae) / 2**30:.3f} GiB of frozen weights" in plan.as_text(away, [], None)


def test_no_weight_is_read(teacher, tmp_path):
    """The configs are enough: the folder of the plan holds no weights at all."""
    bare = tmp_path / "bare"
    for file in teacher.rglob("*.json"):
        target = bare / file.relative_to(teacher)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    drawn = blueprint(Teacher(pipeline=str(bare)), torch.bfloat16)
    assert drawn.trace.latent_shape == (4, 16, 16) and list(drawn.condition) == ["class_labels"]
    assert {p.dtype for p in drawn.trace.denoiser.network.parameters()} == {torch.bfloat16}


def test_a_text_pipeline_shows_its_conditions(tmp_path):
    save_pipeline(tiny_sd(), tmp_path)
    drawn = blueprint(Teacher(pipeline=str(tmp_path)), torch.float32)
    assert drawn.trace.component == "unet" and drawn.trace.conditioning == {"encoder_hidden_states": (40, 16)}
    assert (drawn.trace.denoiser.spec.sample, drawn.trace.denoiser.spec.timestep) == ("sample", "timestep")


@pytest.mark.parametrize("name", ["inpainting", "controlnet"])
def test_pictures_are_told_to_the_networks(name, tmp_path):
    """As the trace of the real pipeline finds it."""
    pipeline = getattr(zoo, name)()
    save_pipeline(pipeline, tmp_path / "teacher")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    pictures = ["image", "mask_image"] if name == "inpainting" else ["image"]
    arguments = {picture: str(tmp_path / "a.png") for picture in pictures} | zoo.SMALL
    drawn = blueprint(Teacher(pipeline=str(tmp_path / "teacher"), arguments=arguments), torch.float32)
    known = trace(pipeline, arguments)
    assert drawn.trace.conditioning == known.conditioning and drawn.trace.latent_shape == known.latent_shape
    spec, real = drawn.trace.denoiser.spec, known.denoiser.spec
    assert (spec.sample, spec.window) == (real.sample, real.window)
    assert [helper.feeds for helper in spec.helpers] == [helper.feeds for helper in real.helpers]


def test_of_several_sizes_the_largest_counts(tmp_path, monkeypatch):
    save_pipeline(tiny_sd(), tmp_path / "sd")
    recipe = recipe_of(tmp_path / "sd", "lora", "sfd", sizes=[[16, 16], [16, 48], [24, 16]])
    assert plan.blueprint_of(load(recipe | {"data": {"conditions": ["rain"]}})).trace.latent_shape == (4, 8, 24)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    told = {"images": str(tmp_path), "conditions": "captions", "buckets": "auto"}
    bucketed = load(recipe_of(tmp_path / "sd", "lora", "lcm") | {"data": told})
    monkeypatch.setattr(plan, "bucket_sizes", lambda *asked: [asked[0], (16, 24)])
    assert plan.blueprint_of(bucketed).trace.latent_shape == (4, 8, 12)


def test_an_ip_adapter_is_part_of_the_network(tmp_path):
    pipeline = tiny_sd()
    adapter = IPAdapter(**zoo.ip_adapter(pipeline.unet, tmp_path / "adapter"))
    save_pipeline(pipeline, tmp_path / "teacher")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    told = {"ip_adapter_image": str(tmp_path / "a.png"), **zoo.SMALL}
    teacher = Teacher(pipeline=str(tmp_path / "teacher"), ip_adapter=adapter, arguments=told)
    drawn = blueprint(teacher, torch.float32)
    assert drawn.trace.conditioning["added_cond_kwargs.image_embeds.0"] == (1, 6)
    unet = drawn.trace.denoiser.network
    assert [name for name, _ in unet.named_parameters()] == [name for name, _ in pipeline.unet.named_parameters()]
    assert sum(b.numel() for b in unet.buffers()) > 1000 and drawn.trace.pipeline.image_encoder is not None


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


def test_guidance_that_is_an_input_of_the_network_costs_no_second_pass(tmp_path):
    save_pipeline(tiny_flux(), tmp_path / "flux")
    recipe = recipe_of(tmp_path / "flux", "lora") | {"data": {"conditions": ["a hat", "a shoe"]}}
    recipe["method"] = {"name": "ladd", "real": "teacher", "real_rows": 6, "real_steps": 4}
    guided, plain = (plan.plan(recipe, [f"teacher.guidance.scale={scale}"]) for scale in (3.5, 1))
    assert guided.trajectories.evaluations == 6 * 4
    assert guided == plain


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
