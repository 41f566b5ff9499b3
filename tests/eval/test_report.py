"""The report: the contract of report.json, verdicts, what people read, and what is not merged."""

import copy
import html
import importlib.util
import json
import re
import shutil
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.eval import report as report_module
from stepdistill.eval.names import METRICS, explained
from stepdistill.eval.perceptual import ALSO
from stepdistill.eval.pictures import gap_of, read_pictures, training_plot, width_of
from stepdistill.eval.render import notes, table_of
from stepdistill.eval.report import Report, Row, compare, merge, read_report
from stepdistill.eval.summary import sentences
from stepdistill.eval.verdict import Verdict, verdict
from stepdistill.sampling.image_grid import image_grid


def row(name, role, steps, fd, guidance=1.0, **changes):
    metrics = dict(zip(METRICS, (fd, 0.001, 3 * fd, 0.002, 0.8, 0.7, 0.93, 2 * fd, 4 * fd), strict=True))
    cost = {"seconds_per_image": 0.0123, "peak_memory_mib": 512.0, "parameters": 4_600_000}
    nfe = steps * (1 if guidance == 1 else 2)
    return Row(name, role, steps, nfe, guidance, 1000, metrics, cost, **changes)


TEACHER = row("fashion-dit w=1.5", "teacher", 50, 10.0, guidance=1.5)
SOLVERS = [row("DDIM", "solver", 4, 60.0), row("UniPC w=1.5", "solver", 2, 30.0, guidance=1.5)]


PIXEL = image_grid(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), columns=1)


def a_report(*students, **changes):
    rows = copy.deepcopy([*students, TEACHER, *SOLVERS])
    verdicts = [verdict(student, TEACHER, SOLVERS) for student in students if student.steps == 4]
    stated = {
        "protocol": "fashion-v1",
        "seed": 0,
        "command": "stepdistill bench runs/<a> & b",
        "versions": {"torch": "2.6"},
        "device": "cpu, 2 threads",
        "floor": dict.fromkeys(METRICS, 0.5),
        "verdict": verdicts,
    }
    return Report(**(stated | {"rows": rows} | changes))


def test_verdict_is_the_arithmetic_of_its_definition():
    found = verdict(row("a", "student", 4, 12.0), TEACHER, SOLVERS)
    assert found.ratio == pytest.approx(1.2)
    assert found.solver == "UniPC w=1.5"
    assert found.gap_closed == pytest.approx((30 - 12) / (30 - 10))
    assert found.passed
    assert found.text.startswith("Pass: a in 4 steps (NFE 4) has FD-classifier@1000 12.00, 1.20× that of its teacher")
    assert "closes 90 % of the gap" in found.text


@pytest.mark.parametrize(("fd", "passed"), [(9.0, True), (12.0, True), (12.1, False), (29.0, False)])
def test_verdict_needs_the_ratio(fd, passed):
    assert verdict(row("a", "student", 4, fd), TEACHER, SOLVERS).passed is passed


def test_verdict_needs_the_gap_too_where_there_is_one():
    close = [row("UniPC", "solver", 4, 12.0)]
    found = verdict(row("a", "student", 4, 11.0), TEACHER, close)
    assert found.ratio < 1.2 and found.gap_closed == pytest.approx(0.5) and not found.passed
    level = verdict(row("a", "student", 4, 11.0), TEACHER, [row("UniPC", "solver", 4, 9.0)])
    assert level.gap_closed is None and level.passed and "no gap" in level.text
    assert verdict(row("a", "student", 4, 11.0), TEACHER, []).gap_closed is None


def measured(name, role, steps, fd, half, samples=20):
    """A row whose 95 % interval is ``fd`` plus or minus ``half``."""
    found = row(name, role, steps, fd, diagnostics={"fd_classifier_error": half / 1.96})
    found.samples = samples
    return found


def test_too_few_samples_decide_nothing():
    found = verdict(measured("q2", "student", 4, 24.90, 18.40), measured("t", "teacher", 50, 25.12, 18.47), [])
    assert found.passed is None and found.ratio == pytest.approx(0.99, abs=0.01)
    assert found.text.startswith(
        "Not decided: q2 in 4 steps (NFE 4) has FD-classifier@20 24.90 ± 18.40, 0.99× that of its teacher "
        "(25.12 ± 18.47, "
    )
    # The difference from 1.2 times the teacher's is 5.24, with a standard error of 14.7.
    assert found.text.endswith("The samples are too few to be 95 % sure; about 430 would decide.")


