"""The pieces of scripts/tutorials.py, and that the committed tutorials are whole: every screen and every picture."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("walk")  # terminals as it opens them are not on Windows
import tutorials


def test_a_page_is_its_own_script():
    page = "a\n```bash\nb c  # d\n```\n\n```text\nold\n```\n```yaml\ne: 1\n```\n```bash\nnot run\n```\n\n"
    page += "```yaml\nf: 2\n```\n![g](pictures/tutorials/sdxl-grid.png)\n```text\nkept\n```\n"
    ran, done = [], []
    filled = tutorials.filled(page, lambda line: ran.append(line) or ["new", "lines"], lambda *one: done.append(one))
    assert filled == page.replace("old", "new\nlines")
    assert ran == ["b c  # d"] and done == [("yaml", "e: 1\n"), ("yaml", "f: 2\n"), ("picture", "sdxl-grid")]
    assert tutorials.dotted({"a": {"b": [1], "c": {"d": 2}}, "e": 3}) == {"a.b": [1], "a.c.d": 2, "e": 3}


def test_long_screens_keep_their_ends_and_their_bars():
    lines = ["", *(f"{number}" for number in range(100)), ""]
    lines[51], lines[70] = "train ━━ 1/2", "another ━━ 1/2"
    kept = tutorials.shortened(lines)
    first, last = tutorials.FIRST, tutorials.LAST
    left_out = [f"... ({number} lines)" for number in (50 - first, 100 - last - 53)]
    assert kept[first - 1 : first + 5] == [f"{first - 1}", left_out[0], lines[51], "51", "52", left_out[1]]
    assert len(kept) == first + last + 5 and kept[-1] == "99" and tutorials.shortened(lines[:30]) == lines[1:30]


def test_pictures_are_small_and_a_workflow_is_drawn_from_left_to_right(tmp_path):
    tutorials.small(Image.effect_noise((1920, 100), 90), tmp_path / "one.png", 16)
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (960, 50) and picture.mode == "P"
    tutorials.small(Image.new("L", (64, 16)), tmp_path / "one.png", 16)
    assert Image.open(tmp_path / "one.png").size == (192, 48)
    workflow = {
        "2": {"class_type": "Later", "inputs": {"x": ["1", 0]}},
        "1": {"class_type": "First", "inputs": {"y": 1}},
    }
    drawn = tutorials.nodes(workflow)
    assert drawn.index("<caption>First") < drawn.index("<caption>Later") and "from First" in drawn


def test_cells_show_what_they_print_and_their_last_value():
    cells = tutorials.Cells()
    assert cells.show("a = 2\nfor b in range(2):\n    print(b)\na + b") == ("0\n1\n", 3)
    assert cells.show("a = 5") == ("", None) and cells.show("a") == ("", 5)
    with pytest.raises(ZeroDivisionError):
        cells.show("1 / 0")


@pytest.mark.parametrize("name", [*tutorials.PAGES, "notebook"])
def test_the_committed_pages_are_whole(name):
    page = (tutorials.DOCS / f"{name}.md").read_text(encoding="utf-8")
    shown = re.findall(rf"\]\(({tutorials.PICTURES}/[\w-]+\.png)\)", page)
    assert shown and all((tutorials.DOCS / file).stat().st_size < 60_000 for file in shown)
    screens = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(screens) >= 2 and all(screen.strip() for screen in screens)
    assert "Traceback" not in page and str(Path.home()) not in page and sys.prefix not in page
    assert name == "notebook" or {Path(file).stem for file in shown} <= set(tutorials.SOURCES)
