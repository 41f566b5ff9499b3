"""Memory of one GPU of several: against numbers worked out by hand."""

import json

import pytest
from test_plan import recipe_of, teacher  # noqa: F401

from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.planning.plan import Line, Plan
from stepdistill.planning.scale import Stack, memory_of_copies, memory_of_shards, scale


def test_memory_of_one_gpu():
    """A student of 40 B and its frozen teacher; 10 B in the largest block, 3 B outside; a head of 4 B beside it."""
    lines = [
        Line("teacher", weights=40),
        Line("student", weights=40, gradients=40, optimizer=80, average=40, activations=30),
        Line("head", weights=4, gradients=4, optimizer=8, activations=100),
        Line("encoders", weights=20),
    ]
    local = Plan(lines, 0, "")
    fixed = 40 + 40 + 80 + 40 + 4 + 8 + 20
    # In the exchange the student's gradients are there three times, when its activations are gone.
    assert memory_of_copies(local, 2) == fixed + max(40 + 2 * 40, 4 + 100) == fixed + 120
    assert memory_of_copies(local, 1) == fixed + 104
    stacks = [Stack(40, 10, 3), Stack(40, 10, 3)]
    # A quarter of 80 weights, 80 moments and 40 average; head and encoders whole; 2 blocks pass in the head's turn.
    assert memory_of_shards(local, stacks, ["student"], 4) == (80 + 80 + 40) / 4 + 4 + 8 + 20 + 6 + (4 + 100 + 20)
    assert memory_of_shards(local, stacks, ["student"], 1) == fixed + 104


def test_the_command(teacher, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(recipe_of(teacher)))
    assert cli.run(["plan", str(file), "--gpus", "4", "--gpu", "1", "--json"]) == 0
    copies, shards = json.loads(capsys.readouterr().out)["estimates"]
    assert (copies["gpus"], copies["rows"], copies["fits"]) == (4, 2, False)
    assert shards["shards"] and shards["memory"] < copies["memory"]
    assert cli.run(["plan", str(file), "--gpus", "4", "--gpu", "1"]) == 0
    assert "does not fit" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"train.batch_size: expected a multiple of GPUs .* \(3 x 1\), found 8"):
        scale(str(file), (), [3])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "--gpus: expected numbers separated by commas, found '0'"),
        (["--gpus", "8", "--gpu", "80", "--fit"], "--fit: expected it without --gpus"),
        (["--gpus", "8", "--seconds", "2"], "--seconds: expected it without --gpus"),
    ],
)
def test_wrong_options(arguments, said, capsys):
    assert cli.run(["plan", "quickstart", *arguments]) == 2
    assert said in capsys.readouterr().err
