"""The plan for several GPUs: its arithmetic against numbers worked out by hand."""

import json

import pytest

from stepdistill import cli, plan
from stepdistill.errors import InputError
from stepdistill.plan import Line, Plan
from stepdistill.plan_scale import (
    Links,
    Stack,
    Traffic,
    kinds_of_steps,
    links_of,
    memory_of_copies,
    memory_of_shards,
    scale,
    seconds_alone,
    stacks_of,
    traffic_of,
)
from stepdistill.recipe import load
from test_plan import recipe_of, teacher  # noqa: F401

KINDS = {("student", "critic"): 0.25, ("critic",): 0.75}


def test_what_a_ring_sends():
    traffic = Traffic(gradients=8e9, gathered=30e9, scattered=4e9, copied=1e9)
    assert traffic.sent(8, shards=False) == 2 * 7 / 8 * 8e9 == 14e9
    # Two micro-batches: weights and gradients of shards go round twice, those of copies once.
    assert traffic.sent(8, shards=True, accumulation=2) == pytest.approx(7 / 8 * (2 * 34e9 + 2 * 1e9)) == 61.25e9
    assert traffic.sent(1, shards=False) == traffic.sent(1, shards=True) == 0


def test_the_slowest_link_sets_the_pace():
    assert (Links().rate(8), Links().rate(16)) == (450, 400)
    assert Links(inside=100, between=400, node=4).rate(8) == 100


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


@pytest.mark.parametrize("how", ["full", "lora"])
def test_traffic_of_dmd2(how, teacher):  # noqa: F811
    """Two-step student, critic twice as often: P is a network's bytes, G the bytes of a player's gradients."""
    recipe = load(recipe_of(teacher, how) | {"method": {"name": "dmd2", "critic_steps": 2}})
    drawn = plan.blueprint_of(recipe)
    method = plan.method_of(recipe, drawn)
    kinds = kinds_of_steps(method, recipe.train.steps)
    assert kinds == {("student", "critic"): 0.5, ("critic",): 0.5}
    found = traffic_of(recipe, drawn, method, kinds)
    stacks = stacks_of(method)
    assert len(stacks) == (3 if how == "full" else 1)
    whole = next(iter(stacks.values())).whole
    gradients = 4 * sum(p.numel() for p in method.roles.student.network.parameters())
    # Student and critic in one step, the critic alone in the next.
    assert found.gradients == 1.5 * gradients
    # Student's turn: half a step of rollout, its own call there and back, guided teacher (one call), critic; then the
    # critic there and back. Critic alone: half a step, the student's call, the critic there and back.
    assert found.gathered == pytest.approx((0.5 * (0.5 + 2 + 1 + 1 + 2) + 0.5 * (0.5 + 1 + 2)) * whole)
    if how == "full":
        assert gradients == whole and found.scattered == 1.5 * whole and found.copied == 0
    else:
        assert found.scattered == 0 and found.copied == 1.5 * gradients


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


def test_the_command(teacher, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(recipe_of(teacher, "lora")))
    command = ["plan", str(file), "--gpus", "4", "--seconds", "2", "--links", "1,0.5,2", "--gpu", "1"]
    assert cli.run([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    copies, shards = facts["estimates"]
    assert (copies["gpus"], copies["rows"], copies["fits"]) == (4, 2, False)
    assert copies["exchange"] == pytest.approx(copies["sent"] / 0.5e9)
    assert copies["seconds"] == copies["overlapped"] == pytest.approx(2 / 4 + copies["exchange"])
    assert shards["seconds"] == pytest.approx(0.5 + shards["exchange"])
    assert shards["overlapped"] == max(0.5, shards["exchange"])
    assert shards["sent"] > copies["sent"] > 0
    with pytest.raises(InputError, match=r"train.batch_size: expected a multiple of GPUs .* \(3 x 1\), found 8"):
        scale(str(file), (), [3], Links())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "--gpus: expected numbers separated by commas, found '0'"),
        (["--gpus", "8", "--links", "1,2"], "--links: expected GB/s inside a node"),
        (["--gpus", "8", "--gpu", "80", "--fit"], "--fit: expected --gpu without --gpus"),
    ],
)
def test_wrong_options(arguments, said, capsys):
    assert cli.run(["plan", "quickstart", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_links_are_positive():
    assert links_of("100,25,4") == Links(100, 25, 4)
    for text in ("100,0,8", "1,2,3,4", "a,b,c"):
        with pytest.raises(InputError, match="--links"):
            links_of(text)
