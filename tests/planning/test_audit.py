"""The audit of a run: its verdicts on recipes that cannot become good, at the numbers of the published pipelines."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from pipeline.tiny import tiny_sd
from stepdistill import assets, cli
from stepdistill.diffusion.samplers import Step
from stepdistill.diffusion.schedule import FlowSchedule, VPSchedule
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.planning import audit
from stepdistill.recipe import load
from stepdistill.recipe.memory import RESERVE


def vp(low: float, high: float, root: bool) -> VPSchedule:
    ends = (low**0.5, high**0.5) if root else (low, high)
    betas = torch.linspace(*ends, 1000).double() ** (2 if root else 1)
    return VPSchedule((1 - betas).cumprod(0))


ROOT = Path(__file__).parents[2]
REAL = [one for one in assets.recipes() if "/" in assets.recipe(one).read_text().partition("pipeline: ")[2].split()[0]]
STABLE, LINEAR = vp(0.00085, 0.012, True), vp(0.0001, 0.02, False)


def steps(*times: float) -> list[Step]:
    return [Step(t, r) for t, r in zip(times, [*times[1:], None], strict=True)]


def test_a_last_step_that_does_nothing():
    check = audit.grid_check(FlowSchedule(3.0), steps(1.0, 0.0089))
    assert check.verdict == "warning" and "t = 0.0089 does nothing" in check.remedy
    assert check.numbers["timesteps"] == pytest.approx([1000, 8.9])
    assert audit.grid_check(FlowSchedule(3.0), steps(1.0, 0.75)).verdict == "ok"
    assert audit.grid_check(FlowSchedule(3.0), steps(1.0)).verdict == "ok"
    many = audit.grid_check(STABLE, steps(*(1 - i / 30 for i in range(30))))
    assert many.verdict == "ok" and "..." in many.value
    assert audit.grid_check(STABLE, steps(1.0, 0.5, 0.5)).verdict == "error"


def test_the_remedy_names_each_precision_that_rounds():
    recipe = load("quickstart", ["student.train=lora", "teacher.precision=bf16"])
    assert audit.half_keys(recipe) == ["teacher.precision"]
    recipe.train.precision = "bf16"
    assert audit.half_keys(recipe) == ["train.precision", "teacher.precision"]
    recipe.student.train = "full"
    assert audit.half_keys(recipe) == ["train.precision"]
    check = audit.rounding_check(LINEAR, steps(1.0), "epsilon", ["train.precision", "teacher.precision"])
    assert "train.precision: fp32 and teacher.precision: fp32" in check.remedy


@pytest.mark.parametrize(
    ("schedule", "time", "precision", "noise", "verdict"),
    [
        (LINEAR, 1.0, "bf16", 157 * 2**-9, "error"),  # PixArt-Sigma and DiT-XL from the noise end
        (LINEAR, 400 / 999, "bf16", 2.04 * 2**-9, "ok"),
        (LINEAR, 1.0, "fp32", 157 * 2**-24, "ok"),
        (STABLE, 1.0, "bf16", 14.6 * 2**-9, "ok"),
        (STABLE, 625 / 999, "bf16", 2.5 * 2**-9, "ok"),
        (FlowSchedule(), 1.0, "bf16", 2**-9, "ok"),
    ],
)
def test_the_noise_of_rounding_in_x0(schedule, time, precision, noise, verdict):
    kind = "flow" if schedule.name == "flow" else "epsilon"
    check = audit.rounding_check(schedule, steps(time), kind, ["train.precision"] if precision == "bf16" else [])
    assert check.verdict == verdict and check.numbers["noise"] == pytest.approx(noise, rel=0.01)
    if verdict == "error":
        assert "train.precision: fp32, or student.start: 799" in check.remedy


def recipe_of(folder: Path) -> dict:
    return {
        "teacher": {"pipeline": str(folder / "sd"), "guidance": {"scale": 2.0}},
        "student": {"steps": 4, "train": "lora", "rank": 4},
        "data": {"conditions": ["a red shoe", "rain"]},
        "method": {"name": "dmd2", "critic_steps": 5},
        "train": {"steps": 20, "batch_size": 8, "lr": 5e-5},
        "published": "dmd2-sdxl-lora",
        "output": str(folder / "run"),
    }


def test_the_audit_is_printed_with_the_plan(tmp_path, capsys):
    save_pipeline(tiny_sd(), tmp_path / "sd")
    recipe = recipe_of(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    assert cli.run(["plan", str(file), "--seconds", "9", "--gpu", "24", "--json"]) == 0
    out = capsys.readouterr().out
    checks = {check["name"]: check for check in json.loads(out[out.index("{") :])["audit"]}
    assert checks["grid"]["numbers"]["timesteps"] == pytest.approx([999, 749, 499, 249])
    assert checks["updates by position"]["numbers"]["shares"] == [0.25] * 4
    assert checks["samples"]["numbers"] == {"samples": 32, "batch": 8, "ratio": 32 / 409_600}
    assert checks["samples"]["verdict"] == "warning"
    # LoRA with alpha = rank beside alpha 8 of rank 64, both at 5e-5; and a critic that is a LoRA beside a whole one.
    assert checks["student speed"]["numbers"]["ratio"] == pytest.approx(4**0.5 / (8 / 64 * 64**0.5), rel=1e-3)
    assert checks["critic speed"]["numbers"]["published"] == pytest.approx(5e-5)
    said = [checks[name]["published"] for name in ("critic speed", "samples")]
    assert said == ["5.0e-05", "410 k in batches of 128"] and "of |W|" in checks["student speed"]["value"]
    assert checks["time"]["numbers"]["hours"] == pytest.approx(20 * 9 / 3600)
    assert {"memory: encoding", "memory: training", "memory: export (host)"} <= checks.keys()
    table = audit.as_text([audit.Check(**check) for check in checks.values()])
    text = " ".join(table.split())
    assert "timesteps 999, 749, 499, 249 published: 999, 749, 499, 249" in text
    assert "-> 1/12800 of the published run's" in text and max(map(len, table.splitlines())) <= 80


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("rehearsal_table", ROOT / "scripts" / "rehearsal_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def committed():
    """The lines of the page by recipe."""
    lines = (ROOT / "docs" / "rehearsal.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row for row in rows}


@pytest.mark.parametrize("name", REAL)
def test_no_recipe_for_a_real_model_is_one_that_cannot_work(name, table, committed, tmp_path):
    """And the page says what the audit says."""
    checks = table.checks_of(table.read(name, [], tmp_path))
    assert all(one.verdict != "error" for one in checks.values()), audit.as_text(list(checks.values()))
    assert checks["grid"].verdict == "ok"
    row = table.row(name, checks, None)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == committed[name][:6] and cells[7] == committed[name][7], "run scripts/rehearsal_table.py"


# What two reviews found in the shipped recipes, before they were changed.
FAULTS = {
    "pixart-sigma from the noise end in bf16": (
        "pixart_sigma",
        ["student.start=null", "train.precision=bf16"],
        ("rounding", "error", "noise", 157 * 2**-9),
    ),
    "an adapter of alpha = rank at the rate of one of alpha = rank / 8": (
        "sdxl_dmd2_lora",
        ["student.alpha=64", "train.lr=5e-5"],
        ("student speed", "warning", "ratio", 8),
    ),
    "a critic that is a LoRA at the rate of a whole one": (
        "sdxl_dmd2_lora",
        ["student.alpha=64", "method.critic=lora", "train.critic_lr=5e-5"],
        ("critic speed", "warning", "ratio", 1 / 9.0),
    ),
    "few samples": (
        "sdxl_dmd2_lora",
        ["train.batch_size=8", "train.accumulation=8", "train.steps=20000"],
        ("samples", "warning", "ratio", 32_000 / 409_600),
    ),
    "gradients of four positions of a linear table": (
        "dit_xl_256",
        ["student.start=null", "train.precision=fp32"],
        ("updates by position", "warning", "spread", 165),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_audit_finds_the_faults_that_recipes_had(fault, table, tmp_path):
    name, overrides, (line, verdict, number, value) = FAULTS[fault]
    check = table.checks_of(table.read(name, overrides, tmp_path))[line]
    assert (check.verdict, check.numbers[number]) == (verdict, pytest.approx(value, rel=0.02)), check
    assert check.remedy


def test_a_run_that_cannot_work_ends_before_its_first_step(tmp_path, monkeypatch, capsys):
    save_pipeline(tiny_sd(), tmp_path / "sd")
    monkeypatch.setattr(audit, "LIMIT", 1e-9)
    tree = recipe_of(tmp_path) | {"published": None}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    assert cli.run(["train", str(tmp_path / "recipe.yaml")]) == 2
    said = capsys.readouterr().err
    assert "updates by position" in said and "error: rounding: " in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_every_recipe_for_a_real_model_fits_the_gpu_that_its_head_names():
    """As docs/rehearsal_memory.json has them, which scripts/rehearsal_table.py --memory counts."""
    counted = json.loads((ROOT / "docs" / "rehearsal_memory.json").read_text())
    assert counted.keys() == set(REAL)
    for name, phases in counted.items():
        card = int(re.search(r"# Needs: an? (\d+) GB GPU", assets.recipe(name).read_text())[1])
        need = max(gib for phase, gib in phases.items() if phase in ("encoding", "trajectories", "training"))
        assert need + RESERVE <= card, f"{name}: {need:.1f} GiB"
