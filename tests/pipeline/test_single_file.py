"""Checkpoint files, as Civitai has them: every command takes one, and what diffusers cannot read is one line."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from pipeline import checkpoints, tiny
from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.single_file import detected
from stepdistill.recipe import Teacher

SIZE = ["--argument", "height=16", "--argument", "width=16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """tiny.safetensors, an SD 1.5 in small; whole/, its folder; config/, the same without weights."""
    folder = tmp_path_factory.mktemp("files")
    pipeline = tiny.tiny_sd()
    save_pipeline(pipeline, folder / "whole")
    shutil.copytree(folder / "whole", folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    checkpoints.save_sd(pipeline, folder / "tiny.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(place, tmp_path, monkeypatch) -> Path:
    """The hub's cache of a machine that once had the configs of Stable Diffusion 1.5."""
    cached = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(place / "config", cached / "snapshots" / "0a1b")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0a1b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return cached


def same(found: DiffusionPipeline, expected: DiffusionPipeline) -> bool:
    parts = {name: part for name, part in expected.components.items() if isinstance(part, torch.nn.Module)}
    states = [(getattr(found, name).state_dict(), part.state_dict()) for name, part in parts.items()]
    return all(torch.equal(value, ours[key]) for ours, theirs in states for key, value in theirs.items())


def test_an_sd_file_is_the_pipeline_that_it_was_made_of(place):
    found = load_pipeline(Teacher(pipeline=str(place / "tiny.safetensors"), config=str(place / "config")))
    assert type(found) is StableDiffusionPipeline and same(found, tiny.tiny_sd())
    assert found.unet.dtype == torch.float32 and found.made_of


def test_an_sdxl_file_too(tmp_path):
    pipeline = checkpoints.tiny_sdxl()
    save_pipeline(pipeline, tmp_path / "config")
    file = checkpoints.save_sdxl(pipeline, tmp_path / "xl.safetensors")
    found = load_pipeline(Teacher(pipeline=str(file), config=str(tmp_path / "config")))
    assert type(found) is type(pipeline) and same(found, pipeline)


def test_its_configs_are_found_in_the_hubs_cache(place, hub, capsys, caplog):
    assert cli.run(["inspect", str(place / "tiny.safetensors"), *SIZE, "--json"]) == 0
    assert "kept in float32" not in caplog.text  # diffusers' warning of every cast
    assert json.loads(capsys.readouterr().out)["pipeline"] == "StableDiffusionPipeline"


def test_without_them_the_message_says_what_to_type(place, capsys):
    assert cli.run(["inspect", str(place / "tiny.safetensors"), *SIZE]) == 2
    said = capsys.readouterr().err
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in said and said.count("\n") == 2  # what is loaded, and this
    assert "teacher.config=FOLDER (--config FOLDER)" in said and "hf download stable-diffusion-v1-5" in said


def test_convert_and_sample_take_a_file(place, hub, tmp_path, capsys):
    command = ["convert", str(place / "tiny.safetensors"), str(tmp_path / "out"), "--config", str(place / "config")]
    assert cli.run(command) == 0
    assert same(load_pipeline(tmp_path / "out"), tiny.tiny_sd())
    drawn = []
    for name in (str(place / "tiny.safetensors"), str(tmp_path / "out")):
        grid = tmp_path / "grid.png"
        assert cli.run(["sample", name, "--steps", "2", "--count", "1", "--prompt", "a", "--out", str(grid)]) == 0
        drawn.append(grid.read_bytes())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "stable-diffusion-v1-5"),
        ({"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)}, "xl-base-1.0"),
        (
            {
                "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
                "model.diffusion_model.pos_embed": (1, 36864, 1536),
            },
            "stable-diffusion-3-medium-diffusers",
        ),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}, "FLUX.1-schnell"),
        (
            {
                "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
                "guidance_in.in_layer.bias": (3072,),
                "img_in.weight": (3072, 64),
            },
            "FLUX.1-dev",
        ),
    ],
)
def test_what_a_file_is_shows_in_its_tensors(tensors, name, tmp_path):
    save_file({key: torch.empty(shape, dtype=torch.bool) for key, shape in tensors.items()}, tmp_path / "a.safetensors")
    assert detected(tmp_path / "a.safetensors").endswith(name)


