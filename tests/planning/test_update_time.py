"""The seconds of a mean update, from a number or from a run that has measured them."""

import json

import pytest
from test_plan import recipe_of, teacher  # noqa: F401

from stepdistill.errors import InputError
from stepdistill.planning.update_time import seconds_alone

KINDS = {("student", "critic"): 0.25, ("critic",): 0.75}


def test_seconds_of_a_run(tmp_path, teacher):  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    recipe = recipe_of(teacher)
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    both = {"student/grad_norm": 1.0, "critic/grad_norm": 1.0, "critic/grad_norm/gan": 1.0}
    lines = [both | {"seconds": seconds} for seconds in (90.0, 4.0, 4.0)] + [{"critic/grad_norm": 1.0, "seconds": 2.0}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"evaluations": 7}])))
    # 0.25 x 4 + 0.75 x 2, for a batch of 24 instead of 8.
    assert seconds_alone(str(run), KINDS, 24) == 2.5 * 3
    assert seconds_alone("2.5", KINDS, 24) == 2.5
    with pytest.raises(InputError, match=r"a logged step in .*run in which discriminator and student move, found none"):
        seconds_alone(str(run), {("student", "discriminator"): 1.0}, 8)
    with pytest.raises(
        InputError, match=r"--seconds: expected a number or a run folder with metrics\.jsonl, found 'x'"
    ):
        seconds_alone("x", KINDS, 8)
