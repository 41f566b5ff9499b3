"""A key is set in the text of a recipe, and nothing else in the file changes; what is no YAML is refused."""

import pytest

from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.recipe.yaml_lines import put, read

TEXT = """\
# Mine.
train:   # how long
  steps: 10
  lr: 1e-4   # as the paper
  clip:
  betas: [0.5,
    0.9]     # of both

# What is measured.
report: {samples: 0}
"""


@pytest.mark.parametrize(
    "keys, value, before, after",
    [
        (("train", "lr"), 2e-4, "lr: 1e-4   # as", "lr: 0.0002   # as"),
        (("train", "clip"), 0.5, "clip:\n", "clip: 0.5\n"),
        (("report", "samples"), 5, "{samples: 0}", "{samples: 5}"),
        (("report", "solvers"), False, "0}", "0, solvers: false}"),
        (("train", "compile"), True, "# of both\n", "# of both\n  compile: true\n"),
        (("export", "keys"), "kohya", "0}\n", "0}\nexport:\n  keys: kohya\n"),
        (("output",), "yes", "0}\n", "0}\noutput: 'yes'\n"),
    ],
)
def test_one_key_is_set_and_the_rest_of_the_text_stays(keys, value, before, after) -> None:
    assert put(TEXT, keys, value, "x") == TEXT.replace(before, after)


@pytest.mark.parametrize("keys, line", [(("train",), 2), (("train", "betas"), 6), (("train", "clip", "low"), 5)])
def test_what_is_no_scalar_on_the_keys_line_is_left_to_the_user(keys, line) -> None:
    with pytest.raises(InputError, match=rf"x:{line}: .*put '{keys[-1]}: 2'"):
        put(TEXT, keys, 2, "x")


@pytest.mark.parametrize("name", assets.recipes())
def test_shipped_recipes_can_be_edited(name) -> None:
    text = assets.recipe(name).read_text()
    for keys in (("train", "steps"), ("train", "accumulation"), ("teacher", "quantize"), ("evaluation", "every")):
        tree, edited = read(text, name)[0], put(text, keys, 7, name)
        tree.setdefault(keys[0], {})[keys[1]] = 7
        assert read(edited, name)[0] == tree
        # Apart from the edited line and at most two new ones, every line is there in its order.
        kept = iter(edited.splitlines())
        assert sum(line not in kept for line in text.splitlines() if not line.strip().startswith(f"{keys[1]}:")) == 0


@pytest.mark.parametrize("text, problem", [("a: 1\nb: \x01", "x:2: "), ("[" * 1500 + "]" * 1500, "x:1: .*deep")])
def test_what_cannot_be_parsed_is_refused_with_its_line(text, problem) -> None:
    with pytest.raises(InputError, match=problem):
        read(text, "x")
