"""The pieces of scripts/walk.py: what a terminal shows, what is kept of it, and the page."""

import io
import socket
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.progress import Progress

from stepdistill import assets
from stepdistill.recipe import load

walk = pytest.importorskip("walk")  # terminals as it opens them are not on Windows


def test_a_screen_is_what_a_terminal_shows_in_the_end():
    assert walk.screen("a\r\nbc\rd\r\n\x1b[1;32mgreen\x1b[0m\r\n") == ["a", "dc", "green"]
    assert walk.screen("12345678", columns=3) == ["123", "456", "78"]
    assert walk.screen("one\r\ntwo\r\n\x1b[1A\x1b[2Kthree") == ["one", "three"]
    out = io.StringIO()
    with Progress(console=Console(file=out, width=80, force_terminal=True)) as bar:
        task = bar.add_task("work", total=3)
        bar.console.print("said meanwhile")
        bar.update(task, completed=3)
    lines = walk.screen(out.getvalue().replace("\n", "\r\n"))
    assert lines[0] == "said meanwhile" and lines[1].startswith("work ") and "100%" in lines[1] and len(lines) == 2


def test_long_screens_keep_their_ends_and_no_place_of_this_machine(tmp_path):
    lines = ["", *(f"{number}" for number in range(9)), ""]
    assert (
        walk.kept(lines, 2, 3) == ["0", "1", "... (4 lines)", "6", "7", "8"] and walk.kept(lines, 5, 3) == lines[1:-1]
    )
    said = f"{tmp_path}/runs on {socket.gethostname()}, {walk.ROOT}/recipes, {Path.home()}/.cache"
    assert walk.without_places(said, tmp_path) == "~/walk/runs on machine, ~/stepdistill/recipes, ~/.cache"


def test_a_command_is_run_on_a_terminal_of_80_columns(tmp_path):
    seen = walk.run(walk.Step("Version", "", "stepdistill --version"), tmp_path)
    assert seen.code == 0 and seen.seconds > 0 and seen.lines[0].startswith("stepdistill ")
    wrong = walk.run(walk.Step("Wrong", "", "stepdistill train no-such-recipe-anywhere-at-all"), tmp_path)
    assert wrong.code == 2 and max(map(len, wrong.lines)) <= 80 and wrong.lines[0].startswith("error: ")


def test_the_recipe_of_the_stand_in_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(walk.PROMPTS))
    shipped = yaml.safe_load(assets.recipe("sdxl_dmd2_lora_24gb").read_text(encoding="utf-8"))
    changed = walk.changed(shipped, walk.CHANGED | walk.SHORTER)
    assert changed["train"]["steps"] == 20 and shipped["train"]["steps"] == 20000
    assert load(changed | {"teacher": shipped["teacher"]}).output == "runs/sdxl"


def test_the_committed_page_has_every_step_as_it_is_run():
    step = walk.Step("Version", "It answers.", "stepdistill --version")
    page = walk.page({step: walk.Seen(1.25, 1, ["stepdistill 0"])})
    assert "| 1. Version | 1 |" in page and "```text\n$ stepdistill --version\nstepdistill 0\n```" in page
    assert "It answers. It took 1.2 seconds, exit code 1." in page
    committed = walk.PAGE.read_text(encoding="utf-8")
    assert [step.command for step in walk.STEPS if f"\n$ {step.command}\n" not in committed] == []
    shown = [step.picture for step in walk.STEPS if step.picture]
    assert [file for file in shown if not (walk.PAGE.parent / walk.PICTURES / file).is_file()] == []
    assert len(shown) == committed.count(f"]({walk.PICTURES}/") == 3
    assert "exit code" not in committed and str(Path.home()) not in committed and len(committed) < 30_000
    assert sys.prefix not in committed
