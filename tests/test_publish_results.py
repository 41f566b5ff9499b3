"""The README's tables are those of the stored reports."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_readme_says_what_the_reports_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from publish_results import tables

    readme, found = (ROOT / "README.md").read_text(encoding="utf-8"), tables(ROOT / "assets" / "benchmarks")
    assert len(found) >= 2 and all(table in readme for table in found)
