"""The report: the contract of report.json, and what is not merged."""

import copy
import importlib.util
import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from made_reports import PIXEL, a_report, row

from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.eval import report as report_module
from stepdistill.eval.names import METRICS
from stepdistill.eval.pictures import training_plot
from stepdistill.eval.report import Report, Row, compare, merge, read_report
from stepdistill.eval.verdict import Verdict
from stepdistill.sampling.image_grid import image_grid


def test_report_json_keeps_the_contract(tmp_path):
    report = a_report(row("a", "student", 1, 40.0), row("a", "student", 4, 11.0, cached=True))
    report.write(tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert set(stored) == {
        "schema", "protocol", "seed", "command", "versions", "device", "floor", "rows", "verdict",
    }  # fmt: skip
    assert stored["schema"] == 1 and set(stored["floor"]) == set(METRICS)
    for entry in stored["rows"]:
        assert {"name", "role", "steps", "nfe", "guidance", "samples", "metrics", "cost", "cached"} <= set(entry)
        assert entry["role"] in ("teacher", "student", "solver")
        assert set(entry["metrics"]) == set(METRICS)
        assert set(entry["cost"]) == {"seconds_per_image", "peak_memory_mib", "parameters"}
    assert [entry["nfe"] for entry in stored["rows"]] == [1, 4, 100, 4, 4]
    assert stored["verdict"][0]["passed"] is True
    assert read_report(tmp_path).to_dict() == report.to_dict() == read_report(tmp_path / "report.json").to_dict()


def test_numbers_that_json_lacks_become_null(tmp_path):
    report = a_report(row("a", "student", 4, 11.0, diagnostics={"variance_ratio": float("nan")}))
    report.write(tmp_path)
    assert '"variance_ratio": null' in (tmp_path / "report.json").read_text()


def test_merge_keeps_equal_rows_once_and_refuses_what_cannot_be_compared():
    first, second = a_report(row("a", "student", 4, 11.0)), a_report(row("b", "student", 4, 13.0))
    merged = merge([first, second])
    assert [entry.name for entry in merged.rows] == ["a", "fashion-dit w=1.5", "DDIM", "UniPC w=1.5", "b"]
    assert [(entry.student, entry.passed) for entry in merged.verdict] == [("a", True), ("b", False)]
    with pytest.raises(InputError, match="rows of protocols fashion-v1 and fashion-v2 cannot stand in one table"):
        merge([first, a_report(row("b", "student", 4, 1.0), protocol="fashion-v2")])
    other = a_report(rows=[row("b", "student", 4, 1.0)])
    other.rows[0].samples = 2000
    with pytest.raises(InputError, match="1000 and of 2000 samples"):
        merge([first, other])
    with pytest.raises(InputError, match="at least one"):
        merge([])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", ":1: expected JSON"), ("[]", "found list"), ('{"schema": 2}', "found 2")],
)
def test_what_is_not_a_report_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_report(tmp_path)


SCHEMA_FILE = Path(report_module.__file__).with_name("report.schema.json")


def test_the_schema_lists_every_field_and_no_other():
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    names = lambda kind: {entry.name for entry in fields(kind)}  # noqa: E731
    assert set(schema["properties"]["rows"]["items"]["properties"]) == names(Row)
    assert set(schema["properties"]["verdict"]["items"]["properties"]) == names(Verdict)
    kept_out = {"first", "pictures", "strips", "worst", "training"}
    assert set(schema["properties"]) == names(Report) - kept_out | {"schema"}
    assert set(schema["required"]) == set(a_report().to_dict())


