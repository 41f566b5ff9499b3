"""How a run stands, from what it wrote: its last words, its process, its metrics."""

import json
import os
import platform
import time
from pathlib import Path

import pytest

from stepdistill.errors import InputError
from stepdistill.files import write_json, write_text
from stepdistill.training.clean_cache import kept, remove, totals
from stepdistill.training.compare_runs import as_rows, compare_runs
from stepdistill.training.runs import heartbeat, runs

RECIPE = "method: {name: sfd}\ntrain: {steps: 9}\nevaluation: {metric: teacher_kid_enet}\n"
NO_PROCESS = 2**22 + 1  # above the largest number that Linux gives


def make_run(folder: Path, **beat: object) -> Path:
    write_text(folder / "recipe.yaml", RECIPE)
    facts = {"step": 4, "phase": "training", "time": time.time(), "host": platform.node(), "pid": os.getpid()}
    write_text(folder / "heartbeat.json", json.dumps(facts | beat))
    return folder


@pytest.mark.parametrize(
    ("beat", "state"),
    [
        ({}, "running"),
        ({"phase": "measuring"}, "running"),
        ({"phase": "done"}, "finished"),
        ({"phase": "failed"}, "failed"),
        ({"phase": "interrupted"}, "interrupted"),
        ({"pid": NO_PROCESS}, "interrupted"),
        ({"time": 1.0}, "interrupted"),  # this process is younger: another one had its number
        ({"host": "elsewhere", "pid": NO_PROCESS}, "running"),
        ({"host": "elsewhere", "time": time.time() - 4000}, "interrupted"),
    ],
)
def test_the_state_of_a_run(tmp_path: Path, beat: dict, state: str) -> None:
    (one,) = runs(make_run(tmp_path / "run", **beat))
    assert (one.state, one.method, one.step, one.steps) == (state, "sfd", 4, 9)


def test_runs_are_found_below_the_folder_the_latest_first(tmp_path: Path) -> None:
    make_run(tmp_path / "a", time=time.time() - 50)
    make_run(tmp_path / "sweep" / "b")
    make_run(tmp_path / "sweep" / "b" / "report" / "inside")  # a run's folder is its own
    make_run(tmp_path / "1" / "2" / "3" / "4")
    write_text(tmp_path / "recipes" / "recipe.yaml", RECIPE)  # nothing has run there
    make_run(tmp_path / "broken")
    write_text(tmp_path / "broken" / "recipe.yaml", "- no recipe: [")
    assert [Path(one.run).name for one in runs(tmp_path)] == ["b", "a"]


def test_the_best_value_is_the_lowest_and_else_the_ratio_of_the_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert (runs(folder)[0].metric, runs(folder)[0].best) == (None, None)
    write_json(folder / "report" / "report.json", {"verdict": [{"ratio": 1.5}, {"ratio": 0.9}]})
    assert (runs(folder)[0].metric, runs(folder)[0].best) == ("ratio", 0.9)
    write_json(folder / "best" / "values.json", {"2": 0.5, "4": 0.25})
    assert (runs(folder)[0].metric, runs(folder)[0].best) == ("teacher_kid_enet", 0.25)


def test_a_run_without_a_heartbeat_has_the_step_of_its_last_whole_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "heartbeat.json").write_text("{")
    (folder / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3}\n{"st')
    (one,) = runs(folder)
    assert (one.state, one.step) == ("running", 3) and one.seconds < 60
    os.utime(folder / "metrics.jsonl", (1, 1))
    assert runs(folder)[0].state == "interrupted"


def test_the_step_stays_where_a_run_ends_without_one(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    heartbeat(folder, None, "failed")
    assert (runs(folder)[0].step, runs(folder)[0].state) == (4, "failed")


def test_the_heartbeat_says_what_a_run_does_within_its_phase(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    heartbeat(folder, None, doing="checking the export")
    beat = json.loads((folder / "heartbeat.json").read_text())
    assert (beat["step"], beat["phase"], beat["doing"]) == (4, "training", "checking the export")


def test_runs_are_compared_by_what_differs_and_what_they_measured(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", phase="done")
    (second / "recipe.yaml").write_text(RECIPE.replace("steps: 9", "steps: 8"))
    (first / "metrics.jsonl").write_text('{"step": 1, "x": 2.5}\n{"step": 2, "drift/mean": 0.5}\n{"st')
    row = {"role": "student", "samples": 50, "steps": 4, "metrics": {"fd": 3.0}}
    for folder in (first, second):
        write_json(folder / "report" / "report.json", {"protocol": "p", "verdict": [], "rows": [row]})
    found = compare_runs([first, second])
    assert found["settings"] == {"train.steps": [9, 8]}
    assert found["metrics"] == {"x": [2.5, None], "drift/mean": [0.5, None]}
    assert found["report"] == {"fd, 4 steps": [3.0, 3.0]} and found["state"]["state"] == ["running", "finished"]
    assert ["train.steps", "9", "8"] in as_rows(found) and ["x", "2.5", "-"] in as_rows(found)
    write_json(second / "report" / "report.json", {"protocol": "p", "verdict": [], "rows": [row | {"samples": 60}]})
    assert compare_runs([first, second])["report"] == {}  # they do not compare
    with pytest.raises(InputError, match="expected a run folder"):
        compare_runs([first, tmp_path])


def test_the_cache_is_listed_by_kind_and_removed(tmp_path: Path) -> None:
    write_text(tmp_path / "conditions-ab" / "0.safetensors", "x" * 9000)
    write_text(tmp_path / "paths-cd.safetensors", "y" * 100)
    entries = kept(tmp_path)
    assert [one.path.name for one in entries] == ["conditions-ab", "paths-cd.safetensors"]
    assert totals(entries)[0][:2] == ("encoded prompts and classes", 1) and totals(entries)[1][2] == 100
    assert kept(tmp_path, older=1) == [] and kept(tmp_path / "none") == []
    remove(entries)
    assert list(tmp_path.iterdir()) == []
