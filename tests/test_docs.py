"""What the documentation shows is true: the table of methods, and the example method."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.tiny import save_dit, tiny_dit
from stepdistill import assets
from stepdistill.methods import METHODS
from stepdistill.recipe import load
from stepdistill.session import build
from stepdistill.trainer import train

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "docs" / "examples" / "my_method.py"


def listed() -> dict[str, list[str]]:
    """The table's rows by method."""
    lines = [line.strip("|") for line in PAGE.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_table_lists_every_method_once():
    assert list(listed()) == list(dict.fromkeys(listed())) and set(listed()) == set(METHODS)
    assert PAGE.count("| `") == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_table_says_what_a_method_is(name):
    """Paper, data, networks, steps and sampler, as its comparison recipes set it up."""
    method, shipped = METHODS[name], [load(one) for one in assets.recipes() if one.startswith("fashion_")]
    recipes = [recipe for recipe in shipped if recipe.method.name == name]
    assert recipes, f"{name} has no recipe fashion_*.yaml"
    needs = [method.data_needs(recipe.method.config) for recipe in recipes]
    wanted = {"images": any(need.images for need in needs), "trajectories": any(need.paths for need in needs)}
    data = ["conditions", *(kind for kind, does in wanted.items() if does)]
    networks = sorted({*method.extra_roles, *method.players} - {"student"})
    steps = sorted({recipe.student.steps for recipe in recipes})
    samplers = dict.fromkeys(method.sampler_of(recipe.method.config) for recipe in recipes)
    paper, *facts = listed()[name]
    assert re.search(r"\b20\d\d\b", paper)
    assert facts == [", ".join(data), ", ".join(networks) or "–", ", ".join(map(str, steps)), ", ".join(samplers)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    save_dit(tiny_dit(), folder)
    return folder


def recipe_of(teacher: Path, out: Path, method: str) -> dict:
    keys = {"batch_size": 4, "lr": 1e-3, "log_every": 1, "preview_every": 100, "tracker": "none"}
    return {
        "teacher": {"pipeline": str(teacher), "guidance": {"scale": 1.5}},
        "student": {"steps": 2},
        "method": {"name": method, "substeps": 3},
        "train": {"steps": 3} | keys,
        "report": {"samples": 0},
        "output": str(out),
    }


def test_the_example_method_trains_from_its_file(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    method = re.search(r"name: (docs/examples/\S+)", PAGE).group(1)
    assert (ROOT / method.partition(":")[0]) == EXAMPLE
    result = train(recipe_of(teacher, tmp_path / "run", method))
    assert result.step == 3 and (tmp_path / "run" / "export" / "model_index.json").is_file()
    assert '"student/loss/match"' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_the_page_shows_the_file_as_it_is():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    source = EXAMPLE.read_text(encoding="utf-8")
    lines = [line for line in block.splitlines() if line.strip()]
    assert lines and all(f"{line}\n" in source for line in lines)
    assert len(source.splitlines()) < 60


def test_the_example_method_is_right_where_the_teacher_is(teacher, tmp_path):
    """With one teacher step for one of the student, a student that is the unguided teacher has nothing to learn."""
    stated = recipe_of(teacher, tmp_path / "run", f"{EXAMPLE}:MyMethod")
    stated["teacher"]["guidance"]["scale"] = 1.0
    for substeps, zero in ((1, True), (2, False)):
        stated["method"]["substeps"] = substeps
        session = build(load(stated), torch.device("cpu"))
        loss = session.method.losses("student", session.batch(0, 0, 4))["match"].item()
        assert (loss < 1e-10) == zero