def test_what_the_errors_leave_open_and_what_they_do_not():
    teacher = measured("t", "teacher", 50, 10.0, 0.5)
    for fd, half, passed in ((10.0, 1.0, True), (11.5, 1.0, None), (12.5, 1.0, None), (15.0, 1.0, False)):
        assert verdict(measured("a", "student", 4, fd, half), teacher, []).passed is passed
    # A gap that is surely not closed fails, whatever the ratio is.
    solver = measured("UniPC", "solver", 4, 14.0, 0.5)
    assert verdict(measured("a", "student", 4, 12.5, 0.9), teacher, [solver]).passed is False
    assert verdict(measured("a", "student", 4, 10.9, 0.9), teacher, [solver]).passed is None
    # Where the solver is as good as the teacher within the errors there is no gap.
    level = verdict(measured("a", "student", 4, 10.5, 0.5), teacher, [measured("UniPC", "solver", 4, 10.3, 0.5)])
    assert (
        level.gap_closed is None
        and level.passed
        and "within the errors (10.30 ± 0.50), so no gap can be" in (level.text)
    )
    # Rows of unknown errors are taken as they are.
    assert verdict(row("a", "student", 4, 11.9), TEACHER, SOLVERS).passed


def test_an_open_verdict_is_neither_passed_nor_failed_for_people(tmp_path):
    few = measured("q2", "student", 4, 24.90, 18.40), measured("t", "teacher", 50, 25.12, 18.47)
    report = a_report(rows=list(few), verdict=[verdict(few[0], few[1], [])])
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert 'class="verdict undecided"' in page and "<b>Not decided</b>" in page
    assert json.loads((tmp_path / "report.json").read_text())["verdict"][0]["passed"] is None
    assert read_report(tmp_path).verdict == report.verdict
    report.verdict *= 4
    assert "0 of 4 students" in report.to_html() and "Of 4 the samples are too few to decide." in report.to_html()


def test_seconds_of_another_machine_are_not_shown(tmp_path, monkeypatch):
    here, there = row("a", "student", 4, 11.0, machine="cpu, 2 threads"), row("b", "student", 4, 12.0, machine="a GPU")
    before = row("c", "student", 4, 13.0, cached=True)
    report = a_report(rows=[here, there, before], verdict=[])
    table = table_of(report)
    seconds = table.header.index("s / image")
    assert {cells[0]: cells[seconds] for _, cells in table.rows[1:]} == {"a": "0.0123", "b": "–", "c °": "–"}
    assert any("another machine" in note for note in notes(report))
    drawn = {}
    monkeypatch.setattr(
        "stepdistill.eval.render.quality_plot", lambda rows, *a: drawn.setdefault(a[-1], rows) and PIXEL
    )
    report.to_html()
    assert [[one.name for one in drawn[axis]] for axis in ("nfe", "seconds")] == [["a", "b", "c"], ["a"]]


def test_three_sentences_say_speed_quality_and_training():
    student = row("a", "student", 4, 11.0, machine="cpu, 2 threads")
    report = a_report(
        student, trained={"a": {"student_steps": 4, "steps": 500, "seconds": 89.6, "evaluations": 12_000}}
    )
    for entry in report.rows:
        entry.machine, entry.cost["seconds_per_image"] = report.device, 0.001 * entry.nfe
    speed, quality, training = sentences(report)
    assert "in 4 network passes, its teacher in 100: 25 times fewer" in speed and "25 times faster" in speed
    assert (
        quality.startswith("It replaces its teacher: its FD-classifier@1000 is 1.10 times") and "closes 95 %" in quality
    )
    assert "500 steps, about 90 s" in training and "12,000 network passes" in training
    report.rows[0].machine = "a GPU"  # whose seconds do not compare
    assert "faster" not in sentences(report)[0]
    assert sentences(a_report()) == []


def test_sentences_decide_nothing_where_intervals_overlap():
    few = measured("q2", "student", 4, 24.90, 18.40), measured("t", "teacher", 50, 25.12, 18.47)
    (_, quality) = sentences(a_report(rows=list(few), verdict=[verdict(*few, [])]))
    assert quality.startswith("Not decided whether it replaces its teacher") and "20 samples are too few" in quality
    # Without a verdict it is compared with the best stock solver in as many passes.
    student, solver = measured("a", "student", 4, 10.0, 1.0), measured("UniPC", "solver", 4, 10.5, 1.0)
    report = a_report(rows=[student, TEACHER, solver], verdict=[])
    assert sentences(report)[1].startswith("Not decided whether it beats the best stock solver")
    solver.metrics["fd_classifier"] = 20.0
    assert sentences(report)[1].startswith("It beats the best stock solver") and "UniPC" in sentences(report)[1]


def test_no_verdict_without_its_metric():
    student = row("a", "student", 4, 11.0)
    del student.metrics["fd_classifier"]
    assert verdict(student, TEACHER, SOLVERS) is None


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


