"""Pickled weights: refused with the way out, which makes a folder that is loaded like any other."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from pipeline.tiny import save_dit, tiny_dit, tiny_sd3
from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.pipeline.convert import convert
from stepdistill.pipeline.load import load_pipeline
from stepdistill.recipe import Teacher, load


def pickled(folder: Path, build=tiny_dit, **options) -> Path:
    """A folder with .bin weights, as DiT's on the hub."""
    build().save_pretrained(folder, safe_serialization=True, **options)
    for path in list(folder.rglob("*.safetensors*")):
        name = path.name.replace(".safetensors", ".bin")
        name = f"pytorch_{name}" if name.startswith("model") else name
        if path.suffix == ".json":
            text = path.read_text().replace(".safetensors", ".bin").replace('"model-', '"pytorch_model-')
            path.with_name(name).write_text(text)
        else:
            torch.save(load_file(path), path.with_name(name))
        path.unlink()
    return folder


@pytest.mark.parametrize(("build", "options"), [(tiny_dit, {}), (tiny_sd3, {"max_shard_size": "20KB"})])
def test_converted_weights_are_the_same(tmp_path, build, options, capsys):
    folder = pickled(tmp_path / "pickled", build, **options)
    assert cli.run(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert "transformer/diffusion_pytorch_model" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.bin*"))
    expected, found = build(), load_pipeline(tmp_path / "out")
    for name, network in expected.components.items():
        if isinstance(network, torch.nn.Module):
            state = getattr(found, name).state_dict()
            assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_a_recipe_with_pickles_is_refused_with_the_way_out_before_anything_is_loaded(tmp_path):
    folder = pickled(tmp_path / "pickled")
    said = r"teacher\.pipeline: .*found only pickled ones \(\.bin\) in transformer, vae; .*stepdistill convert"
    with pytest.raises(InputError, match=said):
        load("quickstart", [f"teacher.pipeline={folder}"])
    with pytest.raises(InputError, match="stepdistill convert"):
        load_pipeline(folder)


def test_a_hub_id_is_converted_at_the_revision_that_was_asked_for(tmp_path, monkeypatch):
    folder, asked = pickled(tmp_path / "pickled"), []

    def download(name, revision=None, **_):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr("stepdistill.pipeline.convert.snapshot_download", download)
    assert cli.run(["convert", "owner/name", str(tmp_path / "out"), "--revision", "refs/pr/1"]) == 0
    assert asked == [("owner/name", "refs/pr/1")] and (tmp_path / "out" / "model_index.json").is_file()


def test_pickles_that_are_not_needed_are_left_out_and_named(tmp_path):
    folder = tmp_path / "both"
    save_dit(tiny_dit(), folder)
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    (folder / "whole.ckpt").write_bytes(b"never read")
    (folder / "notes.md").write_text("kept")
    said = convert(folder, tmp_path / "out")
    assert [line.split()[0] for line in said] == ["vae/diffusion_pytorch_model.bin", "whole.ckpt"]
    assert (tmp_path / "out" / "notes.md").read_text() == "kept"
    load_pipeline(tmp_path / "out")


def test_shared_tensors_and_views_are_written_apart(tmp_path):
    folder = tmp_path / "shared"
    save_dit(tiny_dit(), folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    torch.save(weights | {"again": weights["decoder.conv_in.weight"]}, file.with_suffix(".bin"))
    file.unlink()
    convert(folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "vae" / file.name)
    assert torch.equal(found["again"], found["decoder.conv_in.weight"])


def test_what_cannot_be_converted_is_one_line(tmp_path):
    folder = pickled(tmp_path / "pickled")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="expected a folder that does not exist yet"):
        convert(folder, tmp_path / "there")
    torch.save({"step": 3}, folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=r"vae/diffusion_pytorch_model\.bin: expected a dictionary of tensors"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_variants_are_asked_for_by_name(tmp_path):
    tiny_dit().to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    place = f"teacher.pipeline={tmp_path / 'half'}"
    expected = r"teacher\.variant: expected 'fp16', the only weights that transformer has, found null"
    with pytest.raises(InputError, match=expected):
        load("quickstart", [place])
    with pytest.raises(InputError, match=expected):
        load_pipeline(tmp_path / "half")
    with pytest.raises(InputError, match=r"teacher\.variant: expected 'fp16', found 'fp61'"):
        load("quickstart", [place, "teacher.variant=fp61"])
    found = load_pipeline(Teacher(pipeline=str(tmp_path / "half"), variant="fp16"))
    assert found.transformer.dtype == torch.float32
    stock = DiffusionPipeline.from_pretrained(tmp_path / "half", variant="fp16", use_safetensors=True)
    expected = stock.transformer.state_dict()
    weights = found.transformer.state_dict()
    assert all(torch.equal(value.float(), expected[name].float()) for name, value in weights.items())


def test_without_a_network_the_message_says_so(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: asked.append("again"))
    with pytest.raises(
        InputError, match=r"there is a folder models here, without typo.*cannot be reached \("
    ) as caught:
        load_pipeline("models/typo")
    assert not asked  # each question to a hub that does not answer takes half a minute
    with pytest.raises(InputError, match="expected a run, found no such folder"):
        load_pipeline("runs/typo")
    assert "local_files_only" not in str(caught.value) and "stacktrace" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["vae/diffusion_pytorch_model.bin"], "found only pickled ones .* in vae; .*stepdistill convert"),
        (["unet/diffusion_pytorch_model.fp16.safetensors"], r"teacher\.variant: expected 'fp16'"),
    ],
)
def test_what_a_hub_repository_lacks_is_read_off_its_list_of_files(monkeypatch, files, said):
    def refuse(*_, **__):
        raise OSError("Could not find the necessary safetensors weights")

    monkeypatch.setattr("stepdistill.pipeline.hub.unreachable", lambda: None)
    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    monkeypatch.setattr("stepdistill.pipeline.hub.HfApi.list_repo_files", lambda *_, **__: files)
    with pytest.raises(InputError, match=said):
        load_pipeline("owner/name")
