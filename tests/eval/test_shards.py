"""Shards: who writes them, and when, does not show; a kill loses one shard at most."""

import weakref

import pytest
import torch

from stepdistill.eval.measure import resampled_moments
from stepdistill.eval.metrics import Moments
from stepdistill.eval.shards import SHARD, Shards, features_of

COUNT = 2 * SHARD + 10


def make(indices):
    return {"rows": torch.stack([torch.full((3,), i, dtype=torch.float32).sin() * (i + 1) for i in indices])}


def contents(shards):
    return {path.name: path.read_bytes() for path in sorted(shards.folder.iterdir())}


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    written = []
    for processes in (1, 2, 3, 5):
        shards = Shards(tmp_path / str(processes), COUNT)
        made = [shards.fill(make, rank=rank, processes=processes) for rank in reversed(range(processes))]
        assert sum(made) == COUNT
        written.append(contents(shards))
    assert all(each == written[0] for each in written) and len(written[0]) == 3
    assert torch.equal(shards.all("rows"), make(range(COUNT))["rows"])


def test_a_killed_run_keeps_whole_shards_and_goes_on(tmp_path):
    shards, asked = Shards(tmp_path / "run", COUNT), []

    def killed(indices):
        asked.append(indices)
        if indices.start == SHARD:
            raise KeyboardInterrupt
        return make(indices)

    with pytest.raises(KeyboardInterrupt):
        shards.fill(killed)
    assert [indices.start for indices in shards.missing()] == [SHARD, 2 * SHARD]
    shards.fill(lambda indices: asked.append(indices) or make(indices))
    assert asked == [range(64), range(64, 128), range(64, 128), range(128, 138)]
    whole = Shards(tmp_path / "whole", COUNT)
    whole.fill(make)
    assert contents(shards) == contents(whole) and shards.missing() == []


def test_a_damaged_shard_is_made_again(tmp_path):
    shards = Shards(tmp_path, COUNT)
    shards.fill(make)
    path = shards.path(shards.ranges[1])
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(OSError, match="was damaged and has been removed"):
        shards.all("rows")
    assert shards.fill(make) == SHARD and len(shards.all("rows")) == COUNT


def test_moments_stream_and_equal_those_of_all_rows(tmp_path):
    shards = Shards(tmp_path, COUNT)
    shards.fill(make)
    ours, whole = shards.moments(), Moments.of(shards.all("rows"))
    assert torch.allclose(ours.mean, whole.mean, rtol=1e-12) and torch.allclose(ours.cov, whole.cov, rtol=1e-12)


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, monkeypatch):
    alive, peaks, real = weakref.WeakSet(), [], Shards.read

    def counting(self, indices):
        read = real(self, indices)
        alive.add(read["rows"])
        peaks.append(len(alive))
        return read

    monkeypatch.setattr(Shards, "read", counting)
    shards = Shards(tmp_path, 12 * SHARD + 5)
    shards.fill(make)
    index = torch.randint(shards.count, (shards.count,), generator=torch.Generator().manual_seed(0))
    streamed = shards.moments(), resampled_moments(shards, index)
    assert len(peaks) == 2 * 13 and max(peaks) <= 2  # one in use while the next is read
    rows = shards.all("rows")
    for ours, whole in zip(streamed, (Moments.of(rows), Moments.of(rows[index])), strict=True):
        assert torch.allclose(ours.mean, whole.mean, rtol=1e-10) and torch.allclose(ours.cov, whole.cov, rtol=1e-10)


def test_features_are_made_of_a_shards_images(tmp_path):
    class Mean:
        features = 1

        def prepare(self, image):
            return image.float()

        def rows(self, batch):
            return {"rows": batch.mean((1, 2, 3))[:, None]}

    images = torch.arange(70, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    shards = Shards(tmp_path, 70)
    shards.fill(features_of(lambda indices: images[indices.start : indices.stop], Mean(), "cpu"))
    assert shards.all("rows")[:, 0].tolist() == list(range(70))
