"""LoRA students: the folder that stock load_lora_weights takes is the student, alone and beside another LoRA."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.loaders import PeftAdapterMixin
from safetensors.torch import load_file
from torch import Tensor

from pipeline.tiny import tiny_dit, tiny_flux, tiny_sd, tiny_sd3
from pipeline.zoo import sdxl
from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.exporting.check import ExportError
from stepdistill.exporting.export import export
from stepdistill.exporting.lora import why_not_lora
from stepdistill.pipeline.exports import WEIGHTS
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.trace import trace
from stepdistill.roles.views import AdapterView, lora_targets
from stepdistill.run import train

PIPELINES = {
    "sd": (tiny_sd, "unet"),
    "sdxl": (sdxl, "unet"),
    "sd3": (tiny_sd3, "transformer"),
    "flux": (tiny_flux, "transformer"),
}


def recipe_of(teacher: Path, out: Path, **student: Any) -> dict:
    return {
        "teacher": {"pipeline": str(teacher)},
        "student": {"steps": 2, "train": "lora", "rank": 2} | student,
        "data": {"conditions": ["a red shoe", "rain"]},
        "method": {"name": "sfd", "substeps": 3},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-2, "preview_every": 100, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(out),
    }


@pytest.fixture(autouse=True, scope="module")
def small_flux():
    """Flux' pipeline makes images of 1024 pixels whatever its networks say."""
    original = FluxPipeline.__init__

    def init(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        self.default_sample_size = 8

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FluxPipeline, "__init__", functools.wraps(original)(init))
        yield


@pytest.fixture(autouse=True, scope="module")
def quick():
    """No check of conventions, which networks without training have none of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepdistill.run.check_conventions", lambda session: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains a LoRA student of a pipeline once; the folder holds teacher/ and run/."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_pipeline(PIPELINES[name][0](), made[name] / "teacher")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("stepdistill.run.export_trained", lambda *_: None)
                train(recipe_of(made[name] / "teacher", made[name] / "run"))
        return made[name]

    return of


@pytest.fixture
def lora(runs):
    """The exported LoRA of a pipeline's run, written once."""

    def of(name: str) -> Path:
        folder = runs(name) / "lora"
        if not folder.exists():
            result = export(runs(name) / "run", folder)
            assert result.form == "lora" and result.max_error <= 1e-5
        return folder

    return of


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_half_of_the_size_is_proven_like_the_whole(name, runs, lora, tmp_path):
    result = export(runs(name) / "run", tmp_path / "half", half=True)
    assert result.form == "lora" and result.max_error <= 1e-5
    half, whole = (load_file(folder / WEIGHTS) for folder in (result.folder, lora(name)))
    assert half.keys() == whole.keys()
    assert all(half[key].dtype == torch.float16 and torch.equal(half[key], whole[key].half()) for key in whole)


def call_network(network: torch.nn.Module, name: str) -> Tensor:
    random = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    match name:
        case "sd":
            inputs = {"sample": draw(1, 4, 8, 8), "encoder_hidden_states": draw(1, 5, 16)}
        case "sdxl":
            inputs = {"sample": draw(1, 4, 8, 8), "encoder_hidden_states": draw(1, 5, 32)}
            inputs["added_cond_kwargs"] = {"text_embeds": draw(1, 16), "time_ids": torch.ones(1, 6)}
        case "sd3":
            inputs = {"hidden_states": draw(1, 4, 8, 8), "encoder_hidden_states": draw(1, 5, 32)}
            inputs["pooled_projections"] = draw(1, 32)
        case "flux":
            inputs = {"hidden_states": draw(1, 16, 16), "encoder_hidden_states": draw(1, 5, 32)}
            inputs |= {"pooled_projections": draw(1, 16), "guidance": torch.ones(1)}
            inputs |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    with torch.no_grad():
        return network(**inputs, timestep=torch.tensor([0.3 if name == "flux" else 300.0]), return_dict=False)[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_stock_diffusers_loads_the_student_at_scale_one(name, runs, lora, tmp_path):
    place, folder, component = runs(name), lora(name), PIPELINES[name][1]
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, "scheduler", "README.md", "stepdistill.json"}
    weights = load_file(folder / WEIGHTS)
    assert all(key.startswith(f"{component}.") for key in weights) and not any("alpha" in key for key in weights)
    fused = export(place / "run", tmp_path / "fused", fuse=True)
    assert fused.form == "pipeline"
    whole = DiffusionPipeline.from_pretrained(fused.folder)
    stock = DiffusionPipeline.from_pretrained(place / "teacher")
    teacher = call_network(getattr(stock, component), name)
    stock.load_lora_weights(folder)
    student, expected = (call_network(getattr(pipe, component), name) for pipe in (stock, whole))
    assert (student - teacher).abs().max() > 1e-3
    torch.testing.assert_close(student, expected, atol=1e-5, rtol=1e-4)
    again = load_pipeline(folder)
    torch.testing.assert_close(call_network(getattr(again, component), name), expected, atol=1e-5, rtol=1e-4)
    assert type(again.scheduler) is type(whole.scheduler) and again.scheduler.config == whole.scheduler.config