class Structure(HTMLParser):
    """Counts tags and checks that they close; collects everything a page would fetch."""

    VOID = ("meta", "img", "link", "br", "input")

    def __init__(self):
        super().__init__()
        self.open, self.count, self.fetched = [], {}, []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_self_contained_and_escapes(tmp_path):
    report = a_report(row("<i>a</i>", "student", 4, 11.0))
    report.pictures = [("teacher", image_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), columns=2))]
    report.training = [("run", training_plot([{"step": i, "student/loss/dmd": 1.0 + i} for i in range(3)]))]
    page = report.write(tmp_path, single_file=True).read_text(encoding="utf-8")
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert structure.count["img"] == 1 + 4 + 1 and "script" not in structure.count and "i" not in structure.count
    assert all(source.startswith("data:image/png;base64,") for source in structure.fetched)
    assert "url(" not in page and "runs/&lt;a&gt; &amp; b" in page
    assert page.index('class="verdict pass"') < page.index("<table>")


def test_pictures_are_files_beside_the_page(tmp_path):
    report = a_report(row("a", "student", 4, 11.0))
    report.pictures = [("teacher", PIXEL), ("a", PIXEL)]
    structure = Structure()
    structure.feed(report.write(tmp_path).read_text(encoding="utf-8"))
    assert structure.fetched == [f"pictures/plots-0{i}.png" for i in (1, 2, 3, 4)] + [
        "pictures/pictures-01.png", "pictures/pictures-02.png",
    ]  # fmt: skip
    assert all((tmp_path / place).is_file() for place in structure.fetched)
    report.pictures = report.pictures[:1]
    report.write(tmp_path)
    assert not (tmp_path / "pictures" / "pictures-02.png").exists()


def test_the_first_screen_has_pictures_and_sentences_before_the_table(tmp_path):
    report = a_report(row("a", "student", 4, 11.0))
    report.first = [("a red shoe\nTeacher, 50 steps\nStudent, 4 steps\nUniPC, 4 steps", PIXEL)]
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "<title>a beside fashion-dit</title>" in page
    order = ["<h1>a beside", "<span>Student, 4 steps</span>", "a red shoe</figcaption>", "25 times fewer", "<table>"]
    assert sorted(order, key=page.index) == order
    again = compare([tmp_path])
    assert [caption for caption, _ in again.first] == [caption for caption, _ in report.first]


def test_a_slider_lays_the_teachers_picture_over_the_students():
    report = a_report(row("a", "student", 4, 11.0))
    names = ("Teacher, 50 steps", "Student, 4 steps", "UniPC, 4 steps")
    three = image_grid(torch.zeros(3, 3, 128, 128, dtype=torch.uint8), columns=3, gap=gap_of(128))
    report.first = [("\n".join([prompt, *names]), three) for prompt in ("<b>shoe</b>", "hat")]
    page = report.to_html()
    structure = Structure()
    structure.feed(page)
    assert structure.open == [] and structure.count["script"] == 1 and "b>shoe" not in page.replace("/b&gt;", "")
    # Column of the student, of the teacher, width and gap: what the script cuts out of the one picture that is there.
    assert page.count('data-pair="1 0 128 2"') == 2 == page.count("<figcaption>hat") + page.count("<figcaption>&lt;b")
    assert '<div class="slider" hidden>' in page and '<input type="range"' in page
    assert all(source.startswith("data:image/png;base64,") for source in structure.fetched)
    # Nothing to slide between: no student, or no teacher.
    report.first = [("hat\nTeacher, 50 steps\nUniPC, 4 steps\nDDIM, 4 steps", three)]
    assert not any(part in report.to_html() for part in ("data-pair=", "<script", 'type="range"'))


def test_every_column_is_explained_on_hover_and_below():
    report = a_report(row("a", "student", 4, 11.0))
    table, page = table_of(report), report.to_html()
    assert all(table.meanings) and len(table.meanings) == len(table.header)
    for cell, meaning in zip(table.header, table.meanings, strict=True):
        words = html.escape(meaning, quote=True).replace("&#x27;", "&#39;")
        assert page.count(words) == 2 * table.meanings.count(meaning), cell
    also = [metric for one in ALSO.values() for metric in one.labels]
    assert [
        metric for metric in (*METRICS, "fid", "cmmd", "clip_score", "lit_score", *also) if not explained(metric)
    ] == []


def test_a_notebook_shows_pictures_sentences_and_the_table():
    report = a_report(row("<i>a</i>", "student", 4, 11.0))
    report.first = [("a <b>\nTeacher, 50 steps", PIXEL)]
    structure, shown = Structure(), report._repr_html_()
    structure.feed(shown)
    assert structure.open == [] and structure.count["img"] == 1 and structure.count["tr"] == 1 + 5
    assert "25 times fewer" in shown and "i" not in structure.count and "b" not in structure.count


