"""Teachers of several files: LoRAs, another autoencoder and textual inversions, from the recipe to the export."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from pipeline import checkpoints, tiny
from pipeline.zoo import wan
from short_samples import short_report
from stepdistill import cli
from stepdistill.demo.content import load_demo
from stepdistill.errors import InputError
from stepdistill.exporting.lora import kohya_keys
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.open import open_teacher
from stepdistill.recipe import Teacher, load

SIZE = {"height": 16, "width": 16}


UNET = {"unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"}


def lora_file(
    folder: Path, form: str = "diffusers", seed: int = 0, targets: dict[str, str] = UNET
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A LoRA on layers of the pipeline's networks, and what it adds to each of them at scale 1."""
    pipeline, adds, states = tiny.tiny_sd(), {}, {}
    for part, target in targets.items():
        network = getattr(pipeline, part)
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=target.split("|")), network)
        tiny.redraw(network, seed)
        states[part] = {name: value.detach() for name, value in get_peft_model_state_dict(network).items()}
        for name, up in states[part].items():
            if "lora_B" in name:
                down = states[part][name.replace("lora_B", "lora_A")]
                adds[f"{part}.{name.replace('.lora_B.weight', '.weight')}"] = up @ down
    file = folder / f"{form}-{seed}.safetensors"
    if form == "kohya":
        weights = kohya_keys(states["unet"])
        for name, value in states.get("text_encoder", {}).items():
            layer = name.rpartition(".lora_")[0].removeprefix("text_model.").replace(".", "_")
            # Its alpha is half of the rank: twice as much is in the file.
            kind = "down" if "lora_A" in name else "up"
            weights[f"lora_te_text_model_{layer}.lora_{kind}.weight"] = value * (1 if kind == "down" else 2)
            weights[f"lora_te_text_model_{layer}.alpha"] = torch.tensor(1.0)
        save_file({name: value.contiguous() for name, value in weights.items()}, file)
    elif form == "peft":
        save_file(
            {f"{part}.{name}": value.contiguous() for part in states for name, value in states[part].items()}, file
        )
    else:
        layers = {f"{part}_lora_layers": states[part] for part in states}
        StableDiffusionPipeline.save_lora_weights(folder, weight_name=file.name, **layers)
    return file, adds


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("parts")
    save_pipeline(tiny.tiny_sd(), folder / "teacher")
    vae = tiny.redraw(tiny.tiny_vae(levels=2, sample_size=16), 11)
    vae.save_pretrained(folder / "vae")
    save_file({"clip": torch.full((2, 16), 0.5)}, folder / "own.safetensors")
    return SimpleNamespace(folder=folder, teacher=str(folder / "teacher"), vae=vae)