def test_the_cards_snippet_runs(lora):
    folder = lora("sd")
    card = (folder / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("PATH_OF_THIS_FOLDER", str(folder))
    code = code.replace("PATH_OF_THE_TEACHER", json.loads((folder / "stepdistill.json").read_text())["teacher"])
    assert f'load_lora_weights("{folder}")' in code and "num_inference_steps=2, guidance_scale=1" in code
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names["images"]) == 1 and names["pipe"].scheduler.config["_class_name"] == "DDIMScheduler"


def test_the_snippet_of_the_shipped_student_runs(tmp_path):
    folder = assets.find("students/emoji")
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert 'assets.find("teachers/emoji")' in code and "emoji of" in code and "a photo of" not in code
    names: dict[str, Any] = {}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(folder)), names)
    assert names["images"][0].size == (64, 64)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_kohyas_names_come_back_as_the_same_lora(name, runs, lora, tmp_path):
    place, plain = runs(name), lora(name)
    kohya = export(place / "run", tmp_path / "kohya", keys="kohya").folder
    renamed = load_file(kohya / WEIGHTS)
    assert all(key.startswith("lora_unet_") for key in renamed)
    layers = {key.partition(".")[0] for key in renamed}
    assert {key.partition(".")[2] for key in renamed} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert f"lora_unet_down_blocks_{int(name == 'sdxl')}_attentions_0_transformer_blocks_0_attn1_to_q" in layers
    assert all(renamed[f"{layer}.alpha"] == len(renamed[f"{layer}.lora_down.weight"]) for layer in layers)
    assert 2 * len(layers) == len(load_file(plain / WEIGHTS))
    outputs = []
    for folder in (plain, kohya):
        pipe = DiffusionPipeline.from_pretrained(place / "teacher")
        pipe.load_lora_weights(folder)
        outputs.append(pipe.unet.state_dict())
    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(value, outputs[1][key]) for key, value in outputs[0].items())


def test_kohyas_names_are_for_unets(runs, tmp_path):
    with pytest.raises(InputError, match=r"export\.keys: expected 'diffusers' for SD3.*, found 'kohya'"):
        export(runs("sd3") / "run", tmp_path / "lora", keys="kohya")
    assert not (tmp_path / "lora").exists()


def test_kohyas_names_are_for_loras(runs, tmp_path):
    with pytest.raises(InputError, match=r"export\.keys: expected 'diffusers' for a student .* whole, found 'kohya'"):
        export(runs("sd") / "run", tmp_path / "whole", fuse=True, keys="kohya")
    assert not (tmp_path / "whole").exists()


