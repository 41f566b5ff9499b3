"""What people read of a report: the page, its pictures, its tables and notes."""

import html
import json
import re
from html.parser import HTMLParser

import torch
from made_reports import PIXEL, a_report, measured, row

from stepdistill.eval.names import METRICS, explained
from stepdistill.eval.perceptual import ALSO
from stepdistill.eval.pictures import gap_of, training_plot
from stepdistill.eval.render import notes, table_of
from stepdistill.eval.report import compare, read_report
from stepdistill.eval.verdict import verdict
from stepdistill.sampling.image_grid import image_grid


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


def test_costs_and_intervals_are_shown_where_they_were_measured():
    student = row("a", "student", 4, 11.0, diagnostics={"fd_classifier_error": 0.5})
    student.cost |= {"latency_seconds": 0.25, "batch": 16, "flops": 3e12}
    table = table_of(a_report(student))
    cells = dict(zip(table.header, next(cells for role, cells in table.rows if role == "student"), strict=True))
    assert cells["FD-classifier@1000"] == "11.00 ± 0.98"
    assert (cells["Latency ms"], cells["Batch"], cells["GFLOPs / image"]) == ("250.0", "16", "3,000")
    assert "95 % interval" in a_report(student).to_markdown()
    assert "Latency ms" not in table_of(a_report(row("a", "student", 4, 11.0))).header