def test_a_component_that_the_file_lacks_comes_from_the_config_with_weights(place, tmp_path):
    file = checkpoints.save_sd(tiny.tiny_sd(), tmp_path / "a.safetensors", without="cond_stage_model")
    assert same(load_pipeline(Teacher(pipeline=str(file), config=str(place / "whole"))), tiny.tiny_sd())
    with pytest.raises(InputError, match=r"has no text_encoder \(CLIPTextModel\).*name the folder of a whole pipeline"):
        load_pipeline(Teacher(pipeline=str(file), config=str(place / "config")))


def test_half_precision_stays_in_the_folder_that_is_made(place, tmp_path):
    file = checkpoints.save_sd(tiny.tiny_sd().to(torch.float16), tmp_path / "half.safetensors")
    found = load_pipeline(Teacher(pipeline=str(file), config=str(place / "config")))
    assert found.unet.dtype == torch.float32
    (weights,) = (found.loaded_from[0] / "unet").glob("*.safetensors")
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}


def test_weights_in_8_bits_are_read(place, tmp_path):
    held = load_file(place / "tiny.safetensors")
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in held.items()}, tmp_path / "a.safetensors")
    teacher = Teacher(pipeline=str(tmp_path / "a.safetensors"), config=str(place / "config"))
    expected = tiny.tiny_sd().unet.conv_in.weight.to(torch.float8_e4m3fn).float()
    assert torch.equal(load_pipeline(teacher).unet.conv_in.weight, expected)
    held["model.diffusion_model.out.2.scale_weight"] = torch.ones(())
    save_file(held, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="found fp8 with factors beside them"):
        load_pipeline(teacher)


def test_files_that_are_no_checkpoint_or_not_whole_are_one_line(place, tmp_path):
    config = str(place / "config")
    save_file({"lora_unet_down.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="expected the checkpoint of a model that diffusers knows, found 1 tensors"):
        load_pipeline(tmp_path / "lora.safetensors")
    content = (place / "tiny.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut\.safetensors: not a whole file of safetensors"):
        load_pipeline(Teacher(pipeline=str(tmp_path / "cut.safetensors"), config=config))
    for lost, said in (
        ("model.diffusion_model.time_embed.2", r"weights of the UNet2DConditionModel are missing: time_embedding"),
        ("first_stage_model.decoder.mid", r"weights of the AutoencoderKL are missing: decoder\.mid_block"),
        ("cond_stage_model.transformer.text_model.final", r"weights of text_encoder are missing: final_layer_norm"),
    ):
        file = checkpoints.save_sd(tiny.tiny_sd(), tmp_path / "some.safetensors", without=lost)
        with pytest.raises(InputError, match=rf"some\.safetensors: \d+ {said}"):
            load_pipeline(Teacher(pipeline=str(file), config=config))
    with pytest.raises(InputError, match="reads no single files of a DiTPipeline"):
        load_pipeline(Teacher(pipeline=str(file), config="fashion-dit"))


class Trap:
    """Unpickled, it leaves a trace."""

    def __init__(self, place: str):
        self.place = place

    def __reduce__(self):
        return open, (self.place, "w")


def test_pickles_are_read_neither_as_a_checkpoint_nor_from_the_config(place, tmp_path, capsys):
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Trap(str(tmp_path / "ran"))))
    with pytest.raises(InputError, match=r"expected a \.safetensors file, found \.ckpt .* pickles are not read"):
        load_pipeline(tmp_path / "a.ckpt")
    assert cli.run(["train", "quickstart", f"teacher.pipeline={tmp_path / 'a.ckpt'}", "--dry-run"]) == 2
    assert "teacher.pipeline: expected a folder in diffusers format, a checkpoint" in capsys.readouterr().err
    shutil.copytree(place / "config", tmp_path / "config")
    (tmp_path / "config" / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(str(tmp_path / "ran"))))
    file = checkpoints.save_sd(tiny.tiny_sd(), tmp_path / "a.safetensors", without="cond_stage_model")
    with pytest.raises(InputError, match=r"teacher\.config: .*found only pickled ones"):
        load_pipeline(Teacher(pipeline=str(file), config=str(tmp_path / "config")))
    assert not (tmp_path / "ran").exists()


def test_code_that_a_config_names_is_not_run(place, tmp_path, monkeypatch):
    folder = tmp_path / "config"
    shutil.copytree(place / "config", folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["own", "Own"]}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="unet: cannot be loaded: code of"):
        load_pipeline(Teacher(pipeline=str(place / "tiny.safetensors"), config=str(folder)))
    assert not (tmp_path / "ran").exists()
