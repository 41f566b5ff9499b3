"""Every command that the README and docs/ show is run, on tiny stand-ins of the names in it, or says what it needs."""

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from pipeline.tiny import save_dit, tiny_dit, tiny_sd
from stepdistill import assets, cli
from stepdistill.demo.content import load_demo
from stepdistill.errors import InputError
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.recipe import load, yaml_lines
from stepdistill.training import distributed
from test_docs import ROOT, shown

NEEDS = re.compile(r"#.*\b(needs|downloads)\b")
"""What a command's comment says if no machine without network and GPU can run it, or not in seconds."""

SHORTER = {
    "train": [
        "train.steps=1",
        "train.batch_size=4",
        "train.accumulation=1",
        "train.lr_warmup=0",
        "train.preview_every=9",
        "report.samples=0",
        "train.tracker=none",
        "resume=never",
    ],
    "sample": ["--count", "2"],
    "bench": ["--samples", "4", "--steps", "2", "--no-solvers"],
    "export": ["--check", "off"],
}
"""Said behind a command, so that it ends in seconds."""


def commands() -> list[tuple[str, str]]:
    """(page, line) of everything in fenced shell blocks, each command once whatever its comment says."""
    found: dict[str, tuple[str, str]] = {}
    for page, line in shown("bash"):
        # The gallery's runs differ in nothing that matters here.
        line = re.sub(r"runs/comparison/\S+( .*) --out \S+", r"runs/NAME\1", line)
        found.setdefault(line.partition("#")[0].strip(), (page, line))
    return list(found.values())


def recipe(pipeline: str, output: str, **student: str | int) -> dict:
    return {
        "teacher": {"pipeline": pipeline, "guidance": {"scale": 1.5}},
        "student": {"steps": 2} | student,
        "method": {"name": "sfd", "substeps": 1},
        "train": {"steps": 1, "batch_size": 256, "lr": 1e-3, "preview_every": 9, "log_every": 1, "tracker": "none"},
        "report": {"samples": 0},
        "output": output,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name: pipelines, recipes, runs, reports."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_dit(tiny_dit(), folder / "PIPELINE")
        save_pipeline(tiny_sd(), folder / "my-sdxl")
        prompts = recipe("my-sdxl", "runs/mine", train="lora", rank=2)
        recipes = {
            "recipe.yaml": recipe("PIPELINE", "runs/recipe"),
            "prompts.yaml": prompts | {"data": {"conditions": ["a red shoe", "rain"]}},
        }
        for name, stated in recipes.items():
            Path(name).write_text(yaml_lines.dump(stated), encoding="utf-8")
            assert cli.run(["train", name, *SHORTER["train"]]) == 0
        for name in ("NAME", "quickstart", "fashion_dmd2", "emoji_dmd2", "short"):
            shutil.copytree("runs/recipe", f"runs/{name}")
        for name in ("sdxl", "my-student"):
            shutil.copytree("runs/mine", f"runs/{name}")
        shutil.copytree("runs/recipe/export", "my-student")
        shutil.copytree("PIPELINE", "my-teacher")
        for name in ("assets", "docs", "recipes", "Makefile", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        assert cli.run(["bench", "runs/NAME", "--out", "a", *SHORTER["bench"]]) == 0
        shutil.copytree("a", "b")
    return folder


def run(line: str) -> int:
    """Run a command that is shown; returns its exit code."""
    shorter = line.replace("fashion-dit", "PIPELINE").replace("--steps 50", "--steps 5")
    program, *words = shlex.split(shorter, comments=True)
    if program == "make":  # what its target calls has tests of its own
        return subprocess.run(["make", "--dry-run", *words], capture_output=True).returncode
    if program == "python":  # so has a script
        return 0 if any((ROOT / "tests").rglob(f"test_{Path(words[0]).name}")) else 1
    assert program == "stepdistill", "say in a comment what it needs"
    if ">" not in words:
        return cli.run([*words, *([] if "--check" in words else SHORTER.get(words[0], ()))])
    *words, _, out = words
    with open(out, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        return cli.run([*words, *SHORTER.get(words[0], ())])


def twin(line: str) -> tuple[str, ...]:
    """What commands have in common that differ in names and values alone: one of them is run."""
    words = shlex.split(line, comments=True)
    options = [word.partition("=")[0] for word in words[2:] if word.startswith(("-", "distributed.")) or word == ">"]
    return (*words[:2], *sorted(options))


def valid(line: str) -> bool:
    """Whether the recipe of a train command that is not run takes the command's settings."""
    _, command, *words = shlex.split(line, comments=True)
    try:
        if command == "train":
            load(words[0], [word for word in words[1:] if not word.startswith("-")])
    except InputError as error:
        print(error, file=sys.stderr)
        return False
    return True


@pytest.mark.timeout(900)
def test_every_command_that_is_shown_runs(place, monkeypatch, capsys):
    """One test, because the commands share a folder that takes longer to make than most of them run."""
    monkeypatch.chdir(place)
    # gradio is an extra: all of the demo but the page. Several processes: tests/training/test_distributed.py.
    page = types.SimpleNamespace(serve=lambda student, teacher, _, size: load_demo(student, teacher, size))
    monkeypatch.setitem(sys.modules, "stepdistill.demo.page", page)
    (place / "two.txt").write_text("a red shoe\nrain\n", encoding="utf-8")
    monkeypatch.setattr(assets, "prompts", lambda name: place / "two.txt")  # the shipped list is of hundreds
    launched = []
    monkeypatch.setattr(distributed, "launch", lambda arguments, processes: launched.append(processes) or 0)
    lines = [(page, line) for page, line in commands() if not NEEDS.search(line)]
    assert len(lines) > 40
    failed, seen = [], set()
    for page, line in lines:
        again = twin(line) in seen and line.startswith("stepdistill ") and not line.startswith("stepdistill init")
        seen.add(twin(line))
        if not (valid(line) if again else run(line) == 0):
            failed.append(f"{page}: {line}\n{capsys.readouterr().err}")
    assert not failed, "\n\n".join(failed)
    assert launched == [2] * len(launched) and launched