def test_beside_a_style_the_deltas_add_up(runs, lora):
    """set_adapters with a second LoRA: each layer is W + student's delta + 0.7 times the style's."""
    place, folder = runs("sd"), lora("sd")
    style = {key: 0.1 * torch.randn_like(value) for key, value in load_file(folder / WEIGHTS).items() if "attn" in key}
    pipe = DiffusionPipeline.from_pretrained(place / "teacher")
    pipe.load_lora_weights(folder, adapter_name="step")
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters(["step", "style"], adapter_weights=[1.0, 0.7])
    both = call_network(pipe.unet, "sd")

    summed = DiffusionPipeline.from_pretrained(place / "teacher")
    step = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, parameter in summed.unet.named_parameters():
            layer = f"unet.{name.removesuffix('.weight')}"
            for lora, scale in ((step, 1.0), (style, 0.7)):
                if f"{layer}.lora_A.weight" in lora and name.endswith(".weight"):
                    parameter += scale * delta(lora[f"{layer}.lora_A.weight"], lora[f"{layer}.lora_B.weight"])
    torch.testing.assert_close(both, call_network(summed.unet, "sd"), atol=1e-5, rtol=1e-4)
    pipe.set_adapters("step")
    assert (call_network(pipe.unet, "sd") - both).abs().max() > 1e-3


def delta(down: Tensor, up: Tensor) -> Tensor:
    """B A as a weight: of a linear layer, or of a convolution whose B is 1x1."""
    if down.ndim == 2:
        return up @ down
    return torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)


def test_a_lora_starts_from_a_lora(runs, lora, tmp_path):
    place, folder = runs("sd"), lora("sd")
    recipe = recipe_of(place / "teacher", tmp_path / "more", init=str(folder))
    recipe["train"] |= {"steps": 1, "lr": 1e-12}
    result = train(recipe)
    before, after = load_file(folder / WEIGHTS), load_file(result.folder / "export" / WEIGHTS)
    assert all((before[key] - after[key]).abs().max() < 1e-9 for key in before)
    recipe["student"]["rank"], recipe["resume"] = 3, "never"
    with pytest.raises(InputError, match=r"student\.init: the LoRA in .* has other layers or another rank"):
        train(recipe)


def test_an_alpha_of_its_own_is_in_the_file(runs, tmp_path):
    """Rank 2 of alpha 0.6: what every reader makes of the file at scale 1 is the student, also in half precision."""
    place = runs("sd")
    run = train(recipe_of(place / "teacher", tmp_path / "run", alpha=0.6)).folder
    assert json.loads((run / "export" / "stepdistill.json").read_text())["recipe"]["student"]["alpha"] == 0.6
    whole = DiffusionPipeline.from_pretrained(export(run, tmp_path / "fused", fuse=True).folder)
    files = {"diffusers": run / "export", "kohya": export(run, tmp_path / "kohya", keys="kohya").folder}
    stock = DiffusionPipeline.from_pretrained(place / "teacher")
    teacher = call_network(stock.unet, "sd")
    for file in files.values():
        stock.load_lora_weights(file)
        student = call_network(stock.unet, "sd")
        assert (student - teacher).abs().max() > 1e-4
        torch.testing.assert_close(student, call_network(whole.unet, "sd"), atol=1e-5, rtol=1e-4)
        stock.unload_lora_weights()
    assert export(run, tmp_path / "half", half=True, keys="kohya").max_error <= 1e-5
    # A student that starts from it is it, whatever its own alpha; so is one from a file at alpha = rank.
    again = tmp_path / "again"
    for keys, alpha in (("diffusers", 0.6), ("kohya", 0.6), ("kohya", None), ("plain", 0.5)):
        source = export(runs("sd") / "run", tmp_path / "plain").folder if keys == "plain" else files[keys]
        more = recipe_of(place / "teacher", again / f"{keys}-{alpha}", init=str(source), alpha=alpha)
        more["train"] |= {"steps": 1, "lr": 1e-12}
        more["export"] = {"keys": "kohya" if keys == "kohya" else "diffusers"}
        before, after = load_file(source / WEIGHTS), load_file(train(more).folder / "export" / WEIGHTS)
        assert before.keys() == after.keys()
        assert all((before[key] - after[key]).abs().max() < 1e-7 for key in before)


