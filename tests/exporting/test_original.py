"""One-file layouts: diffusers' own reader of such files gives back the network that was written, to the bit."""

import copy
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_model, single_file_utils
from diffusers.models.normalization import AdaLayerNormContinuous
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_vae
from pipeline.zoo import qwen_image, sdxl, wan, z_image
from stepdistill.errors import InputError
from stepdistill.exporting import ldm, original

TRANSFORMERS = {"flux": tiny_flux, "sd3": tiny_sd3, "qwen": qwen_image, "z_image": z_image, "wan": wan}


@pytest.fixture(scope="module")
def network():
    """The denoiser of a tiny pipeline, made once."""
    made: dict[str, Any] = {}

    def of(name: str) -> nn.Module:
        if name not in made:
            made[name] = TRANSFORMERS[name]().transformer
        return made[name]

    return of


def with_constants(function: Any, constants: dict) -> Any:
    """diffusers' readers count with Flux' own width; this is such a function for the tiny network's."""

    def changed(code: CodeType) -> CodeType:
        new = [changed(one) if isinstance(one, CodeType) else one for one in code.co_consts]
        new = [constants.get(one, one) if type(one) in (int, tuple) else one for one in new]
        return code.replace(co_consts=tuple(new))

    return FunctionType(changed(function.__code__), function.__globals__, closure=function.__closure__)


@pytest.fixture
def _tiny_flux(monkeypatch):
    reader = with_constants(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers, {3072: 32})
    settings = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(settings, "checkpoint_mapping_fn", reader)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def write(weights: dict[str, Tensor], path: Any) -> Any:
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    return path


@pytest.mark.usefixtures("_tiny_flux")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_from_single_file_gives_back_the_transformer(name, network, tmp_path):
    ours = network(name)
    ours.save_config(tmp_path / "config")
    file = write(original.original_weights(ours, ours.state_dict()), tmp_path / "one.safetensors")
    assert_same(type(ours).from_single_file(file, config=str(tmp_path / "config")).state_dict(), ours.state_dict())


@pytest.mark.parametrize("make", [tiny_sd, sdxl])
def test_from_single_file_gives_back_the_whole_pipeline(make, tmp_path):
    pipeline = make()
    attention = copy.deepcopy(pipeline.vae.config) | {"mid_block_add_attention": True}
    pipeline.vae = tiny_vae(2) if make is sdxl else type(pipeline.vae).from_config(attention)
    pipeline.save_pretrained(tmp_path / "folder")
    file = write(ldm.checkpoint(pipeline, pipeline.unet), tmp_path / "one.safetensors")
    again = type(pipeline).from_single_file(file, config=str(tmp_path / "folder"), local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        assert_same(getattr(again, part).state_dict(), getattr(pipeline, part).state_dict())
    if make is sdxl:  # whose pipeline knows the second encoder by its real width
        read = single_file_utils.convert_open_clip_checkpoint
        second = read(
            pipeline.text_encoder_2, ldm.checkpoint(pipeline, pipeline.unet), "conditioner.embedders.1.model."
        )
        assert_same(second, pipeline.text_encoder_2.state_dict())


def test_what_the_published_layout_has_no_place_for_is_named(network):
    odd = copy.deepcopy(network("flux"))
    odd.heads = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"layout of FluxTransformer2DModel has no place for heads\.weight"):
        original.original_weights(odd, odd.state_dict())
    unet = tiny_sd().unet
    unet.time_embedding.cond_proj = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"no place for time_embedding\.cond_proj\.weight"):
        ldm.unet_weights(unet)


def draw_lora(network: nn.Module, without: str = " ") -> dict[str, Tensor]:
    """A LoRA of rank 2 on every linear layer."""
    random, weights = torch.Generator().manual_seed(1), {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and without not in name:
            for kind, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
                weights[f"{name}.lora_{kind}.weight"] = torch.randn(shape, generator=random)
    return weights


def delta(weights: dict[str, Tensor], layer: str) -> Tensor:
    return weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]


@pytest.mark.parametrize("without", [" ", "to_k"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_lora_on_the_one_file_is_the_one_file_with_the_lora(name, without, network):
    """Fused layers, swapped halves and layers without a LoRA: what a reader adds up is the student."""
    student, weights = copy.deepcopy(network(name)), draw_lora(network(name), without)
    file = original.original_weights(student, {key: value.clone() for key, value in student.state_dict().items()})
    layers = {key.removesuffix(".weight").replace(".", "_"): key for key in file if key.endswith(".weight")}
    lora = original.lora_weights(student, weights)
    for key, alpha in lora.items():
        if key.endswith(".alpha"):
            down, up = (lora[key.replace("alpha", f"lora_{side}.weight")] for side in ("down", "up"))
            assert alpha == len(down) and alpha.dtype == torch.float32
            file[layers[key.removeprefix("lora_unet_").removesuffix(".alpha")]] += up @ down
    with torch.no_grad():
        for layer in {key.partition(".lora_")[0] for key in weights}:
            student.get_submodule(layer).weight += delta(weights, layer)
    expected = original.original_weights(student, student.state_dict())
    assert file.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(file[key], value)


READERS = {
    "flux": lora_conversion_utils._convert_kohya_flux_lora_to_diffusers,
    "qwen": lora_conversion_utils._convert_non_diffusers_qwen_lora_to_diffusers,
    "wan": lora_conversion_utils._convert_musubi_wan_lora_to_diffusers,
}


@pytest.mark.parametrize("name", READERS)
def test_diffusers_reads_the_names_of_kohyas_scripts(name, network):
    """To the bit, in the layers that its readers know."""
    own = network(name)
    norms = [key for key, layer in own.named_modules() if isinstance(layer, AdaLayerNormContinuous)]
    blocks = {key: value for key, value in draw_lora(own).items() if "blocks." in key or key.startswith(tuple(norms))}
    if name == "wan":
        blocks = {key: value for key, value in blocks.items() if key.startswith("blocks.")}
    width = {(3072, 3072, 3072, 12288): (32, 32, 32, 128)}
    read = with_constants(READERS[name], width)(original.lora_weights(own, blocks))
    assert_same({key.removeprefix("transformer."): value for key, value in read.items()}, blocks)


def test_diffusers_reads_z_images_fused_layers_as_the_same_function(network):
    own = network("z_image")
    weights = {key: value for key, value in draw_lora(own).items() if "layers." in key}
    read = lora_conversion_utils._convert_non_diffusers_z_image_lora_to_diffusers(original.lora_weights(own, weights))
    assert {key.removeprefix("transformer.") for key in read} == weights.keys()
    for layer in {key.partition(".lora_")[0] for key in weights}:
        torch.testing.assert_close(delta(read, f"transformer.{layer}"), delta(weights, layer))
