"""Every form of a source gives the same captions and the same pixels, and a bad one is counted, not trusted."""

import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.loaded import loaded
from data.made import CAPTIONS, COLOURS, folder, png, shard
from stepdistill.data import images
from stepdistill.data.sources import count, form, samples
from stepdistill.errors import InputError
from stepdistill.recipe import Data

WITH_KEYS = ["jsonl", "shards", "saved", "parquet", "arrow"]


@pytest.mark.parametrize("source", ["folder", *WITH_KEYS], indirect=True)
def test_every_source_gives_the_same(source):
    data = Data(images=source)
    pictures, captions, _ = loaded(data, 3, 4)
    assert captions == CAPTIONS == images.captions(data)
    assert torch.equal(pictures, torch.tensor(COLOURS, dtype=torch.uint8)[:, :, None, None].expand(3, 3, 4, 4))
    assert images.captions(Data(conditions=source), "conditions") == CAPTIONS
    assert images.captions(Data(images=source, limit=2)) == CAPTIONS[:2]
    assert (count(source, None), count(source, 2)) == (3, 2)


@pytest.mark.parametrize(
    ("source", "key"),
    [("jsonl", "file_name"), ("shards", "png"), ("saved", "image"), ("parquet", "image")],
    indirect=["source"],
)
def test_any_picture_of_a_sample_can_be_an_argument(source, key):
    captions, pictures = images.requests(Data(images=source, arguments={"image": key}))
    assert captions == CAPTIONS
    assert [picture["image"].getpixel((0, 0)) for picture in pictures] == COLOURS
    with pytest.raises(InputError, match=r"3 of 3 samples rejected \(3 no picture depth\)"):
        images.requests(Data(images=source, arguments={"image": "depth"}))


@pytest.mark.parametrize("source", WITH_KEYS, indirect=True)
def test_a_key_that_is_not_there(source):
    with pytest.raises(InputError, match="titel"):
        images.captions(Data(images=source, caption_key="titel"))


def test_a_stated_key_wins(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "short", "long": "much longer"}\n')
    assert images.captions(Data(conditions=str(file)), "conditions") == ["short"]
    assert images.captions(Data(conditions=str(file), caption_key="long"), "conditions") == ["much longer"]


def test_a_class_number_of_a_shard_is_a_condition(tmp_path):
    file = shard(tmp_path / "a.tar", [("0.cls", b"7\n"), ("0.png", png(COLOURS[0]))])
    assert images.captions(Data(images=file)) == ["7"]


BAD_LINES = {
    "not JSON": '{"text": ',
    "not a JSON object": '["a"]',
    "no key caption or text or prompt: it has title": '{"title": "a"}',
    "text is list, expected text": '{"text": ["a"]}',
    "text is NoneType, expected text": '{"text": null}',
    "empty caption": '{"text": "  "}',
}


