"""The README's moving picture: what each row shows after so many passes."""

from pathlib import Path

from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_rows_run_on_one_clock_of_passes(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import first_picture as script

    pictures = [Image.new("L", (10, 4), 80 * number) for number in range(3)]
    slow, fast = script.Row("teacher", pictures, 2), script.Row("student", pictures[:2], 1)
    assert [slow.at(passes)[0] for passes in (0, 1, 2, 3, 4, 9)] == [pictures[k] for k in (0, 0, 1, 1, 2, 2)]
    assert [fast.at(passes)[1] for passes in (0, 1, 7)] == ["after 0 passes", "done after 1 pass", "done after 1 pass"]
    assert script.frame([slow, fast], 2).size == (script.LABEL + 20, 16)
