"""What the documentation shows is true: the table of methods, and the example method."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from pipeline.tiny import save_dit, tiny_dit
from stepdistill import assets, cli
from stepdistill.methods import METHODS
from stepdistill.recipe import load
from stepdistill.session import build
from stepdistill.trainer import train

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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


def test_every_check_that_tracing_can_fail_is_explained():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "stepdistill" / "pipeline").glob("*.py"))
    page = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8").partition("| check |")[2]
    assert set(re.findall(r'TraceError\(\s*"([\w-]+)"', code)) == set(
        re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    )


def test_the_page_of_curves_is_what_its_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import reference_curves as script

    stored = json.loads(script.STORED.read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "curves.md").read_text(encoding="utf-8") == script.page(stored)
    assert set(stored["cases"]) == {path.stem for path in script.PICTURES.glob("*.png")} == set(script.CASES)


def shown(language: str) -> list[tuple[str, str]]:
    """(page, line) of everything in fenced blocks of this language, in the README and in docs/."""
    lines = []
    for page in PAGES:
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            lines += [(page.name, line.strip()) for line in block.splitlines() if line.strip()]
    return lines


COMMANDS = [pair for pair in shown("bash") if pair[1].startswith("stepdistill ")]


@pytest.mark.parametrize("page, line", COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in COMMANDS])
def test_every_command_that_is_shown_is_one(page, line):
    """Its verb, options and arguments exist, and so does a recipe that it names."""
    _, verb, *words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    group = typer.main.get_command(cli.app)
    assert verb in group.commands, line
    group.commands[verb].make_context(verb, list(words))
    for word in words[:1] if verb in ("train", "plan") else ():
        assert "RECIPE" in word or (Path(word).suffix == ".yaml" and "/" not in word) or assets.recipe(Path(word).stem)


def test_pages_name_recipes_and_methods_that_exist():
    for name in ("choosing.md", "your-model.md"):
        words = set(re.findall(r"`([a-z0-9_-]+)`", (ROOT / "docs" / name).read_text(encoding="utf-8")))
        recipes = {word for word in words if re.match(r"(fashion|sd15|sdxl|sd35|flux)_", word)}
        assert recipes and recipes <= set(assets.recipes()), recipes - set(assets.recipes())
    table = [line.split("|")[2] for line in (ROOT / "docs" / "choosing.md").read_text().splitlines() if "| `" in line]
    named = {word for cell in table for word in re.findall(r"`([a-z0-9-]+)`", cell)}
    assert len(named) > 8 and named <= set(METHODS), named - set(METHODS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_recipe_reference_is_that_of_the_schema():
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "scripts" / "recipe_reference.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python scripts/recipe_reference.py"


def built(root: Path, site: Path) -> subprocess.CompletedProcess:
    """The site as `make docs` builds it: with --quiet mkdocs counts no warnings, and --strict cannot fail."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)


def test_the_site_builds_without_a_warning(tmp_path):
    done = built(ROOT, tmp_path / "site")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert {path.parent.name for path in (tmp_path / "site").glob("*/index.html")} == pages
    for page in (tmp_path / "site").rglob("*.html"):
        for target in re.findall(r'<(?:a|img)[^>]* (?:href|src)="([^"#]*)', page.read_text(encoding="utf-8")):
            dead = target and "://" not in target and page.name != "404.html" and not (page.parent / target).exists()
            assert not dead, f"{page}: {target}"


@pytest.mark.parametrize(
    ("line", "fails"),
    [
        ("", 0),
        ("[lost](lost.md)", 1),
        ("![lost](pictures/lost.png)", 1),
        ("[lost](data.md#lost)", 1),
        ("[l](../lo/)", 1),
    ],
)
def test_a_dead_link_stops_the_site(line, fails, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(ROOT / "docs", root / "docs")
    for path in ROOT.iterdir():
        if path.name != "docs":
            (root / path.name).symlink_to(path)
    with open(root / "docs" / "faq.md", "a", encoding="utf-8") as page:
        page.write(f"\n{line}\n")
    assert built(root, tmp_path / "site").returncode == fails


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
