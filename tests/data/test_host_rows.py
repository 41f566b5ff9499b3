"""Conditions and latents wait in the host's memory, once; the device has a chunk while they are made, then a batch."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from pipeline.zoo import ZOO
from stepdistill.data.host_rows import HostRows
from stepdistill.diffusion.denoiser import joined
from stepdistill.pipeline import conditioning
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.latents import encode_images
from stepdistill.pipeline.trace import trace
from stepdistill.recipe import load
from stepdistill.recipe.memory import LiveBytes
from stepdistill.training.session import build

PROMPTS = ["rain", "a red shoe", "two grey birds on a long wire", "a", "snow on the roof"]


def test_rows_are_copies_padded_to_the_longest():
    kept, doubled = HostRows(3), torch.arange(12.0).reshape(2, 3, 2)
    kept.write(0, {"text": doubled[:1], "number": torch.tensor([7])})
    kept.write(1, {"text": torch.ones(1, 4, 2), "number": torch.tensor([8])})
    kept.write(2, {"text": torch.ones(1, 1, 2), "number": torch.tensor([9])})
    assert kept.tensors["text"].shape == (3, 4, 2) and kept.tensors["number"].tolist() == [7, 8, 9]
    assert torch.equal(kept.tensors["text"][0], torch.tensor([[0, 1], [2, 3], [4, 5], [0, 0]]).float())
    assert torch.equal(kept.tensors["text"][2].sum(1), torch.tensor([2.0, 0, 0, 0]))
    assert kept.tensors["text"].untyped_storage().data_ptr() != doubled.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["sd", "sd3", "qwen-image", "z-image"])
def test_the_rows_are_those_of_the_chunks(name, monkeypatch):
    """Whatever their lengths, they are padded as one batch of all of them would be."""
    for name_of in ("CHUNK", "FEW"):
        monkeypatch.setattr(conditioning, name_of, 2)
    traced = trace(ZOO[name].build(), ZOO[name].arguments)
    parts = [conditioning.caught(traced, PROMPTS[start : start + 2], {}) for start in range(0, 5, 2)]
    expected = joined([*(cond for cond, _ in parts), {key: rows[:1] for key, rows in parts[0][1].items()}])
    found = conditioning.encode(traced, PROMPTS)
    for key, rows in expected.items():
        assert torch.equal(found.cond[key], rows[:5]), key
        assert torch.equal(found.null[key], rows[5:]), key


def test_encoding_keeps_one_copy(monkeypatch):
    """A chunk's rows are halves of a doubled batch, which ends with the chunk."""
    traced, row, count = trace(ZOO["sd"].build()), (77, 64), 1280

    def caught(_trace, entries, _pictures):
        both = torch.randn(2 * len(entries), *row)
        return {"text": both[: len(entries)]}, {"text": both[len(entries) :]}

    monkeypatch.setattr(conditioning, "caught", caught)
    with LiveBytes([]) as live:
        found = conditioning.encode(traced, [f"prompt {i}" for i in range(count)])
    stored = found.cond["text"].nbytes
    assert stored == count * 77 * 64 * 4
    assert live.peak < 1.2 * stored


def test_latents_keep_one_copy():
    traced = trace(ZOO["sd"].build(), {"height": 16, "width": 16})
    pictures = torch.zeros(3000, 3, 16, 16, dtype=torch.uint8)
    with LiveBytes([]) as live:
        latents = encode_images(traced, pictures)
    chunk = 250 * 8 * 16 * 16 * 4  # one layer's activations of the images that are encoded at once
    assert live.peak < 1.2 * latents.nbytes + 8 * chunk


def test_only_batches_are_on_the_device(tmp_path):
    save_pipeline(ZOO["sd"].build(), tmp_path / "teacher")
    for caption in ("rain", "snow"):
        (tmp_path / "real" / caption).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "real" / caption / "0.png")
    recipe = {
        "teacher": {"pipeline": str(tmp_path / "teacher"), "guidance": {"scale": 2.0}},
        "student": {"steps": 2, "train": "lora", "rank": 2},
        "data": {"images": str(tmp_path / "real"), "conditions": ["rain", "snow"]},
        "method": {"name": "lcm"},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
    }
    session = build(load(recipe), torch.device("cpu"))
    device = torch.device("meta")
    session = replace(session, device=device, conditioning=session.conditioning.to(device))
    batch, stored = session.batch(0, 0, 2), session.conditioning.cond["encoder_hidden_states"]
    assert (session.rows[0][:1].device.type, stored.device.type) == ("cpu", "cpu")
    moved = [batch.latents, *batch.cond.values(), *batch.null.values()]
    assert all(rows.device.type == "meta" and len(rows) == 2 for rows in moved)