def layers(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def plain(name: str) -> str:
    return name.replace("text_model.", "")


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_a_lora_is_in_the_weights_at_its_scale(form, place, tmp_path):
    file, adds = lora_file(tmp_path, form)
    before = layers(load_pipeline(place.teacher))
    after = layers(load_pipeline(Teacher(pipeline=place.teacher, loras=[{"file": str(file), "scale": 0.5}])))
    assert before.keys() == after.keys()
    changed = {plain(name) for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {plain(name) for name in adds} and changed
    for name, value in adds.items():
        (key,) = [one for one in after if plain(one) == plain(name)]
        torch.testing.assert_close(after[key] - before[key], 0.5 * value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_a_lora_may_be_on_the_text_encoder_too(form, place, tmp_path):
    file, adds = lora_file(tmp_path, form, targets=UNET | {"text_encoder": "q_proj|k_proj|v_proj|out_proj|fc1"})
    before = layers(load_pipeline(place.teacher))
    after = layers(load_pipeline(Teacher(pipeline=place.teacher, loras=[str(file)])))
    changed = {name: value - before[name] for name, value in after.items() if not torch.equal(value, before[name])}
    assert {plain(name) for name in changed} == {plain(name) for name in adds} and len(changed) == 11
    expected = {plain(name): value for name, value in adds.items()}
    for name, value in changed.items():
        torch.testing.assert_close(value, expected[plain(name)], atol=1e-6, rtol=1e-4)


def test_a_lora_is_for_the_network_that_is_named(tmp_path):
    """Wan 2.2 has one for each of its networks, and files of both look alike."""
    pipeline = wan(boundary_ratio=0.875)
    save_pipeline(pipeline, tmp_path / "wan")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["blocks.0.attn1.to_q"]), pipeline.transformer)
    tiny.redraw(pipeline.transformer, 3)
    state = get_peft_model_state_dict(pipeline.transformer)
    save_file(
        {f"transformer.{name}": value.contiguous() for name, value in state.items()}, tmp_path / "low.safetensors"
    )
    before = layers(load_pipeline(str(tmp_path / "wan")))
    for stated, expected in ((None, "transformer"), ("transformer", "transformer"), ("transformer_2", "transformer_2")):
        lora = {"file": str(tmp_path / "low.safetensors"), "component": stated}
        after = layers(load_pipeline(Teacher(pipeline=str(tmp_path / "wan"), loras=[lora])))
        changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
        assert changed == [f"{expected}.blocks.0.attn1.to_q.weight"]
        up, down = (state[f"blocks.0.attn1.to_q.lora_{part}.weight"] for part in "BA")
        torch.testing.assert_close(after[changed[0]] - before[changed[0]], up @ down, atol=1e-5, rtol=1e-4)
    lora |= {"component": "transformer_3"}
    with pytest.raises(
        InputError, match=r"loras\.0\.component: expected transformer or transformer_2, found 'transformer_3'"
    ):
        load_pipeline(Teacher(pipeline=str(tmp_path / "wan"), loras=[lora]))


def test_loras_are_added_up_and_half_precision_does_not_lose_them(place, tmp_path):
    load_pipeline(place.teacher).to(torch.bfloat16).save_pretrained(tmp_path / "half", variant="bf16")
    files = [lora_file(tmp_path, seed=seed) for seed in (0, 1)]
    teacher = Teacher(pipeline=str(tmp_path / "half"), variant="bf16", loras=[str(file) for file, _ in files])
    before = layers(load_pipeline(Teacher(pipeline=str(tmp_path / "half"), variant="bf16")))
    found = load_pipeline(teacher)
    (name,) = files[0][1]
    added = layers(found)[name] - before[name]
    torch.testing.assert_close(added, files[0][1][name] + files[1][1][name], atol=1e-6, rtol=1e-4)
    (vae,) = (found.loaded_from[0] / "vae").glob("*.safetensors")
    assert {value.dtype for value in load_file(vae).values()} == {torch.bfloat16}


def test_a_lora_without_a_matching_layer_is_never_silent(place, tmp_path):
    name = "down_blocks.9.attentions.0.transformer_blocks.0.attn1.to_q"
    other = {f"unet.{name}.lora_A.weight": torch.ones(2, 8), f"unet.{name}.lora_B.weight": torch.ones(8, 2)}
    good = load_file(lora_file(tmp_path)[0])
    text = {f"text_encoder.{name}": value for name, value in {"x.lora_A.weight": torch.ones(2, 2)}.items()}
    for held in (other, good | other, {"a": torch.ones(1)}, text):
        save_file(held, tmp_path / "bad.safetensors")
        with pytest.raises(InputError, match=r"teacher\.loras\.0: .*bad\.safetensors"):
            load_pipeline(Teacher(pipeline=place.teacher, loras=[str(tmp_path / "bad.safetensors")]))


@pytest.mark.parametrize("form", ["folder", "pipeline", "file"])
def test_another_autoencoder_takes_the_place_of_the_own(form, place, tmp_path):
    where = {"folder": place.folder / "vae", "pipeline": tmp_path / "whole", "file": tmp_path / "vae.safetensors"}[form]
    if form == "pipeline":
        pipeline = tiny.tiny_sd()
        pipeline.register_modules(vae=place.vae)
        save_pipeline(pipeline, where)
    if form == "file":
        checkpoints.save(checkpoints.vae_names(place.vae), where)
    found = load_pipeline(Teacher(pipeline=place.teacher, vae=str(where)))
    expected = place.vae.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.vae.state_dict().items())
    assert torch.equal(found.unet.conv_in.weight, tiny.tiny_sd().unet.conv_in.weight)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_an_autoencoder_without_all_of_its_weights_is_refused(form, place, tmp_path):
    where = tmp_path / ("vae" if form == "folder" else "vae.safetensors")
    if form == "folder":
        shutil.copytree(place.folder / "vae", where)
        (file,) = where.glob("*.safetensors")
        kept = {name: value for name, value in load_file(file).items() if "mid_block" not in name}
        save_file(kept, file, {"format": "pt"})
    else:
        checkpoints.save(checkpoints.vae_names(place.vae), where, without="decoder.mid")
    with pytest.raises(InputError, match=r"AutoencoderKL.* are missing: \w+\.mid_block"):
        load_pipeline(Teacher(pipeline=place.teacher, vae=str(where)))


