"""Components that their files do not fill: refused by name, where the libraries would draw random weights."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from pipeline.tiny import tiny_flux, tiny_sd, tiny_sd3
from pipeline.zoo import sdxl
from stepdistill.errors import InputError
from stepdistill.pipeline.load import load_network, load_pipeline

TEXT, NETWORK = "model.safetensors", "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    tiny_sd().save_pretrained(folder / "sd")
    sdxl().save_pretrained(folder / "sdxl")
    return folder


@pytest.fixture
def teacher(originals, tmp_path):
    def copied(name: str = "sd") -> Path:
        return Path(shutil.copytree(originals / name, tmp_path / name))

    return copied


def rewrite(file: Path, change) -> None:
    save_file(change(load_file(file)), file, {"format": "pt"})


def without(weights: dict, pattern: str) -> dict:
    return {name: value for name, value in weights.items() if not re.search(pattern, name)}


@pytest.mark.parametrize(
    ("pipeline", "place", "change", "said"),
    [
        (
            "sd",
            f"text_encoder/{TEXT}",
            lambda weights: {f"module.{name}": value for name, value in weights.items()},
            r"text_encoder/model\.safetensors does not fill the CLIPTextModel: \d+ weights are missing: .*; "
            r"\d+ names are unknown: module\.",
        ),
        (
            "sd",
            f"text_encoder/{TEXT}",
            lambda weights: dict(list(weights.items())[::2]),
            r"text_encoder/model\.safetensors does not fill the CLIPTextModel: \d+ weights are missing: \S+, \S+, \S+ ",
        ),
        (
            "sd",
            f"text_encoder/{TEXT}",
            lambda weights: {name: value[..., :-1].contiguous() for name, value in weights.items()},
            r"text_encoder/model\.safetensors .* have another shape: expected \S+ of \[.*\], found \[",
        ),
        (
            "sdxl",
            f"text_encoder_2/{TEXT}",
            lambda weights: without(weights, "text_projection"),
            r"text_encoder_2/model\.safetensors .* 1 weights are missing: text_projection\.weight",
        ),
        (
            "sd",
            f"unet/{NETWORK}",
            lambda weights: without(weights, "mid_block"),
            r"unet/diffusion_pytorch_model\.safetensors does not fill the UNet2DConditionModel: .*: mid_block\.",
        ),
        (
            "sd",
            f"unet/{NETWORK}",
            lambda weights: weights | {"conv_in.bias": torch.zeros(3)},
            r"unet/diffusion_pytorch_model\.safetensors cannot be loaded into the \S+: .*conv_in\.bias",
        ),
        (
            "sd",
            f"vae/{NETWORK}",
            lambda weights: without(weights, "^decoder"),
            r"vae/diffusion_pytorch_model\.safetensors does not fill the AutoencoderKL: .*: decoder\.",
        ),
    ],
)
def test_what_a_file_lacks_is_named(teacher, pipeline, place, change, said):
    folder = teacher(pipeline)
    rewrite(folder / place, change)
    with pytest.raises(InputError, match=said) as caught:
        load_pipeline(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_all_incomplete_components_are_named_at_once(teacher):
    folder = teacher()
    for place in (f"vae/{NETWORK}", f"text_encoder/{TEXT}"):
        rewrite(folder / place, lambda weights: without(weights, "norm"))
    with pytest.raises(InputError, match=r"(?=.*vae/)(?=.*text_encoder/)"):
        load_pipeline(folder)


def test_a_network_that_is_loaded_alone_is_checked_too(teacher):
    """Encoders of a pipeline that are loaded when they are needed, and those that invert a student."""
    folder = teacher() / "unet"
    rewrite(folder / NETWORK, lambda weights: without(weights, "mid_block"))
    with pytest.raises(InputError, match=r"unet/\S+ does not fill the UNet2DConditionModel: .*: mid_block\."):
        load_network(UNet2DConditionModel, folder)


def test_a_network_saved_with_its_adapter_still_attached_is_explained(tmp_path):
    pipeline = tiny_sd()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"unet/.*base_layer.*call fuse_lora\(\), then unload_lora_weights\(\)"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("lost", [["merges.txt"], ["vocab.json"], ["vocab.json", "merges.txt"]])
def test_a_tokenizer_without_all_of_its_files_is_refused(teacher, lost):
    folder = teacher()
    tokenizer = folder / "tokenizer"
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer.json").unlink()
    load_pipeline(folder)
    for name in lost:
        (tokenizer / name).unlink()
    expected = rf"tokenizer of class CLIPTokenizer expected .*, found no {' and no '.join(lost)}"
    with pytest.raises(InputError, match=expected):
        load_pipeline(folder)


@pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])
def test_files_in_other_layouts_fill_their_components(tmp_path, build):
    """Tied weights, several files, half precision, and names with and without the prefix of earlier versions."""
    pipeline = build()
    expected = {name: value.clone() for name, value in pipeline.text_encoder.state_dict().items()}
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.rglob("*-00002-of-*.safetensors"))) >= 1
    found = load_pipeline(tmp_path).text_encoder.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half")

    def other(name: str) -> str:
        bare = name.removeprefix("text_model.")
        return name if "text_projection" in name else bare if bare != name else f"text_model.{name}"

    rewrite(tmp_path / f"half/text_encoder/{TEXT}", lambda all_: {other(name): value for name, value in all_.items()})
    found = load_pipeline(tmp_path / "half").text_encoder.state_dict()
    assert all(torch.equal(value.half().float(), found[name]) for name, value in expected.items())
