"""A run that is stopped and resumed beside one that is not, for tests of what the teacher makes before training."""

import json
import os
import signal

from stepdistill.run import train
from stepdistill.training.trainer import Trainer


def costs_of_resumed(recipe, folder, monkeypatch, lost: bool) -> list[list[int]]:
    """The evaluations that each line of both runs' metrics counts; their last checkpoints are equal to the bit.

    Args:
        lost: the stored trajectories are deleted before the run resumes.
    """
    train(recipe | {"output": str(folder / "whole")})
    original = Trainer.step

    def stopping(self, step, log=False):
        os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None
        return original(self, step, log)

    monkeypatch.setattr(Trainer, "step", stopping)
    assert train(recipe | {"output": str(folder / "parts")}).interrupted
    monkeypatch.setattr(Trainer, "step", original)
    if lost:
        (file,) = (folder / "cache").glob("paths-*")
        file.unlink()
    train(recipe | {"output": str(folder / "parts")})
    files = [sorted((folder / run / "checkpoints" / "step-000003").iterdir()) for run in ("whole", "parts")]
    assert [a.name for a, b in zip(*files, strict=True) if a.read_bytes() != b.read_bytes()] == []
    lines = [(folder / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "parts")]
    return [[json.loads(line)["evaluations"] for line in run] for run in lines]
