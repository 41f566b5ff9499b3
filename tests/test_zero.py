"""DeepSpeed's ZeRO trains what one process does, and goes on where another kind of run stopped."""

import copy
import shutil
from pathlib import Path

import pytest

from stepdistill.exporting import export
from stepdistill.generation import run_samples
from stepdistill.trainer import train
from stock_here import call_here
from test_distributed import CASES as COPIES
from test_distributed import assert_same_weights, distances, made_once, newest, train_together
from test_trainer import GAN, make_recipe, pictures, teacher  # noqa: F401

pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed compiles its exchange between processes"),
    pytest.mark.timeout(900),
]

CASES = COPIES | {"half": (GAN, {"precision": "bf16", "gradient_checkpointing": "elementwise"})}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def runs(request, teacher, pictures, tmp_path_factory) -> Path:  # noqa: F811
    """Every case trained by one process in folder CASE-1, by several with ZeRO's stages in CASE-2 and CASE-3.

    Cases gan-2 and gan-3 begin in one process, go on in several, and end in one.
    """
    count = request.param
    return made_once(tmp_path_factory, f"zero-{count}", lambda place: make_runs(place, count, teacher, pictures))


def make_runs(place: Path, processes: int, teacher: Path, pictures: Path) -> None:  # noqa: F811
    def recipe(case: str, kind: str, steps: int = 3) -> dict:
        method, changes = CASES[case]
        changes = {"steps": steps, "lr": 2e-4} | copy.deepcopy(changes)
        if kind == "3" and changes.get("gradient_checkpointing") is True:
            del changes["gradient_checkpointing"]
        made = make_recipe(teacher, place / f"{case}-{kind}", method, pictures, **changes)
        return made | {"distributed": {"zero": None if kind == "1" else int(kind)}}

    together = [recipe(case, stage, steps=2 if case == "gan" else 3) for case in CASES for stage in "23"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "call_elsewhere", call_here)
        patch.setattr(run_samples, "TEACHER_STEPS", 2)
        for alone in [*(recipe(case, "1") for case in CASES), *(recipe("gan", stage, steps=1) for stage in "23")]:
            train(alone)
        train_together(together, place, processes)
        for stage in "23":
            train(recipe("gan", stage))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_processes_with_zero_train_what_one_does(case, stage, runs):
    one, several = newest(runs / f"{case}-1"), newest(runs / f"{case}-{stage}")
    if case != "half":
        assert_same_weights(one, several)
    else:  # Adam makes a step of any rounding where a gradient is nearly nothing
        assert one.keys() == several.keys()
        assert (distances(one, several) > 1e-5).double().mean() < 1e-2
