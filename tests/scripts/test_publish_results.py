"""The tables of docs/comparison.md are those of the stored reports."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_says_what_the_reports_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from publish_results import tables

    page, found = (ROOT / "docs/comparison.md").read_text(encoding="utf-8"), tables(ROOT / "assets" / "benchmarks")
    assert len(found) >= 2 and all(table in page for table in found)