def test_reports_are_what_the_schema_says(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    shipped = [
        Path(assets.root()) / "assets" / name
        for name in ("benchmarks/quickstart.json", "benchmarks/fashion_dmd2.json", "reports/fashion/report.json")
    ]
    full = a_report(row("a", "student", 4, float("nan")), labels={"fid": "FID"}, files={"w": "0"}, remarks=["x"])
    full.trained = {"a": {"steps": 5, "seconds": 1.5}}
    for content in (full.to_dict(), *(json.loads(path.read_text()) for path in shipped)):
        jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(full.to_dict() | {"schema": 2}, schema)


def test_compare_merges_finished_reports_and_refuses_other_protocols(tmp_path):
    a_report(row("a", "student", 4, 11.0)).write(tmp_path / "a")
    a_report(row("b", "student", 4, 9.0), device="a GPU").write(tmp_path / "b")
    merged = compare([tmp_path / "a", tmp_path / "b" / "report.json"], tmp_path / "both")
    assert [entry.name for entry in read_report(tmp_path / "both").rows if entry.role == "student"] == ["a", "b"]
    assert "several devices (cpu, 2 threads; a GPU)" in merged.to_markdown()
    assert [row.machine for row in merged.rows if row.role == "student"] == ["cpu, 2 threads", "a GPU"]
    a_report(row("c", "student", 4, 9.0), protocol="other-v1").write(tmp_path / "c")
    with pytest.raises(InputError, match="rows of protocols fashion-v1 and other-v1 cannot stand in one table"):
        compare([tmp_path / "a", tmp_path / "c"])


def test_compare_shows_the_pictures_of_all_reports_side_by_side(tmp_path):
    for name, colour in (("a", 80), ("b", 160)):
        report = a_report(row(name, "student", 4, 11.0), seed=colour)
        for entry in report.rows:
            entry.metrics = {"accuracy": 0.5}  # nothing to plot
        shade = torch.full((4, 3, 8, 8), colour, dtype=torch.uint8)
        teachers = ("teacher <w> & 50 steps", image_grid(torch.zeros_like(shade), columns=2))
        report.pictures = [teachers, (name, image_grid(shade, columns=2))]
        report.worst = [(name, image_grid(shade, columns=4))]
        report.training = [(name, training_plot([{"step": i, "student/loss/dmd": i + colour} for i in (1, 2)]))]
        report.write(tmp_path / name)
    merged = compare([tmp_path / "a", tmp_path / "b" / "report.json"], tmp_path / "both")
    assert [caption for caption, _ in merged.pictures] == ["teacher <w> & 50 steps", "a", "b"]
    assert [picture.convert("RGB").getpixel((1, 1))[0] for _, picture in merged.pictures] == [0, 80, 160]
    assert [len(pictures) for pictures in (merged.strips, merged.worst, merged.training)] == [0, 2, 2]
    assert "several seeds (80, 160)" in merged.to_markdown()
    # A merged report is one like any other.
    again = compare([tmp_path / "both", tmp_path / "a"])
    assert [caption for caption, _ in again.pictures] == ["teacher <w> & 50 steps", "a", "b"]
    compare([tmp_path / "both"], tmp_path / "alone", single_file=True)
    assert 'src="pictures/' not in (tmp_path / "alone" / "index.html").read_text(encoding="utf-8")
    assert len(compare([tmp_path / "alone"]).pictures) == 3
    shutil.rmtree(tmp_path / "both" / "pictures")
    assert compare([tmp_path / "both"]).pictures == []


def test_a_metric_that_one_report_added_does_not_keep_it_from_another(tmp_path):
    stated = {"labels": {"fid": "FID"}, "files": {"w": "1"}}
    plain, more = (a_report(rows=[row(name, "student", 4, 1.0)], **copy.deepcopy(stated)) for name in "ab")
    more.labels["pick_score"], more.rows[0].metrics["pick_score"] = "PickScore", 21.5
    more.files["pickscore"] = "2"
    merged = merge([plain, more])
    assert merged.files == {"w": "1", "pickscore": "2"} and "21.50" in merged.to_markdown()
    assert "predict what people prefer" in merged.to_markdown() and "LPIPS" not in merged.to_markdown()
    with pytest.raises(InputError, match="different pickscore cannot stand"):
        merge([copy.deepcopy(more), a_report(files={"w": "1", "pickscore": "3"})])
    with pytest.raises(InputError, match="different w cannot stand"):
        merge([plain, a_report(files={})])


def test_the_example_report_is_what_is_written_today(tmp_path, monkeypatch):
    """After a change of the page: scripts/example_report.py --stored."""
    monkeypatch.syspath_prepend(Path(assets.root()) / "scripts")
    script = importlib.import_module("example_report")
    committed = script.stored()
    assert [entry.steps for entry in committed.verdict] == [1]
    assert all(entry.samples == 2000 for entry in committed.rows)
    assert len(committed.first) == 4 and committed.training and committed.worst
    monkeypatch.setattr("stepdistill.eval.render.quality_plot", lambda *a: PIXEL)
    committed.write(tmp_path)
    for name in ("report.json", "report.md", "index.html"):
        assert (tmp_path / name).read_text() == (script.STORED / name).read_text(), name
