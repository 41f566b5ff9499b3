"""A recipe is read, overridden, resolved and written back without loss."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.methods import METHODS
from stepdistill.recipe import Recipe, load, yaml_lines

MINIMAL: dict[str, Any] = {
    "teacher": {"pipeline": "owner/name"},
    "student": {"steps": 4},
    "method": {"name": "sfd"},
    "train": {"steps": 10, "batch_size": 8, "lr": 1e-4},
}


def test_defaults_are_resolved() -> None:
    recipe = load(MINIMAL)
    assert recipe.teacher.guidance.scale == 1
    assert recipe.train.critic_lr == recipe.train.lr
    assert recipe.data.conditions == "classes"
    assert recipe.output == "runs/sfd"
    assert recipe.method.config.substeps == METHODS["sfd"].Config().substeps
    assert "substeps" in recipe.to_yaml()


def test_overrides_reach_every_section_and_the_last_one_wins() -> None:
    recipe = load(
        MINIMAL, ["train.lr=1e-3", "train.lr=2e-3", "method.substeps=5", "data.conditions=[a, b]", "output=x"]
    )
    assert (recipe.train.lr, recipe.train.critic_lr) == (2e-3, 2e-3)
    assert recipe.method.config.substeps == 5
    assert recipe.data.conditions == ["a", "b"]
    assert recipe.output == "x"


def test_a_whole_section_can_be_given_in_one_override() -> None:
    assert load(MINIMAL, ["report={samples: 0}", "report.steps=[3]"]).report.steps == [3]


def test_the_source_is_not_changed() -> None:
    load(MINIMAL, ["train.lr=1"])
    assert MINIMAL["train"]["lr"] == 1e-4


def test_a_file_names_its_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml_lines.dump(MINIMAL))
    assert load(file).output == "runs/mine"


def test_the_resolved_recipe_feeds_back_in_unchanged(tmp_path: Path) -> None:
    recipe = load(MINIMAL)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load(file) == recipe
    assert load(file).to_yaml() == recipe.to_yaml()
    assert load(recipe) == recipe


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1.5E+3", 1500.0), (".5", 0.5), ("2", 2.0)])
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert load(MINIMAL, [f"train.lr={text}"]).train.lr == value


def test_yes_and_dates_and_leading_zeros_are_text() -> None:
    assert yaml_lines.read("[yes, off, 2024-01-01, 010, 1:30, ~, true]", "x")[0] == [
        *("yes", "off", "2024-01-01", "010", "1:30"),
        None,
        True,
    ]


def test_a_method_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from stepdistill.methods import DistillMethod, MethodConfig\n"
        "class MyConfig(MethodConfig):\n    strength: int = 3\n"
        "class Mine(DistillMethod):\n    Config = MyConfig\n    summary = 'mine'\n"
        "    def losses(self, player, batch):\n        return {}\n"
    )
    recipe = load(MINIMAL, [f"method={{name: '{file}:Mine', strength: 4}}"])
    assert recipe.method.config.strength == 4
    assert recipe.method.implementation.summary == "mine"
    assert recipe.output == "runs/Mine"
    assert load(recipe) == recipe


@pytest.mark.parametrize("name", assets.recipes())
def test_shipped_recipes_load(name: str) -> None:
    text = assets.recipe(name).read_text()
    # Some want images of the user's own, or of a script, and say so.
    missing = any(folder in text for folder in ("data/images", "build/emoji"))
    recipe = load(name, ["data.images=fashion-mnist"] if missing else [])
    assert recipe.output == f"runs/{name}"
    assert text.startswith("# "), "a recipe starts with a comment that says what it does"
    assert recipe.report.samples, "a shipped recipe ends with a report"


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=10)


@given(trees)
def test_yaml_round_trip(tree: Any) -> None:
    assert yaml_lines.read(yaml_lines.dump(tree), "x")[0] == tree


positive = st.floats(1e-12, 1e6)


@given(
    data=st.data(),
    conditions=st.lists(texts, min_size=1, max_size=3),
    train=st.fixed_dictionaries(
        {"steps": st.integers(1, 10**6), "lr": positive},
        optional={
            "critic_lr": positive | st.none(),
            "betas": st.lists(st.floats(0, 0.9999), min_size=2, max_size=2),
            "seed": st.integers(0, 2**32 - 1),
            "precision": st.sampled_from(["fp32", "bf16"]),
            "clip": st.floats(0, 100),
        },
    ),
    accumulation=st.integers(1, 8),
    output=texts.filter(lambda name: "/" not in name and "\0" not in name and len(name.encode()) < 200),
)
def test_recipe_round_trip(data: Any, conditions: list[str], train: dict, accumulation: int, output: str) -> None:
    train |= {"accumulation": accumulation, "batch_size": accumulation * data.draw(st.integers(1, 64))}
    recipe = load({**MINIMAL, "data": {"conditions": conditions}, "train": train, "output": output})
    tree, _ = yaml_lines.read(recipe.to_yaml(), "x")
    assert load(tree) == recipe
    assert load(tree).to_yaml() == recipe.to_yaml()


def _length(tree: Any) -> int:
    return len(tree) if isinstance(tree, list) else 0


@given(st.text("ab:-,[]{}\"'#&*!|>%@ \t\n019.~?", max_size=40))
def test_any_text_is_a_recipe_or_an_input_error(text: str) -> None:
    try:
        tree, lines = yaml_lines.read(text, "x.yaml")
    except InputError as error:
        assert str(error).startswith("x.yaml:") and "\n" not in str(error)
    else:
        assert {keys[0] for keys in lines} == (set(tree) if isinstance(tree, dict) else set(range(_length(tree))))


@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "other"]), trees), st.lists(texts, max_size=2))
def test_any_tree_is_a_recipe_or_an_input_error(tree: dict[str, Any], overrides: list[str]) -> None:
    try:
        load(tree, overrides)
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "override, problem",
    [
        ("train.steps=600", "train.steps: expected more than 600, at which the phase of 4 steps begins"),
        ("method.start_steps=24", "method.start_steps: expected student.steps times 2, 4, 8, ..., found 24"),
    ],
)
def test_a_method_refuses_a_run_that_does_not_fit_it(override, problem):
    with pytest.raises(InputError, match=re.escape(f"override '{override}': {problem}")):
        load("fashion_pd", [override])


def test_a_pipeline_below_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text("{}")
    recipe = load("quickstart", ["teacher.pipeline=~/mine"])
    assert recipe.teacher.pipeline == str(tmp_path / "mine")
