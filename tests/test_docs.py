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
import typer

from pipeline.tiny import save_dit, tiny_dit
from stepdistill import assets, cli
from stepdistill.data.sources import FORMS
from stepdistill.methods import FAMILIES, METHODS
from stepdistill.run import train

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = ROOT / "docs" / "examples" / "my_method.py"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_methods_are_counted_and_listed_as_their_classes_say():
    written = script("methods_table")
    assert written.PAGE.read_text(encoding="utf-8") == written.page(), "run python scripts/methods_table.py"
    assert written.README.read_text(encoding="utf-8") == written.readme(), "run python scripts/methods_table.py"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_paper_and_family(name):
    method = METHODS[name]
    assert re.search(r"\b20\d\d\b", method.paper) and name in FAMILIES[method.family]
    inherited = [vars(base) for base in method.__mro__[1:]]
    assert all(vars(method)[key] for key in ("name", "paper", "summary"))
    assert not any(base.get("name") == name for base in inherited)


def test_forms_that_are_not_whole_are_marked():
    """Those that were offered as whole ones once, and those whose file says that a part of the paper is left out."""
    section = PAGE.partition("## Partial forms")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^- `([\w-]+)`: ", section, re.MULTILINE))
    said = {name for name in METHODS if "left out" in (sys.modules[METHODS[name].__module__].__doc__ or "")}
    assert len(said) > 2 and {"sfd", "guide", "tscd"} | said <= listed <= set(METHODS)


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


def test_every_verb_that_a_sentence_names_is_one():
    """Such as that of the row for who wants to invert and edit pictures."""
    named = set(re.findall(r"`stepdistill ([a-z]\w*)", "".join(page.read_text(encoding="utf-8") for page in PAGES)))
    assert "edit" in named and named <= set(typer.main.get_command(cli.app).commands)


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
    written = script("recipe_reference")
    assert written.PAGE.read_text(encoding="utf-8") == written.page(), "run python scripts/recipe_reference.py"
    assert written.LIST.read_text(encoding="utf-8") == written.methods(), "run python scripts/recipe_reference.py"


def test_the_sweep_of_diffusers_tests_is_shown_as_it_is_stored():
    written = script("sweep_table")
    assert written.PAGE.read_text(encoding="utf-8") == written.page(), "run python scripts/sweep_table.py"
    built = [row for row in json.loads(written.STORED.read_text(encoding="utf-8"))["rows"] if row.get("built")]
    traced = written.share(sum(row["traced"] for row in built), len(built)).replace("%", " %")
    assert f"[{traced} are traced](docs/pipelines.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_form_of_input_is_listed_with_a_test_that_exists():
    written = script("inputs_table")
    assert written.PAGE.read_text(encoding="utf-8") == written.page(), "run python scripts/inputs_table.py"
    assert list(written.missing()) == []
    rows = [cells for section in written.ROWS.values() for cells in section]
    listed = " ".join(form for form, _, _ in rows)
    assert all(f"`{ending}`" in listed or ending == ".tar" for ending in FORMS)


def built(root: Path, site: Path, **said: str) -> subprocess.CompletedProcess:
    """The site as `make docs` builds it: with --quiet mkdocs counts no warnings, and --strict cannot fail."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    names = ("REPOSITORY_URL", "CI_PROJECT_URL", "GITHUB_REPOSITORY", "GITHUB_SERVER_URL")
    environment = {key: value for key, value in os.environ.items() if key not in names} | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment | said)


def test_the_site_builds_without_a_warning(tmp_path):
    """As the CI of a fork on GitHub builds it, so pages lead to the fork, and the notebook opens from there."""
    done = built(ROOT, tmp_path / "site", GITHUB_REPOSITORY="me/fork", GITHUB_SERVER_URL="https://github.com")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    notebook = (tmp_path / "site" / "notebook" / "index.html").read_text(encoding="utf-8")
    place = "github/me/fork/blob/HEAD/docs/examples/quickstart.ipynb"
    assert (
        f'href="https://colab.research.google.com/{place}"' in notebook
        and EXAMPLE.with_name("quickstart.ipynb").is_file()
    )
    assert 'href="https://github.com/me/fork"' in notebook and "me/fork</" in "".join(notebook.split())
    for page in ("notebook/index.html", "404.html"):  # with it the theme asks GitHub for stars
        assert 'data-md-component="source"' not in (tmp_path / "site" / page).read_text(encoding="utf-8")
    methods = (tmp_path / "site" / "methods" / "index.html").read_text(encoding="utf-8")
    assert 'href="https://github.com/me/fork/blob/HEAD/tests/oracles"' in methods
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} | {"messages"}
    assert {path.parent.name for path in (tmp_path / "site").glob("*/index.html")} == pages
    messages = (tmp_path / "site" / "messages" / "index.html").read_text(encoding="utf-8")
    assert messages.count("<strong>") > 300 and "exists and is not an export of stepdistill" in messages
    for page in (tmp_path / "site").rglob("*.html"):
        for target in re.findall(r'<(?:a|img)[^>]* (?:href|src)="([^"#]*)', page.read_text(encoding="utf-8")):
            dead = target and "://" not in target and page.name != "404.html" and not (page.parent / target).exists()
            assert not dead, f"{page}: {target}"


@pytest.mark.parametrize(
    ("said", "address", "in_colab"),
    [
        ({}, "", False),
        ({"GITHUB_REPOSITORY": "a/b"}, "https://github.com/a/b", True),
        ({"GITHUB_REPOSITORY": "a/b", "GITHUB_SERVER_URL": "https://git.a.org"}, "https://git.a.org/a/b", False),
        ({"CI_PROJECT_URL": "https://gitlab.com/a/b"}, "https://gitlab.com/a/b", False),
        ({"REPOSITORY_URL": "https://github.com/a/b.git", "GITHUB_REPOSITORY": "c/d"}, "https://github.com/a/b", True),
    ],
)
def test_the_repository_is_where_the_environment_says(said, address, in_colab):
    links = script("site_links")
    assert links.repository(said) == address and bool(links.colab(address)) == in_colab


def test_dead_links_stop_the_site(tmp_path):
    """Each kind is a warning of its own: a page, a picture, a heading, and what names no file."""
    root, targets = tmp_path / "root", ("lost.md", "pictures/lost.png", "data.md#lost", "../lo/")
    shutil.copytree(ROOT / "docs", root / "docs")
    for path in ROOT.iterdir():
        if path.name != "docs":
            (root / path.name).symlink_to(path)
    with open(root / "docs" / "faq.md", "a", encoding="utf-8") as page:
        page.write("\n[lost](lost.md) ![lost](pictures/lost.png) [lost](data.md#lost) [l](../lo/)\n")
    done = built(root, tmp_path / "site")
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    assert done.returncode == 1 and len(warnings) == len(targets)
    assert [target for target in targets if not any(f"'{target}'" in line for line in warnings)] == []


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
