"""The commands, on a tiny pipeline: what they print, what they leave, how they exit."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

import stepdistill
from pipeline.tiny import INSPECT_KEYS, save_dit, tiny_dit
from stepdistill import assets, cli, yaml_lines
from stepdistill.methods import METHODS
from stepdistill.recipe import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    save_dit(tiny_dit(), folder)
    return folder


@pytest.fixture(scope="session")
def run_folder(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates, trained and exported through the command line."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = {
        "teacher": {"pipeline": str(teacher), "guidance": {"scale": 1.5}},
        "student": {"steps": 2},
        "method": {"name": "sfd", "substeps": 1},
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-3, "checkpoint_every": 1, "preview_every": 2, "log_every": 1},
        "report": {"samples": 0},
        "output": str(folder / "run"),
    }
    (folder / "tiny.yaml").write_text(yaml_lines.dump(recipe))
    assert cli.run(["train", str(folder / "tiny.yaml")]) == 0
    return folder / "run"


def printed_json(arguments: list[str], capsys: pytest.CaptureFixture) -> Any:
    assert cli.run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_train_leaves_what_the_contract_says(run_folder: Path) -> None:
    expected = {"recipe.yaml", "metrics.jsonl", "tensorboard", "previews", "checkpoints", "export"}
    assert expected <= {path.name for path in run_folder.iterdir()}
    assert load(run_folder / "recipe.yaml").train.steps == 2
    assert all(json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines())
    pipeline = DiffusionPipeline.from_pretrained(run_folder / "export")
    assert type(pipeline).__module__.startswith("diffusers.")
    assert pipeline.labels["Bag"] == 8


def test_train_again_has_nothing_left_to_do(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    facts = printed_json(["train", str(run_folder / "recipe.yaml")], capsys)
    assert facts == {"run": str(run_folder), "step": 2, "interrupted": False, "report": None}


def test_dry_run_prints_the_resolved_recipe(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["train", str(run_folder / "recipe.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == (run_folder / "recipe.yaml").read_text().strip()
    assert printed_json(["train", str(run_folder / "recipe.yaml"), "--dry-run"], capsys)["student"]["steps"] == 2


def test_export(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    facts = printed_json(["export", str(run_folder), str(tmp_path / "out")], capsys)
    assert facts["pipeline"] == str(tmp_path / "out") and facts["max_error"] <= 1e-5
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_inspect(teacher: Path, capsys: pytest.CaptureFixture) -> None:
    facts = printed_json(["inspect", str(teacher)], capsys)
    assert set(facts) == INSPECT_KEYS
    assert facts["pipeline"] == "DiTPipeline" and facts["self_test_error"] < 1e-5
    assert cli.run(["inspect", str(teacher)]) == 0
    assert "DiTTransformer2DModel" in capsys.readouterr().out
    assert cli.run(["inspect", str(teacher), "--argument", "heigth=8"]) == 2
    assert "takes no argument 'heigth'" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["run", "export", "teacher"])
def test_sample(source: str, run_folder: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = {"run": run_folder, "export": run_folder / "export", "teacher": teacher}[source]
    out = tmp_path / "deep" / "grid.png"
    facts = printed_json(["sample", str(path), "--steps", "2", "--count", "3", "--out", str(out)], capsys)
    assert facts["images"] == 3
    assert Image.open(out).size[0] > 32


def test_samples_depend_on_seed_index_and_class_alone(teacher: Path) -> None:
    few = stepdistill.sample(teacher, steps=2, count=2, conditions=["Bag", 7], guidance=1.5)
    many = stepdistill.sample(teacher, steps=2, count=3, conditions=["Bag", "Sneaker"], guidance=1.5)
    assert few.labels == ("Bag", "Sneaker") and many.labels == ("Bag", "Sneaker", "Bag")
    assert (few.images == many.images[:2]).all()
    assert (few.images[0] != many.images[2]).any()


def test_methods_and_recipes(capsys: pytest.CaptureFixture) -> None:
    listed = printed_json(["methods"], capsys)
    assert [row["name"] for row in listed] == list(METHODS)
    assert all(row["summary"] and all(key["description"] for key in row["keys"].values()) for row in listed)
    assert {"quickstart", "fashion_dmd2", "fashion_tcd"} <= {row["name"] for row in printed_json(["recipes"], capsys)}
    assert cli.run(["methods"]) == 0 and cli.run(["recipes"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(METHODS) + len(assets.recipes())


def test_doctor(capsys: pytest.CaptureFixture) -> None:
    rows = printed_json(["doctor"], capsys)
    assert {"stepdistill", "python", "torch", "diffusers", "cpu", "triton", "xformers"} <= {row["name"] for row in rows}
    assert all(row["ok"] or row["advice"] for row in rows)
    assert cli.run(["doctor"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "x.yaml", "--fast"], "No such option"),
        (["sample", "x", "--count", "0"], "--count"),
        (["sample", "not-a-teacher"], "not-a-teacher"),
        (["sample", "{teacher}", "--classes", "Bagg"], "did you mean 'Bag'?"),
        (["sample", "{teacher}", "--classes", "10"], "from 0 to 9"),
        (["inspect", "{here}"], "model_index.json"),
        (["bench", "x", "--steps", "1,two"], "--steps: expected numbers separated by commas, found '1,two'"),
        (["export", "{here}", "{here}/out"], "expected a run folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    arguments: list[str], message: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.run([word.format(teacher=teacher, here=tmp_path) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_anything_else_is_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the disk\nis full")

    monkeypatch.setattr(stepdistill, "export", fail, raising=False)
    assert cli.run(["export", "a", "b"]) == 1
    error = capsys.readouterr().err
    assert "failed: RuntimeError: the disk is full" in error and "STEPDISTILL_TRACEBACK=1" in error
    assert "Traceback" not in error
    monkeypatch.setenv("STEPDISTILL_TRACEBACK", "1")
    assert cli.run(["export", "a", "b"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_verbs_are_functions_also_after_modules_of_their_name_were_imported() -> None:
    importlib.import_module("stepdistill.bench")

    assert all(callable(getattr(stepdistill, verb)) for verb in stepdistill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = stepdistill.distil


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys\nfrom stepdistill import cli\nassert cli.run([]) == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


def test_console_script_and_module_are_the_same_command() -> None:
    environment = os.environ | {"COLUMNS": "100"}
    script = Path(sys.executable).with_name("stepdistill")
    for command in ([str(script)], [sys.executable, "-m", "stepdistill"]):
        done = subprocess.run([*command, "train", "no.yaml"], capture_output=True, text=True, env=environment)
        assert done.returncode == 2
        assert done.stderr.startswith("error: no.yaml: expected a recipe file") and done.stdout == ""
