"""Exports of whole pipelines: what was not trained is the teacher's, byte for byte, for every reader of the teacher."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from safetensors.torch import load_file, save_file

from pipeline.tiny import tiny_sd, tiny_sd3
from stepdistill.exporting.copied import save_student
from stepdistill.exporting.export import export
from stepdistill.pipeline.load import load_pipeline
from stepdistill.recipe import Teacher
from stepdistill.run import train

OLDER = "STEPDISTILL_OLDER_PYTHON"
"""A Python with earlier diffusers and transformers, see test_an_earlier_stack_runs_the_export."""


def as_on_the_hub(folder: Path) -> Path:
    """A teacher's folder as earlier versions wrote it: CLIP's tokenizer in two files, keys with text_model., notes."""
    tiny_sd().save_pretrained(folder)
    tokenizer = folder / "tokenizer"
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 40, "do_lower_case": True}
    settings |= {"unk_token": "<|endoftext|>", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|endoftext|>"}))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_diffusers_version": "0.19.0"}, indent=4))
    encoder = folder / "text_encoder"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load(encoder).items()}
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})
    (encoder / "pytorch_model.bin").write_bytes(b"not read")
    (encoder / "notes.txt").write_text("read before use")
    return folder


def load(folder: Path) -> dict:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def recipe_of(teacher: Path, out: Path) -> dict:
    return {
        "teacher": {"pipeline": str(teacher)},
        "student": {"steps": 2, "train": "lora", "rank": 2},
        "export": {"fuse": True},
        "data": {"conditions": ["a red shoe", "rain"]},
        "method": {"name": "sfd", "substeps": 3},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-2, "preview_every": 100, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(out),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("copied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepdistill.run.check_conventions", lambda session: None)
        patch.setattr("stepdistill.run.export_trained", lambda *_: None)
        train(recipe_of(as_on_the_hub(place / "teacher"), place / "run"))
    return place


def test_no_configuration_names_a_folder_of_this_machine(run, tmp_path):
    encoder = run / "teacher" / "text_encoder" / "config.json"  # as it lies in the teacher's folder, saved elsewhere
    was = encoder.read_text()
    encoder.write_text(json.dumps(json.loads(was) | {"_name_or_path": "/home/somebody/mine"}))
    try:
        out = export(run / "run", tmp_path / "out").folder
    finally:
        encoder.write_text(was)
    texts = {path.relative_to(out): path.read_text() for path in out.glob("*/*.json")}
    assert not [path for path, text in texts.items() if str(run) in text or "/home/somebody" in text]
    assert "hidden_size" in texts[Path("text_encoder/config.json")]


def test_what_was_not_trained_is_copied_to_the_byte(run):
    shutil.copytree(run / "teacher" / "vae", run / "teacher" / "vae_1")  # as diffusers keeps a second ControlNet
    result = export(run / "run", run / "out")
    assert result.form == "pipeline" and result.max_error <= 1e-5
    teacher, out = run / "teacher", result.folder
    for name in ("vae", "vae_1", "text_encoder", "tokenizer"):
        kept = {path.name for path in (teacher / name).iterdir()} - {"pytorch_model.bin"}
        assert kept == {path.name for path in (out / name).iterdir()}
        assert all((out / name / file).read_bytes() == (teacher / name / file).read_bytes() for file in kept)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    before, after = (json.loads((folder / "model_index.json").read_text()) for folder in (teacher, out))
    assert before | {"scheduler": after["scheduler"]} == after
    assert ".to(torch.float32)" not in (out / "README.md").read_text()


@pytest.mark.parametrize("links", [False, True])
def test_variants_get_plain_names_and_stay_what_they_are(tmp_path, links):
    """Several files of a variant, from a folder of files or of links as in the hub's cache."""
    plain = tiny_sd3()
    plain.to(torch.float16).save_pretrained(tmp_path / "teacher", variant="fp16", max_shard_size="20KB")
    if links:
        (tmp_path / "teacher").rename(tmp_path / "blobs")
        for path in [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]:
            link = tmp_path / "teacher" / path.relative_to(tmp_path / "blobs")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    pipeline = load_pipeline(Teacher(pipeline=str(tmp_path / "teacher"), variant="fp16"))
    pipeline.register_modules(scheduler=LCMScheduler())
    save_student(pipeline, ["transformer"], tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if "fp16" in path.name or path.is_symlink()]
    again = DiffusionPipeline.from_pretrained(tmp_path / "out", use_safetensors=True).to(torch.float32)
    assert type(again.scheduler).__name__ == "LCMScheduler"
    for name in ("vae", "transformer", "text_encoder", "text_encoder_3"):
        expected = getattr(pipeline, name).state_dict()
        found = getattr(again, name).state_dict()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_the_card_of_copied_half_precision_loads_it_as_float32(run, tmp_path):
    """Some versions of transformers load half-precision files as they are, beside a float32 student."""
    teacher = Path(shutil.copytree(run / "teacher", tmp_path / "teacher"))
    shutil.rmtree(teacher / "text_encoder")
    pipeline = load_pipeline(run / "teacher")
    pipeline.text_encoder.half().save_pretrained(teacher / "text_encoder")
    shutil.copytree(run / "run", tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(run / "teacher"), str(teacher)))
    folder = export(tmp_path / "run", tmp_path / "out").folder
    card = (folder / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("PATH_OF_THIS_FOLDER", str(folder))
    assert ".to(torch.float32)" in code
    names: dict = {}
    exec(code, names)
    assert len(names["images"]) == 1


def test_a_pipeline_without_a_folder_is_written_whole(tmp_path):
    save_student(tiny_sd(), ["unet"], tmp_path / "out")
    load_pipeline(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(OLDER not in os.environ, reason=f"{OLDER} names no Python with earlier libraries")
def test_an_earlier_stack_runs_the_export(run, tmp_path):
    """With diffusers 0.35.2 and transformers 4.57.3 in an environment of their own:

    STEPDISTILL_OLDER_PYTHON=older/bin/python python -m pytest -m slow tests/exporting/test_copied.py
    """
    folder = export(run / "run", tmp_path / "out").folder
    program = f"""
import diffusers, transformers, torch
pipeline = diffusers.DiffusionPipeline.from_pretrained({str(folder)!r}, use_safetensors=True)
torch.save(pipeline.text_encoder.get_input_embeddings().weight.detach(), {str(tmp_path / "rows.pt")!r})
images = pipeline("a red shoe", num_inference_steps=2, guidance_scale=1.0, height=16, width=16).images
print(diffusers.__version__, transformers.__version__, len(images))
"""
    done = subprocess.run([os.environ[OLDER], "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "1"
    rows = torch.load(tmp_path / "rows.pt", weights_only=True)
    assert torch.equal(rows, load_pipeline(run / "teacher").text_encoder.get_input_embeddings().weight)