def test_an_autoencoder_of_other_latents_is_refused(place, tmp_path):
    tiny.tiny_vae(levels=2, latent_channels=3).save_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match=r"teacher\.vae: expected latents of 4 channels at 1/2 .*, found 3 at 1/2"):
        load_pipeline(Teacher(pipeline=place.teacher, vae=str(tmp_path / "vae")))


def test_a_textual_inversion_is_a_word_of_prompts(place, tmp_path):
    save_file({"emb_params": torch.full((1, 16), 0.25)}, tmp_path / "dog.safetensors")
    embeddings = [{"file": str(place.folder / "own.safetensors"), "token": "<own>"}, str(tmp_path / "dog.safetensors")]
    traced = open_teacher(Teacher(pipeline=place.teacher, embeddings=embeddings), arguments=SIZE)
    tokenizer, encoder = traced.pipeline.tokenizer, traced.pipeline.text_encoder
    rows = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(["<own>", "<own>_1", "dog"])]
    assert rows.mean(1).tolist() == [0.5, 0.5, 0.25]
    found = encode(traced, ["a <own>", "a"]).cond["encoder_hidden_states"]
    stock = tiny.tiny_sd()
    stock.load_textual_inversion({"own": torch.full((2, 16), 0.5)}, token="<own>")
    expected = stock.encode_prompt("a <own>", "cpu", 1, False)[0]
    torch.testing.assert_close(found[:1], expected)
    assert not torch.equal(found[0], found[1])


def test_sdxls_have_a_vector_for_each_encoder(tmp_path):
    save_pipeline(checkpoints.tiny_sdxl(), tmp_path / "teacher")
    save_file({"clip_l": torch.full((1, 16), 0.5), "clip_g": torch.full((1, 24), 0.25)}, tmp_path / "own.safetensors")
    embeddings = [{"file": str(tmp_path / "own.safetensors"), "token": "<own>"}]
    found = load_pipeline(Teacher(pipeline=str(tmp_path / "teacher"), embeddings=embeddings))
    for end, value in (("", 0.5), ("_2", 0.25)):
        number = getattr(found, f"tokenizer{end}").convert_tokens_to_ids("<own>")
        assert getattr(found, f"text_encoder{end}").get_input_embeddings().weight[number].eq(value).all()


def test_what_does_not_fit_is_one_line(place, tmp_path):
    save_file({"own": torch.ones(1, 7)}, tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match=r"teacher\.embeddings\.0: .*narrow\.safetensors cannot be loaded"):
        load_pipeline(Teacher(pipeline=place.teacher, embeddings=[str(tmp_path / "narrow.safetensors")]))
    with pytest.raises(InputError, match=r"teacher\.loras\.0: DiTPipeline takes no LoRA"):
        load_pipeline(Teacher(pipeline="fashion-dit", loras=[str(tmp_path / "narrow.safetensors")]))
    with pytest.raises(InputError, match=r"teacher\.embeddings\.0: DiTPipeline takes no textual inversions"):
        load_pipeline(Teacher(pipeline="fashion-dit", embeddings=[str(tmp_path / "narrow.safetensors")]))


@pytest.mark.parametrize("key", ["loras.0.file", "embeddings.0.file", "vae"])
@pytest.mark.parametrize("name", ["none.safetensors", "a.pt"])
def test_a_file_that_is_not_there_or_a_pickle_is_refused_by_its_key(key, name, place, tmp_path):
    (tmp_path / "a.pt").touch()
    value = str(tmp_path / name) if key == "vae" else [{"file": str(tmp_path / name)}]
    teacher = {"pipeline": place.teacher, key.partition(".")[0]: value}
    with pytest.raises(InputError, match=rf"teacher\.{key}: expected a .*\.safetensors"):
        load(recipe(teacher, tmp_path / "run"))


def test_other_files_are_another_teacher(place, tmp_path):
    """Two inversions of one size leave shapes, configs and most weights as they are."""
    made = []
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        save_file({"own": torch.randn(1, 16, generator=generator)}, tmp_path / "own.safetensors")
        made.append(load_pipeline(Teacher(pipeline=place.teacher, embeddings=[str(tmp_path / "own.safetensors")])))
    assert made[0].made_of != made[1].made_of and made[0].loaded_from != made[1].loaded_from
    again = load_pipeline(Teacher(pipeline=place.teacher, embeddings=[str(tmp_path / "own.safetensors")]))
    assert again.made_of == made[1].made_of and again.loaded_from == made[1].loaded_from


