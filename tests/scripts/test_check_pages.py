"""The check of pages in a browser: what it calls a fault, and how it ends where there is no browser."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import check_pages

    return check_pages


def test_faults_are_width_pictures_errors_and_other_hosts(script):
    fine = {"over": 0, "wide": [], "broken": []}
    own = "http://127.0.0.1:8000/"
    assert script.faults(fine, [], [own + "a.css", "file:///a.png", "data:image/png;base64,"], own) == []
    wrong = {"over": 20, "wide": ["<table>"], "broken": ["a.png"]}
    assert script.faults(wrong, ["no such name"], ["https://elsewhere.org/a.js", own], own) == [
        "20 pixels wider than the window: <table>",
        "picture not there: a.png",
        "error: no such name",
        "asks another host: https://elsewhere.org/a.js",
    ]


def test_without_a_browser_it_ends_with_one_line(script, monkeypatch, tmp_path, capsys):
    (tmp_path / "index.html").write_text("<p>a</p>")
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    monkeypatch.setattr(sys, "argv", ["check_pages.py", "--site", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"{script.MISSING}\n"
    # No page is another reason, and said as one.
    monkeypatch.setattr(sys, "argv", ["check_pages.py", "--site", str(tmp_path / "nothing")])
    assert script.main() == 2 and "make docs writes the site" in capsys.readouterr().err
