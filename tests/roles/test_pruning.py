"""A smaller student is the teacher with blocks left out: equal where none is, trained and stock where some are."""

import functools

import pytest
import torch
from diffusers import DiffusionPipeline

from pipeline import tiny, zoo
from pipeline.no_preview import NoPreview
from pipeline.tiny import redraw
from stepdistill.errors import InputError
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.trace import trace
from stepdistill.planning import plan
from stepdistill.recipe import load
from stepdistill.roles.build import LoRA, build_roles
from stepdistill.roles.pruning import pruned
from stepdistill.run import train

X, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([600, 20])
TEXT = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def deeper(network, **config):
    """The network with more blocks, its weights redrawn."""
    return redraw(type(network).from_config({**network.config, **config}), 9)


@functools.cache
def networks() -> dict:
    """By name: a network of four families with enough blocks, and what else it is called with."""
    flux = tiny.tiny_flux().transformer
    packed = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3), "guidance": torch.ones(2)}
    return {
        "dit": (tiny.tiny_dit().transformer, {"class_labels": torch.tensor([1, 2])}),
        "sd3": (
            deeper(tiny.tiny_sd3().transformer, num_layers=4),
            {"encoder_hidden_states": TEXT, "pooled_projections": TEXT[:, 0]},
        ),
        "unet": (
            zoo.unet(layers_per_block=2, transformer_layers_per_block=3),
            {"encoder_hidden_states": TEXT[..., :16]},
        ),
        "ddpm": (deeper(zoo.ddpm().unet, layers_per_block=3), {}),
        "pixart": (
            deeper(zoo.pixart(sigma=True).transformer, num_layers=3),
            {"encoder_hidden_states": TEXT, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        ),
        "flux": (
            deeper(flux, num_layers=2, num_single_layers=4),
            {"encoder_hidden_states": TEXT, "pooled_projections": TEXT[:, 0, :16], **packed},
        ),
    }


def called(name, network):
    x = {"ddpm": X[:, :3], "flux": X.reshape(2, 16, 16)}.get(name, X)
    first = "sample" if name in ("unet", "ddpm") else "hidden_states"
    with torch.no_grad():
        return network.eval()(**{first: x}, timestep=T, **networks()[name][1], return_dict=False)[0]


WHOLE = {
    "dit": {"num_layers": 3},
    "sd3": {"num_layers": 4},
    "unet": {"layers_per_block": 2, "transformer_layers_per_block": 3},
    "ddpm": {"layers_per_block": 3},
    "pixart": {"num_layers": 3},
    "flux": {"num_layers": 2, "num_single_layers": 4},
}
FEWER = {
    "dit": {"num_layers": 2},
    "sd3": {"num_layers": 2},
    "unet": {"layers_per_block": 1, "transformer_layers_per_block": 2, "mid_block_type": None},
    "ddpm": {"layers_per_block": 1},
    "pixart": {"num_layers": 2},
    "flux": {"num_layers": 1, "num_single_layers": 2},
}
# A name in the student and where its values come from.
KEPT = {
    "dit": ("transformer_blocks.1.ff.net.2.weight", "transformer_blocks.2.ff.net.2.weight"),
    "sd3": ("transformer_blocks.1.attn.to_q.weight", "transformer_blocks.3.attn.to_q.weight"),
    "unet": ("up_blocks.0.resnets.1.conv1.weight", "up_blocks.0.resnets.2.conv1.weight"),
    "ddpm": ("up_blocks.1.resnets.1.conv1.weight", "up_blocks.1.resnets.3.conv1.weight"),
    "pixart": ("transformer_blocks.1.scale_shift_table", "transformer_blocks.2.scale_shift_table"),
    "flux": ("single_transformer_blocks.1.attn.to_q.weight", "single_transformer_blocks.3.attn.to_q.weight"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_with_all_blocks_it_is_the_teacher(name):
    teacher = networks()[name][0]
    same = pruned(teacher, WHOLE[name])
    assert same is not teacher and torch.equal(called(name, same), called(name, teacher))


@pytest.mark.parametrize("name", FEWER)
def test_with_fewer_blocks_the_outer_ones_are_kept(name):
    teacher = networks()[name][0]
    student = pruned(teacher, FEWER[name])
    here, there = KEPT[name]
    assert torch.equal(student.state_dict()[here], teacher.state_dict()[there])
    assert student.num_parameters() < teacher.num_parameters()
    out = called(name, student)
    assert out.isfinite().all() and not torch.equal(out, called(name, teacher))
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}


MISTAKES = {
    "has no key 'num_layer'; did you mean 'num_layers'?": {"num_layer": 2},
    "expected at most 3 in transformer_blocks, found 4": {"num_layers": 4},
    "the teacher's pos_embed.proj.weight (16, 4, 2, 2)": {"num_attention_heads": 1, "attention_head_dim": 8},
    "cannot be built with": {"num_layers": "two"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_is_no_smaller_teacher_is_refused(message):
    with pytest.raises(InputError) as caught:
        pruned(networks()["dit"][0], MISTAKES[message])
    assert str(caught.value).startswith("student.config: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_last_block_that_is_special_stays_the_last():
    """SD3's gives no text; a single block would have to be first and last at once."""
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.norm1_context\.linear"):
        pruned(networks()["sd3"][0], {"num_layers": 1})


def test_the_target_is_as_small_as_the_student_and_the_critic_as_large_as_the_teacher():
    tiny_denoiser = trace(tiny.tiny_dit()).denoiser
    smaller = pruned(tiny_denoiser.network, {"num_layers": 1})
    training = dict.fromkeys(("student", "target", "critic"), "full")
    roles = build_roles(tiny_denoiser, training, 1.0, LoRA(4), base=smaller)
    assert [len(role.network.transformer_blocks) for role in (roles.student, roles.target, roles.critic)] == [1, 1, 3]


def sd() -> DiffusionPipeline:
    pipeline = tiny.tiny_sd()
    pipeline.unet = deeper(pipeline.unet, layers_per_block=2)
    return pipeline


def sd3() -> DiffusionPipeline:
    pipeline = tiny.tiny_sd3()
    pipeline.transformer = deeper(pipeline.transformer, num_layers=4)
    return pipeline


RUNS = {
    "dit": (tiny.tiny_dit, "transformer", {"num_layers": 2}),
    "sd": (sd, "unet", {"layers_per_block": 1, "mid_block_type": None}),
    "sd3": (sd3, "transformer", {"num_layers": 2}),
}


def recipe_of(name, place) -> dict:
    return {
        "teacher": {"pipeline": str(place / "teacher"), "guidance": {"scale": 2.0}},
        "student": {"steps": 2, "config": RUNS[name][2]},
        "data": {} if name == "dit" else {"conditions": ["a red shoe", "rain"]},
        "method": {"name": "dmd2", "critic_steps": 1},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(place / "run"),
    }


@pytest.mark.parametrize("name", RUNS)
def test_it_is_trained_exported_and_sampled(name, tmp_path, monkeypatch):
    build, component, config = RUNS[name]
    pipeline = build()
    save_pipeline(pipeline, tmp_path / "teacher")
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", 2)
    run = train(recipe_of(name, tmp_path))  # the export has been reloaded and compared with the sampler of training
    student = DiffusionPipeline.from_pretrained(run.folder / "export")
    network = getattr(student, component)
    assert all(network.config[key] == value for key, value in config.items())
    assert network.num_parameters() < getattr(pipeline, component).num_parameters()


def test_the_plan_counts_its_parameters(tmp_path):
    pipeline = tiny.tiny_dit()
    save_pipeline(pipeline, tmp_path / "teacher")
    planned = {line.name: line.parameters for line in plan.plan(recipe_of("dit", tmp_path)).lines}
    whole = pipeline.transformer.num_parameters()
    assert planned["critic"] == planned["teacher"] == whole
    assert planned["student"] == pruned(pipeline.transformer, RUNS["dit"][2]).num_parameters() < whole


def test_an_adapter_has_its_teachers_blocks(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    recipe = {
        "teacher": {"pipeline": str(tmp_path)},
        "student": {"steps": 2, "train": "lora", "config": {"num_layers": 2}},
        "method": {"name": "sfd"},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
    }
    with pytest.raises(InputError, match=r"student\.config: expected none for a student that stands on .* \(lora\)"):
        load(recipe)