@pytest.mark.parametrize("caption", ["rain", "rain\nand sun"])
def test_captions_are_read_once(caption, tmp_path, capsys, monkeypatch):
    """A later start takes them from the cache, and says again what was rejected."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("a shoe", caption, "a shoe", None)))
    data = Data(conditions=str(file), max_rejected=0.5)
    first, _ = images.conditions(data, cache=tmp_path)
    assert (Path(first).read_text().splitlines() if isinstance(first, str) else first) == ["a shoe", caption]
    said = capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(images, "samples", None)
        assert images.conditions(data, cache=tmp_path)[0] == first
    assert capsys.readouterr().err.partition(", the first")[0] == said.partition(", the first")[0] != ""
    file.write_text('{"text": "another"}')
    assert images.conditions(data, cache=tmp_path)[0] != first


@pytest.mark.parametrize("reason", BAD_LINES)
def test_bad_lines_are_counted_and_said_once(reason, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "good"}\n' + BAD_LINES[reason] + "\n")
    data = Data(conditions=str(file), max_rejected=0.5)
    assert images.captions(data, "conditions") == ["good"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"data.conditions: 1 of 2 samples rejected (1 {reason.partition(':')[0]}), the first: {file}:2 (" in said
    assert reason in said
    with pytest.raises(InputError, match=r"1 of 2 samples rejected .*; more than data\.max_rejected, 0\.1$") as caught:
        images.captions(Data(conditions=str(file)), "conditions")
    assert "\n" not in str(caught.value)


def test_bad_images_are_rejected_with_their_reason(tmp_path, capsys):
    folder(tmp_path)
    (tmp_path / "3.png").write_bytes(png(COLOURS[0])[:40])
    (tmp_path / "3.txt").write_text("cut short")
    (tmp_path / "4.png").write_bytes(png(COLOURS[0]))
    (tmp_path / "5.jpg").write_text("no picture")
    (tmp_path / "5.txt").write_bytes(b"\xff\xfe\x00")
    pictures, captions, _ = loaded(Data(images=str(tmp_path), max_rejected=0.5), 3, 4)
    assert len(pictures) == 3 and captions == CAPTIONS
    said = capsys.readouterr().err
    assert "3 of 6 samples rejected (1 unreadable image, 1 no caption, neither" in said and "3.png" in said
    with pytest.raises(InputError, match=r"data\.images: 3 of 6 samples rejected"):
        loaded(Data(images=str(tmp_path)), 3, 4)


def test_prompts_are_no_images(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "good"}\n')
    with pytest.raises(InputError, match=r"1 no image.*prompts\.jsonl:1"):
        loaded(Data(images=str(file)), 3, 4)


def test_a_wrong_key_stops_long_before_the_end(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"title": "a"}\n' * 5000)
    with pytest.raises(InputError, match=r"100 of 100 samples rejected \(100 no key"):
        images.captions(Data(conditions=str(file)), "conditions")


def link(name, target) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def test_members_that_lead_out_of_a_shard_are_refused(tmp_path, capsys):
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    file = shard(
        inside / "a.tar",
        [
            ("../up.txt", b"up"),
            ("/absolute.txt", b"absolute"),
            ("a/../../b.txt", b"b"),
            ("c.txt", link("c.txt", "../secret.txt")),
            ("good.txt", b"good"),
        ],
    )
    before = sorted(tmp_path.rglob("*"))
    assert images.captions(Data(conditions=file, max_rejected=0.9), "conditions") == ["good"]
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().err
    assert "4 of 5 samples rejected (4 refused)" in said and "'../up.txt' (refused: a name that leads out" in said


def test_a_shard_that_is_cut_short_is_named(tmp_path):
    whole = shard(tmp_path / "a.tar", [("0.txt", b"a"), ("1.txt", b"b"), ("1.png", png(COLOURS[0], (400, 400)))])
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:2700])
    with pytest.raises(InputError, match=r"a\.tar: not a whole \.tar file") as caught:
        images.captions(Data(conditions=whole), "conditions")
    assert "\n" not in str(caught.value)
    (tmp_path / "a.tar").write_text("no archive at all")
    with pytest.raises(InputError, match=r"a\.tar: not a whole \.tar file"):
        images.captions(Data(conditions=whole), "conditions")


def test_datasets_need_their_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"needs the datasets package \(pip install -e '\.\[data\]'\)"):
        list(samples(str(tmp_path / "rows.parquet"), None, None, None))


def test_datasets_of_the_hub_are_streamed(monkeypatch):
    """With a stand-in for the library: there is no hub here."""
    asked = []

    class Stream(list):
        def __init__(self, rows):
            super().__init__(rows)
            self.features = {"label": SimpleNamespace(int2str=["cat", "dog"].__getitem__)}

        def decode(self, enable):
            assert enable is False
            return iter(self)

    def load_dataset(name, **options):
        asked.append((name, options))
        return Stream({"label": i % 2, "image": {"bytes": png(COLOURS[i]), "path": None}} for i in range(3))

    class DatasetsError(Exception):
        pass

    library = SimpleNamespace(
        __version__="4.0.0", load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError)
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    pictures, captions, _ = loaded(Data(images="hub:owner/name:validation", limit=2), 3, 4)
    assert captions == ["cat", "dog"] and len(pictures) == 2
    assert asked == [("owner/name", {"split": "validation", "streaming": True})]
    assert count("hub:owner/name", 5) == 5
    library.__version__ = "2.14.0"
    with pytest.raises(InputError, match=r"needs datasets 4 or newer, found 2\.14\.0"):
        images.captions(Data(images="hub:owner/name", limit=2))


def test_forms(tmp_path):
    assert form("hub:owner/name") == form("hub:owner/name:test") == "hub"
    assert form("hub:owner") is form("no/such") is None
    (tmp_path / "prompts.doc").write_text("a,b\n")
    assert form(str(tmp_path / "prompts.doc")) is None
    assert form(str(tmp_path)) == "folder"
