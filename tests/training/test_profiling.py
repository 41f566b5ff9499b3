"""A profile names every role and turn that a step has, and leaves no checkpoint."""

import json

import pytest
import torch

from pipeline.tiny import save_dit, tiny_dit
from stepdistill.cli import run
from stepdistill.training import profiling


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_profile_says_where_a_step_goes(tmp_path, capsys, train):
    save_dit(tiny_dit(), tmp_path / "teacher")
    recipe = {
        "teacher": {"pipeline": str(tmp_path / "teacher"), "guidance": {"scale": 1.5}},
        "student": {"steps": 2, "train": train},
        "method": {"name": "dmd2", "critic_steps": 1},
        "train": {"steps": 4, "batch_size": 2, "lr": 1e-3},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert run(["train", str(tmp_path / "recipe.yaml"), "--profile", "2"]) == 0
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "run/profile/profile.json").read_text())
    rows = {row["name"]: row for row in facts["rows"]}
    names = {"forward of teacher", "forward of student", "forward of critic", "turn of student", "turn of critic"}
    assert set(rows) == names and all(name in printed for name in names)
    assert rows["forward of teacher"]["calls"] == 1 and rows["forward of critic"]["calls"] == 2
    passes = [row["seconds"] for name, row in rows.items() if name.startswith("forward")]
    turns = [row["seconds"] for name, row in rows.items() if name.startswith("turn")]
    assert 0 < sum(passes) < sum(turns)
    assert facts["host_reads"] <= 10
    assert facts["optimizer_mib"]["student"] == pytest.approx(2 * facts["weights_mib"]["student"], rel=0.02)
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    assert names <= {event.get("name") for event in trace["traceEvents"]}
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/recipe.yaml").exists()


def test_what_is_compiled_is_compiled_before_it_is_measured(tmp_path, monkeypatch):
    torch._dynamo.reset()  # another test's graphs fit these networks too
    save_dit(tiny_dit(), tmp_path / "teacher")
    stats, original, during = torch._dynamo.utils.counters["stats"], torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: original(self, backend="eager"))
    plain = profiling.profile
    monkeypatch.setattr(profiling, "profile", lambda **k: during.append(stats["unique_graphs"]) or plain(**k))
    recipe = {
        "teacher": {"pipeline": str(tmp_path / "teacher"), "guidance": {"scale": 1.5}},
        "student": {"steps": 1},
        "method": {"name": "dmd2", "critic_steps": 1},
        "train": {"steps": 4, "batch_size": 2, "lr": 1e-3, "compile": True},
        "output": str(tmp_path / "run"),
    }
    before = stats["unique_graphs"]
    profiling.profile_training(recipe, 1)
    assert before < during[0] == stats["unique_graphs"]
