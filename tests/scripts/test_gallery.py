"""The gallery's script: the commands on its page draw the pictures above them."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.tiny import CLASSES, save_dit, tiny_dit
from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.eval.bench.sources import read_source

SCRIPT = Path(__file__).parents[2] / "scripts" / "gallery.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gallery", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gallery", module)
        spec.loader.exec_module(module)
        patch.setattr(module, "TEACHER_STEPS", 3)
        yield module


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a teacher and the exports of two students, one of another teacher."""
    folder = tmp_path_factory.mktemp("gallery")
    save_dit(tiny_dit(), folder / "teacher")
    for name, teacher in (("walk-seed0", "teacher"), ("other-seed0", "elsewhere")):
        export = folder / "runs" / "comparison" / name / "export"
        save_dit(tiny_dit(), export)
        facts = {"teacher": teacher, "guidance": 1.5, "method": "sfd", "steps": 2}
        (export / "stepdistill.json").write_text(json.dumps(facts))
    return folder


def test_the_commands_draw_the_pictures(script, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    arguments = ["gallery.py", "runs/comparison/walk-seed0/export", "--docs", str(tmp_path), "--seed", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    page = (tmp_path / "gallery.md").read_text(encoding="utf-8")
    assert ", ".join(CLASSES) in page and "(seed 3)" in page
    assert "--methods walk'" in page
    shown = re.findall(r"\]\((pictures/gallery/\w+\.png)\)", page)
    assert [Path(one).stem for one in shown] == ["teacher", "solver", "walk"]
    assert "guidance 1.5: 3 steps, NFE 6" in page and "walk: 2 steps, NFE 2" in page
    commands = re.findall(r"^stepdistill (.*)$", page, flags=re.MULTILINE)
    for command, file in zip(commands, (shown[0], shown[2]), strict=True):
        monkeypatch.chdir(place)
        assert cli.run(shlex.split(command)) == 0
        drawn = np.array(Image.open(place / Path(file).name))
        assert np.array_equal(np.array(Image.open(tmp_path / file)), drawn.repeat(2, 0).repeat(2, 1))
    solver, teacher = (np.array(Image.open(tmp_path / file)) for file in (shown[1], shown[0]))
    assert solver.shape == teacher.shape and not np.array_equal(solver, teacher)


def test_the_best_solver_is_that_of_the_rows(script, tmp_path):
    found = [("DDIM", 4, 4, 1.0, 3.0), ("UniPC w=2", 2, 4, 2.0, 2.0), ("DDIM", 8, 8, 1.0, 1.0)]
    rows = [
        {"name": name, "role": "solver", "steps": steps, "nfe": nfe, "guidance": w, "metrics": {"fd_classifier": fd}}
        for name, steps, nfe, w, fd in found
    ]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    assert script.best_solver(tmp_path / "rows.json") == ("UniPC", 2, 2.0)


def test_rows_that_do_not_belong_together_are_refused(script, place):
    runs = [read_source(place / "runs" / "comparison" / name / "export") for name in ("walk-seed0", "other-seed0")]
    with pytest.raises(InputError, match="another teacher or guidance"):
        script.planned(runs, 0)
    with pytest.raises(InputError, match=r"found no stepdistill.json"):
        script.planned([read_source(place / "teacher")], 0)
