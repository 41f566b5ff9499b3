"""The tables of what trains on which card are those of the stored numbers."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fit_table.py"


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


def test_a_card_gets_the_first_way_that_leaves_room_for_the_driver(script):
    ways = {"": {"peak": 40.0}, "fp8": {"peak": 23.0}, "nf4": None, "offload": {"peak": 10.0}}
    assert script["cells"](ways) == ["offload", "fp8", "fp8", "yes", "yes", "40.0", "23.0", "", "10.0"]


def test_page_and_readme_are_made_of_the_numbers(script):
    numbers = json.loads(script["NUMBERS"].read_text(encoding="utf-8"))
    numbers = {name: numbers[name] for name in script["MODELS"] if name in numbers}
    assert script["page"](numbers) == script["PAGE"].read_text(encoding="utf-8")
    assert script["first_table"](numbers) in (SCRIPT.parents[1] / "README.md").read_text(encoding="utf-8")
