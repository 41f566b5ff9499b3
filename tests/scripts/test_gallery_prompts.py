"""The script of the gallery of prompts: the commands on its page draw the pictures above them."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.tiny import tiny_sd
from stepdistill import cli
from stepdistill.pipeline.folder import save_pipeline

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a teacher, its student, prompts and measured rows."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "student"):
        save_pipeline(tiny_sd(), tmp_path / name)
    facts = {"teacher": "teacher", "guidance": 2.0, "method": "sfd", "steps": 2}
    Path("student/stepdistill.json").write_text(json.dumps(facts))
    Path("prompts.txt").write_text("a red shoe\nrain\n")
    rows = [
        {"name": name, "role": "solver", "steps": 2, "nfe": nfe, "guidance": 1.0, "metrics": {"fd_enet": fd}}
        for name, nfe, fd in (("DDIM", 2, 3.0), ("UniPC", 2, 2.0), ("DPM-Solver++", 4, 1.0))
    ]
    Path("report.json").write_text(json.dumps({"rows": rows}))
    return tmp_path


def test_the_commands_draw_the_pictures(place, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import gallery_prompts as script

    monkeypatch.setattr(script, "TEACHER_STEPS", 3)
    monkeypatch.setattr(script, "STEPS", (2, 1))
    arguments = [
        "student",
        "--measured",
        "report.json",
        "--prompts",
        "prompts.txt",
        "--docs",
        str(place),
        "--seed",
        "3",
    ]
    monkeypatch.setattr(sys, "argv", ["gallery_prompts.py", *arguments])
    script.main()
    page = Path("gallery_emoji.md").read_text(encoding="utf-8")
    assert "- a red shoe · rain\n" in page and "(seed 3)" in page and "The teacher under UniPC: 2 steps" in page
    assert "The teacher, guidance 2: 3 steps, NFE 6" in page and "trained for 2 steps: 1 step, NFE 1" in page
    shown = dict(re.findall(r"\]\((pictures/gallery_emoji/[\w-]+\.webp)\)\n\n(?:```bash\nstepdistill (.*)\n)?", page))
    assert [Path(one).stem for one in shown] == ["teacher", "solver", "student-2", "student-1"]
    for picture, command in shown.items():
        assert bool(command) == ("solver" not in picture)
        if command:
            assert cli.run([*shlex.split(command), "--out", "again.png"]) == 0
            assert np.array_equal(np.array(Image.open("again.png")), np.array(Image.open(picture)))