def test_a_class_without_loras_gets_a_whole_pipeline_and_is_told(tmp_path, capfd):
    save_pipeline(tiny_dit(), tmp_path / "teacher")
    recipe = recipe_of(tmp_path / "teacher", tmp_path / "run") | {"data": {"conditions": "classes"}}
    result = train(recipe | {"export": {"to": "comfyui"}})
    facts = json.loads((result.folder / "export" / "stepdistill.json").read_text())
    assert facts["form"] == "pipeline" and (result.folder / "export" / "model_index.json").is_file()
    printed = " ".join(capfd.readouterr().err.split())
    assert "DiTPipeline loads no LoRA for its transformer" in printed
    assert "no file for ComfyUI: DiTPipeline is none of" in printed and not (result.folder / "export/comfyui").exists()
    with pytest.raises(InputError, match="--to comfyui: DiTPipeline is none of StableDiffusionPipeline, "):
        export(result.folder, tmp_path / "out", to="comfyui")
    assert not (tmp_path / "out").exists()


def test_a_network_that_takes_no_lora_is_exported_whole(monkeypatch):
    """Kandinsky 3's, whose pipeline has the function for it."""
    traced = trace(tiny_sd())
    student = AdapterView(traced.network, None)
    assert why_not_lora(traced, student) is None
    monkeypatch.delattr(PeftAdapterMixin, "load_lora_adapter")
    assert why_not_lora(traced, student) == "UNet2DConditionModel of diffusers takes no LoRA"


def test_a_damaged_lora_is_refused(runs, tmp_path, monkeypatch):
    """The proof is of the file: a LoRA whose file holds other numbers than the student is not exported."""
    from stepdistill.exporting import lora

    honest = lora.get_peft_model_state_dict
    monkeypatch.setattr(
        lora, "get_peft_model_state_dict", lambda *a, **k: {key: 1.01 * v for key, v in honest(*a, **k).items()}
    )
    with pytest.raises(ExportError, match="differs from the training-time sampler"):
        export(runs("sd") / "run", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_auto_takes_linear_layers_and_the_blocks_convolutions():
    unet = tiny_sd().unet
    names = set(lora_targets(unet))
    assert {"time_embedding.linear_1", "down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv2"} <= names
    assert not {"conv_in", "conv_out"} & names
    assert lora_targets(unet, ["to_q"]) == [name for name, _ in unet.named_modules() if name.endswith(".to_q")]
    with pytest.raises(InputError, match=r"student\.targets: .* found 'to_qq'; did you mean 'to_q'\?"):
        lora_targets(unet, ["to_k", "to_qq"])


@pytest.mark.parametrize(("name", "fuse"), [("sd", True), ("flux", False)])
def test_beside_the_export_lies_one_file_with_a_workflow(name, fuse, runs, tmp_path):
    result = export(runs(name) / "run", tmp_path / "out", fuse=fuse, dtype="bf16", to="comfyui")
    place = result.folder / "comfyui"
    file = f"teacher_sfd_2step{'' if fuse else '_lora'}.safetensors"
    assert {path.name for path in place.iterdir()} == {file, "workflow.json"}
    weights = load_file(place / file)
    assert all(
        value.dtype == (torch.float32 if key.endswith("alpha") else torch.bfloat16) for key, value in weights.items()
    )
    component = getattr(DiffusionPipeline.from_pretrained(runs(name) / "teacher"), PIPELINES[name][1])
    if fuse:
        assert any(key.startswith("first_stage_model.decoder.") for key in weights)
        own = load_file(result.folder / PIPELINES[name][1] / "diffusion_pytorch_model.safetensors")
        found = sum(value.numel() for key, value in weights.items() if key.startswith("model.diffusion_model."))
        assert found == sum(value.numel() for value in own.values())
    else:
        layers = [key for key in weights if key.endswith(".lora_down.weight")]
        assert layers and all(key.startswith("lora_unet_") for key in weights)
        assert len(layers) <= len(lora_targets(component))
    loader = json.loads((place / "workflow.json").read_text())["1"]["inputs"]
    assert loader.get("ckpt_name", loader.get("unet_name")) == (file if fuse else "teacher.safetensors")
    card = (result.folder / "README.md").read_text()
    assert f"comfyui/{file}" in card and "comfyui/workflow.json" in card
