"""What a source is known by: its files as they are listed, none of which is read."""

import json
import os
import shutil

import pytest

from stepdistill.data.identity import identity


@pytest.fixture
def source(tmp_path, request):
    """A folder, a .jsonl or a shard, and a file that belongs to it."""
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "0.png").write_bytes(b"one")
    match request.param:
        case "folder":
            return folder, folder / "sub" / "0.png"
        case "jsonl":
            (folder / "a.jsonl").write_text(json.dumps({"text": "a" * 3000, "image": "sub/0.png"}) + "\nno json\n[1]")
            return folder / "a.jsonl", folder / "sub" / "0.png"
        case "csv":
            (folder / "a.csv").write_text('text,image\n"red, blue",sub/0.png\n')
            return folder / "a.csv", folder / "sub" / "0.png"
        case "shards":
            (folder / "a.tar").write_bytes(b"archive")
            return folder, folder / "a.tar"


@pytest.mark.parametrize("source", ["folder", "jsonl", "csv", "shards"], indirect=True)
def test_a_changed_file_is_another_source(source, tmp_path):
    place, file = source
    known, facts = identity(str(place)), os.stat(file)
    assert identity(str(place)) == known
    shutil.copytree(tmp_path / "source", tmp_path / "copy", copy_function=shutil.copy2)
    assert identity(str(tmp_path / "copy" / place.relative_to(tmp_path / "source"))) == known, "wherever it lies"
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert identity(str(place)) != known
    file.write_bytes(b"longer than before")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert identity(str(place)) != known


def test_a_dataset_of_the_hub_is_known_by_its_builder(monkeypatch):
    builders = {"owner/name": type("", (), {"hash": "abc"}), "owner/other": type("", (), {"hash": "abd"})}
    library = type("", (), {"load_dataset_builder": staticmethod(builders.__getitem__)})
    monkeypatch.setattr("stepdistill.data.identity.dataset_library", lambda _: library)
    assert len({identity(f"hub:{name}") for name in ("owner/name", "owner/other", "owner/name:test")}) == 3