def test_many_verdicts_are_short_and_counted():
    students = [row(name, "student", 4, fd) for name, fd in (("a", 11.0), ("b", 12.0), ("c", 14.0), ("d", 30.0))]
    page = a_report(*students).to_html()
    assert "a, 4 steps: 1.10× the teacher&#39;s, 95 % of the gap" in page and "closes 95 %" not in page
    assert "2 of 4 students replace their teacher: FD-classifier@1000 at most 1.2× the teacher" in page
    assert "replace their teacher" not in a_report(*students[:3]).to_html()


def test_people_read_neither_fid_nor_unscaled_kid(tmp_path):
    report = a_report(row("a", "student", 4, 11.0))
    text = report.to_markdown()
    assert not re.search(r"(?<!not )\bFID\b(?! and)", text)
    assert "FD-classifier@1000" in text and "KID-ENetLite0@1000 ×1000" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| real images | – | – | 0.50 |")
    assert [line.split("|")[1].strip() for line in lines[3:]] == ["fashion-dit w=1.5", "a", "DDIM", "UniPC w=1.5"]
    assert "biased upwards" in text


def test_metrics_that_were_not_measured_have_no_column():
    report = a_report(row("a", "student", 4, 11.0))
    for entry in report.rows:
        entry.metrics = {"fd_classifier": 1.0, "kid_classifier": 0.0}
    assert report.metric_names == ["fd_classifier", "kid_classifier"]
    assert "ENet" not in report.to_markdown().split("Protocol")[0]


def test_people_read_diversity_as_a_ratio_to_the_teachers():
    report = a_report(row("a", "student", 4, 7.5))
    old = next(entry for entry in report.rows if entry.name == "DDIM")
    del old.metrics["diversity_enet"]
    table = table_of(report)
    column = table.header.index("Diversity-ENetLite0 / teacher's")
    cells = {cells[0]: cells[column] for _, cells in table.rows}
    # The teacher's is 40; real images have 0.5.
    assert cells == {
        "real images": "0.013",
        "fashion-dit w=1.5": "1.000",
        "a": "0.750",
        "DDIM": "–",
        "UniPC w=1.5": "3.000",
    }
    assert any(note.startswith("Diversity is") for note in notes(report))
    for entry in report.rows:
        if entry.role == "teacher":
            del entry.metrics["diversity_classifier"], entry.metrics["diversity_enet"]
    assert not any("Diversity" in cell for cell in table_of(report).header)
    assert not any(note.startswith("Diversity") for note in notes(report))
    assert report.to_dict()["rows"][0]["metrics"]["diversity_enet"] == 30


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


def test_costs_and_intervals_are_shown_where_they_were_measured():
    student = row("a", "student", 4, 11.0, diagnostics={"fd_classifier_error": 0.5})
    student.cost |= {"latency_seconds": 0.25, "batch": 16, "flops": 3e12}
    table = table_of(a_report(student))
    cells = dict(zip(table.header, next(cells for role, cells in table.rows if role == "student"), strict=True))
    assert cells["FD-classifier@1000"] == "11.00 ± 0.98"
    assert (cells["Latency ms"], cells["Batch"], cells["GFLOPs / image"]) == ("250.0", "16", "3,000")
    assert "95 % interval" in a_report(student).to_markdown()
    assert "Latency ms" not in table_of(a_report(row("a", "student", 4, 11.0))).header


def test_the_example_report_shows_the_shipped_students_where_they_were_trained(tmp_path, monkeypatch):
    root = assets.root()
    spec = importlib.util.spec_from_file_location("example_report", root / "scripts" / "example_report.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    comparison = root / "assets" / "benchmarks" / "comparison.json"
    report = script.example(comparison)
    stored = json.loads(comparison.read_text(encoding="utf-8"))["rows"]
    few = {row["training"]["method"] for row in stored if row["role"] == "student" and row["steps"] <= 8}
    assert len({entry.student for entry in report.verdict}) >= len(few) > 5
    assert [entry.ratio for entry in report.verdict] == sorted(entry.ratio for entry in report.verdict)
    # What is committed is what is written today: after a change of the page, example_report.py --stored.
    committed = read_report(script.STORED)
    pictures = read_pictures(script.STORED / "pictures")
    committed.first, committed.pictures = pictures["first"], pictures["pictures"]
    monkeypatch.setattr("stepdistill.eval.render.quality_plot", lambda *a: PIXEL)
    committed.write(tmp_path)
    for name in ("report.json", "report.md", "index.html"):
        assert (tmp_path / name).read_text() == (script.STORED / name).read_text(), name
    strips = Image.open(root / "assets" / "pictures" / "four_steps.png")
    assert [(caption, picture.tobytes()) for caption, picture in script.beside(strips)] == [
        (caption, picture.tobytes()) for caption, picture in committed.first
    ]
    assert width_of(committed.first[0][1], 3) == script.SIDE