def recipe(teacher: dict, out: Path, **train: int) -> dict:
    return {
        "teacher": {"arguments": SIZE} | teacher,
        "student": {"steps": 2, "train": "lora", "rank": 2},
        "data": {"conditions": ["a <own>", "rain"]},
        "method": {"name": "sfd", "substeps": 3},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-2, "preview_every": 100, "tracker": "none"} | train,
        "report": {"samples": 0},
        "output": str(out),
    }


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """A run of a teacher of five files, as the command line makes it."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints.save_sd(tiny.tiny_sd(), folder / "tiny.safetensors")
    shutil.copytree(place.teacher, folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    teacher = {"pipeline": str(folder / "tiny.safetensors"), "config": str(folder / "config")}
    teacher |= {"loras": [{"file": str(lora_file(folder)[0]), "scale": 0.5}], "vae": str(place.folder / "vae")}
    teacher |= {"embeddings": [{"file": shutil.copy(place.folder / "own.safetensors", folder), "token": "<own>"}]}
    stated = recipe(teacher, folder / "run") | {"report": {"samples": 16, "steps": [2], "solvers": False}}
    (folder / "recipe.yaml").write_text(json.dumps(stated))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepdistill.run.check_conventions", lambda session: None)
        short_report(patch)
        assert cli.run(["train", str(folder / "recipe.yaml")]) == 0
    return folder


def test_the_export_is_a_stock_folder_with_all_that_went_in(run, place):
    export = run / "run" / "export"
    stock = DiffusionPipeline.from_pretrained(export, use_safetensors=True)
    assert "<own>" in stock.tokenizer.get_vocab()
    expected = place.vae.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in stock.vae.state_dict().items())
    adds = lora_file(run)[1]
    ((name, value),) = adds.items()
    # The student's own LoRA on top of it has learned for two steps.
    added = layers(stock)[name] - layers(tiny.tiny_sd())[name]
    assert torch.nn.functional.cosine_similarity(added.flatten(), value.flatten(), dim=0) > 0.9
    card = (export / "README.md").read_text()
    for file in ("tiny.safetensors", "diffusers-0.safetensors (scale 0.5)", "own.safetensors (`<own>`)", "vae"):
        assert file in card


def test_its_report_has_a_row_of_that_teacher(run):
    rows = json.loads((run / "run" / "report" / "report.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["teacher", "student"] and rows[0]["name"].startswith("tiny.safetensors")


def test_it_exports_again(run, tmp_path):
    assert cli.run(["export", str(run / "run"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_the_demo_draws_with_the_same_teacher(run, monkeypatch):
    monkeypatch.setattr("stepdistill.demo.content.TEACHER_STEPS", 2)
    shown = load_demo(run / "run")
    teacher, student = shown.samplers[0].trace.pipeline, shown.samplers[-1].trace.pipeline
    assert teacher.made_of["sha256"].keys() >= {"pipeline", "loras.0", "embeddings.0", "vae/config.json"}
    assert torch.equal(teacher.vae.decoder.conv_in.weight, student.vae.decoder.conv_in.weight)


def test_it_is_planned_without_its_weights(run, capsys, monkeypatch):
    monkeypatch.setattr("stepdistill.pipeline.load.assembled", lambda *_: pytest.fail("weights were loaded"))
    assert cli.run(["plan", str(run / "recipe.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_it_resumes_with_the_same_files_only(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run"
    text = (folder / "recipe.yaml").read_text().replace(str(run), str(folder))
    (folder / "recipe.yaml").write_text(text)
    again = folder / "run" / "recipe.yaml"
    again.write_text(again.read_text().replace(str(run), str(folder)))
    assert cli.run(["train", str(folder / "recipe.yaml"), "train.steps=3", "report.samples=0"]) == 0
    lora_file(folder, seed=1)
    shutil.move(folder / "diffusers-1.safetensors", folder / "diffusers-0.safetensors")
    capsys.readouterr()
    assert cli.run(["train", str(folder / "recipe.yaml"), "train.steps=4", "report.samples=0"]) == 2
    assert "loras.0" in capsys.readouterr().err
