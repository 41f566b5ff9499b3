"""The command that encodes ahead of a run, and the run that finds everything there."""

import errno
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pipeline.zoo import ZOO
from stepdistill.cli import run
from stepdistill.data import picture, shards
from stepdistill.data.buckets import Bucket
from stepdistill.data.decoding import Medium
from stepdistill.data.shards import Share
from stepdistill.pipeline import conditioning, latents
from stepdistill.pipeline import unread as unread_module
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.recipe import load
from stepdistill.training import real_images
from stepdistill.training.session import build


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    """Real images with captions, one of which cannot be read."""
    place = tmp_path_factory.mktemp("encode")
    save_pipeline(ZOO["sd"].build(), place / "teacher")
    (place / "real").mkdir()
    for number in range(12):
        Image.new("RGB", (16, 20), (20 * number, 9, 90)).save(place / "real" / f"{number:02}.png")
        (place / "real" / f"{number:02}.txt").write_text(["rain", "a red shoe", "snow"][number % 3])
    (place / "real" / "03.png").write_bytes(b"none")
    return {
        "teacher": {"pipeline": str(place / "teacher"), "guidance": {"scale": 2.0}},
        "student": {"steps": 2, "train": "lora", "rank": 2},
        "data": {"images": str(place / "real"), "conditions": "captions"},
        "method": {"name": "lcm"},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3},
    }


@pytest.fixture
def file(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return tmp_path / "recipe.yaml"


def few_at_once(monkeypatch) -> None:
    """Shards of a few images."""
    monkeypatch.setattr(shards, "SHARD", 3000)
    monkeypatch.setattr(latents, "_together", lambda _: 2)


def files(cache) -> dict[str, bytes]:
    """All of a cache but what is noted beside the rows."""
    found = {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.endswith("unread.json")}


def test_a_run_finds_what_was_encoded_ahead(file, recipe, tmp_path, monkeypatch, capsys):
    assert run(["encode", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"]["rows"] == 11 and facts["conditions"]["rows"] == 3
    before = files(tmp_path / "cache")
    assert {name.partition("-")[0] for name in before} == {"conditions", "latents", "traces"}
    for place, name in ((conditioning, "caught"), (picture, "read"), (latents, "stream"), (unread_module, "unread")):
        monkeypatch.setattr(place, name, None)
    session = build(load(recipe), torch.device("cpu"), tmp_path / "cache")
    assert [session.conditioning.entries[i] for i in session.rows[1][:4].tolist()] == [
        "rain",
        "a red shoe",
        "snow",
        "a red shoe",
    ]
    assert "1 of 12 samples rejected (1 unreadable image)" in capsys.readouterr().err
    assert run(["encode", str(file)]) == 0
    assert files(tmp_path / "cache") == before and "11 rows, " in capsys.readouterr().out


def test_a_random_part_needs_no_buckets(recipe, monkeypatch):
    given = []
    monkeypatch.setattr(real_images, "medium", lambda _: Medium((3, 16, 24)))
    monkeypatch.setattr(real_images, "captions_of", lambda _: ([], []))
    monkeypatch.setattr(real_images, "store_images", lambda *parts: given.append(parts[5]))
    for crop in ("center", "random"):
        changed = load(recipe | {"data": recipe["data"] | {"crop": crop}, "train": recipe["train"] | {"seed": 7}})
        real_images.real_images(changed, SimpleNamespace(pictures=[]), None, None, False)
    assert given == [None, Bucket(((16, 24),), 0, 7)]


def test_two_processes_make_the_store_of_one(recipe, tmp_path, monkeypatch):
    few_at_once(monkeypatch)
    loaded = load(recipe)
    traced = build(loaded, torch.device("cpu"), tmp_path / "one").trace
    (whole,) = (tmp_path / "one").glob("latents-*")
    content, folder = latents._content(traced, loaded.data, Medium((3, 16, 16)), None), tmp_path / "two" / whole.name
    for rank in (1, 0):
        shards.fill(folder, whole.name.removeprefix("latents-"), content, Share(rank, 2))
    assert len(list(folder.iterdir())) > 2
    shards.finish(folder, whole.name.removeprefix("latents-"), content)
    assert files(folder) == files(whole)


def test_a_full_disk_is_one_line_and_keeps_what_is_whole(file, tmp_path, monkeypatch, capsys):
    few_at_once(monkeypatch)
    whole, count = shards.publish, []

    def publish(draft, path):
        count.append(path)
        if len(count) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(draft))
        whole(draft, path)

    monkeypatch.setattr(shards, "publish", publish)
    assert run(["encode", str(file)]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in line and "the shards so far are kept" in line
    left = files(tmp_path / "cache")
    assert len([name for name in left if not name.startswith("traces")]) == 2
    monkeypatch.setattr(shards, "publish", whole)
    assert run(["encode", str(file)]) == 0
    assert left.items() <= files(tmp_path / "cache").items()
