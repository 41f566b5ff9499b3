"""Rows on disk: gathered as they were written, the same files however they came about, damage named and mended."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stepdistill.data import shards, store
from stepdistill.data.shards import Chunk, Content, Share
from stepdistill.data.store import ensure

ITEMS = 23
SHARD = 200
REJECTED = {"read": 2, "reasons": {"odd": 1}, "example": "7", "notes": {}}


def row(item: int) -> dict[str, torch.Tensor]:
    """Text of its own length in a chunk's padding, a number, and a second text that is the first one's or constant."""
    text = torch.zeros(1, 6, 3)
    text[:, : 1 + item % 5] = item + 1.0
    text[:, 0, 0] = -0.0
    return {
        "text": text[:, : 4 if item < 4 else 6],
        "number": torch.tensor([item]),
        "twin": text[:, : 4 if item < 4 else 6],
    }


def content(made=None, chunk=2, row_bytes=20) -> Content:
    def make(first, last):
        assert first % chunk == 0
        for start in range(first, last, chunk):
            taken = range(start, min(start + chunk, last))
            if made is not None:
                made.extend(taken)
            kept = [row(item) for item in taken if item != 7]  # which is rejected
            rows = {name: torch.cat([one[name] for one in kept]) for name in row(0)} if kept else {}
            yield Chunk(rows, len(kept), len(taken), REJECTED if 7 in taken else None)

    return Content(
        "rows", ITEMS, chunk, row_bytes, make, {"empty": torch.ones(1, 7, 3)}, {"twin": "text", "empty": "text"}
    )


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", SHARD)


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    ensure(tmp_path / "whole", "key", content)
    return files(tmp_path / "whole")


def test_rows_are_gathered_as_they_were_written(tmp_path):
    kept, items = ensure(tmp_path / "a", "key", content), [item for item in range(ITEMS) if item != 7]
    assert len(kept) == len(items) and len(kept.shards) > 3
    index = [21, 0, 7, 3, 0]
    rows = kept.rows("")
    assert rows["number"][index].tolist() == [items[i] for i in index]
    assert rows["text"].shape == (22, 7, 3), "as long as the longest, the constant included"
    for name in ("text", "twin"):
        expected = torch.zeros(5, 7, 3)
        for place, i in zip(expected, index, strict=True):
            own = row(items[i])["text"][0]
            place[: len(own)] = own
        found = rows[name][index]
        assert torch.equal(found.view(torch.int32), expected[:, : found.shape[1]].view(torch.int32)), "to the bit"
    assert torch.equal(rows["empty"], torch.ones(1, 7, 3))
    assert torch.equal(rows["number"][3:9:2], rows["number"][[3, 5, 7]])
    stored = sum(len(data) for name, data in files(tmp_path / "a").items() if name[0] == "0")
    assert kept.bytes == stored + (tmp_path / "a" / "constants.safetensors").stat().st_size
    assert not any(b'"twin"' in data[8:64] for data in files(tmp_path / "a").values()), "stored once"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float16])
def test_every_dtype(tmp_path, dtype):
    rows = {"flat": torch.tensor([1, 0, 2, 5]).to(dtype), "deep": torch.randn(4, 3, 2).mul(3).to(dtype)}
    kept = ensure(tmp_path, "key", lambda: Content("rows", 4, 4, 8, lambda *_: iter([Chunk(rows, 4, 4)])))
    for name, expected in rows.items():
        assert torch.equal(kept.rows("")[name][:], expected) and kept.rows("")[name][[2]].dtype == dtype


def test_processes_share_the_blocks(tmp_path, whole):
    made = [[], []]
    for rank in (1, 0):
        shards.fill(tmp_path / "b", "key", content(made[rank]), Share(rank, 2))
    shards.finish(tmp_path / "b", "key", content())
    assert files(tmp_path / "b") == whole
    assert sorted(made[0] + made[1]) == list(range(ITEMS)) and max(made[0]) < min(made[1])


@pytest.mark.parametrize("stop", [1, 6, 13, 22])
def test_an_interrupted_store_goes_on(tmp_path, whole, stop):
    def broken():
        inner = content()

        def make(first, last):
            for chunk in inner.make(first, last):
                if chunk.rows and stop in chunk.rows["number"].tolist():
                    raise KeyboardInterrupt
                yield chunk

        return replace(inner, make=make)

    with pytest.raises(KeyboardInterrupt):
        ensure(tmp_path / "c", "key", broken)
    there, made = set(files(tmp_path / "c")), []
    ensure(tmp_path / "c", "key", lambda: content(made))
    assert files(tmp_path / "c") == whole
    assert len(made) < ITEMS if there else made == list(range(ITEMS))


def test_a_source_that_has_fewer_than_it_says(tmp_path):
    """The files are the same whoever finds out."""
    whole = content()

    def make(first, last):
        return whole.make(first, min(last, 9)) if first < 9 else iter(())

    short = replace(whole, make=make)
    assert len(ensure(tmp_path / "one", "key", lambda: short)) == 8
    for rank in (0, 1, 2):
        shards.fill(tmp_path / "three", "key", short, Share(rank, 3))
    shards.finish(tmp_path / "three", "key", short)
    assert files(tmp_path / "three") == files(tmp_path / "one")


def test_a_killed_process_leaves_nothing(tmp_path, whole):
    """Killed while a shard is on its way to the disk."""
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
        from pathlib import Path
        from data import test_store
        from stepdistill.data import shards
        shards.SHARD = test_store.SHARD
        whole, count = shards.publish, []
        def publish(draft, path):
            count.append(path)
            if len(count) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            whole(draft, path)
        shards.publish = publish
        test_store.ensure(Path({str(tmp_path / "d")!r}), "key", test_store.content)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert ended.returncode == -signal.SIGKILL
    left = set(files(tmp_path / "d"))
    assert any(name.endswith(".partial") for name in left) and "index.json" not in left
    ensure(tmp_path / "d", "key", content)
    assert files(tmp_path / "d") == whole


@pytest.mark.parametrize("damage", ["truncated", "flipped", "lost", "constants", "index"])
def test_damage_is_named_and_mended(tmp_path, whole, damage, capsys):
    folder, made = tmp_path / "whole", []
    file = sorted(folder.glob("0*"))[2]
    match damage:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-5])
        case "flipped":
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        case "lost":
            file.unlink()
        case _:
            file = folder / {"constants": "constants.safetensors", "index": "index.json"}[damage]
            file.write_bytes(b"{")
    ensure(folder, "key", lambda: content(made))
    assert files(folder) == whole and file.name in capsys.readouterr().err.replace("\n", "")
    assert len(made) < ITEMS


def test_a_store_of_something_else_is_made_again(tmp_path, whole, capsys):
    made = []
    ensure(tmp_path / "whole", "other", lambda: content(made))
    assert made == list(range(ITEMS)) and "another pipeline" in capsys.readouterr().err
    # Files of something else without an index, such as a copy of a part of a store.
    (tmp_path / "whole" / "index.json").unlink()
    ensure(tmp_path / "whole", "key", content)
    assert files(tmp_path / "whole") == whole


def test_a_large_store_is_verified_on_request(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(store, "CHECKED", 10)
    monkeypatch.setattr(store, "sha256", None)
    ensure(tmp_path / "whole", "key", content)
    with pytest.raises(TypeError):
        ensure(tmp_path / "whole", "key", content, verify=True)


def test_a_full_disk_is_found_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: type("", (), {"free": 100})())
    with pytest.raises(shards.InputError, match="GiB of free disk for 23 rows"):
        ensure(tmp_path / "e", "key", content)
    with pytest.raises(shards.InputError, match="for 23 rows"):  # those of all processes
        shards.fill(tmp_path / "e", "key", content(), shards.Share(0, 2))


def test_a_shard_needs_its_place_twice(tmp_path, monkeypatch):
    """Of 23 rows of 20 bytes there is a shard of up to 200 in each process beside the store."""
    usage = SimpleNamespace()
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage)
    for processes, needed in ((1, 660), (2, 860), (4, 920)):
        usage.free = needed - 1
        with pytest.raises(shards.InputError, match="of free disk for 23 rows"):
            shards.fill(tmp_path, "key", content(), shards.Share(processes - 1, processes))
    usage.free = 660
    assert len(ensure(tmp_path, "key", content)) == 22


def test_the_time_is_estimated_once_before_most_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "MEASURED", 0.0)
    made = []
    ensure(tmp_path / "f", "key", lambda: replace(content(made), items=5))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "take about" in line]
    assert line.startswith("5 rows take about 0:00:0")


def test_memory_does_not_grow_with_the_shard(tmp_path):
    """The most that a process has resident, before and after it writes a shard of 64 MiB in chunks of 1."""
    script = f"""
        import resource, torch
        from pathlib import Path
        from stepdistill.data.shards import SHARD, Chunk, Content
        from stepdistill.data.store import ensure
        def make(first, last):
            for start in range(first, last, 32):
                yield Chunk({{"text": torch.rand(32, 128, 64)}}, 32, 32)
        def peak(name, items):
            kept = ensure(Path({str(tmp_path)!r}) / name, name, lambda: Content("rows", items, 32, 2**15, make))
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, kept.bytes
        (few, _), (many, size) = peak("few", 64), peak("many", 2048)
        assert size >= SHARD
        print(many - few)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < 16 * 1024


def test_rows_of_two_forms_are_refused(tmp_path):
    chunks = [Chunk({"text": torch.ones(1, 2, width)}, 1, 1) for width in (3, 4)]
    with pytest.raises(shards.InputError, match=r"text of one form.*\(3,\) torch.float32 and \(4,\)"):
        ensure(tmp_path, "key", lambda: Content("rows", 2, 1, 12, lambda *_: iter(chunks)))


def test_the_pages_of_a_store_do_not_stay(tmp_path):
    rows = {"text": torch.from_numpy(np.random.default_rng(0).random((64, 4096, 64), dtype=np.float32))}
    kept = ensure(tmp_path, "key", lambda: Content("rows", 64, 64, 2**20, lambda *_: iter([Chunk(rows, 64, 64)])))
    kept.rows("")["text"][[0]]

    def resident() -> int:
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    for number in range(64):
        kept.rows("")["text"][[number]]
    assert resident() - before < 2**24
