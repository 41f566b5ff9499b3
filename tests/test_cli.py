"""The commands, on a tiny pipeline: what they print, what they leave, how they exit."""

import importlib.util
import io
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
from stepdistill import assets, cli
from stepdistill.methods import METHODS
from stepdistill.recipe import load, yaml_lines

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
    expected = {"run": str(run_folder), "step": 2, "interrupted": False, "export": str(run_folder / "export")}
    assert facts == expected | {"report": None}


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
    shown = capsys.readouterr().out
    assert "DiTTransformer2DModel" in shown and "argument timestep, scale 1.0" in shown and "{" not in shown
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
    assert Image.open(io.BytesIO(few._repr_png_())).size == (2 * 34 - 2, 32)  # in a notebook


def test_methods_and_recipes(capsys: pytest.CaptureFixture) -> None:
    listed = printed_json(["methods"], capsys)
    assert [row["name"] for row in listed] == list(METHODS)
    assert all(row["summary"] and all(key["description"] for key in row["keys"].values()) for row in listed)
    assert {"quickstart", "fashion_dmd2", "fashion_tcd"} <= {row["name"] for row in printed_json(["recipes"], capsys)}
    assert cli.run(["methods"]) == 0 and cli.run(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown or shown.startswith(name) for name in (*METHODS, *assets.recipes()))


def test_clean_removes_nothing_without_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    (tmp_path / "latents-ab").write_text("x" * 2**20)
    assert cli.run(["clean"]) == 0 and (tmp_path / "latents-ab").exists()
    assert "encoded images" in (shown := capsys.readouterr().out) and "1.0 MiB" in shown
    assert printed_json(["clean", "--yes"], capsys)["removed"] and not (tmp_path / "latents-ab").exists()


LIGHT = (["-h"], ["methods"], ["recipes"], ["runs", "."], ["clean"], ["train", "sdxl"], ["recipes", "quickstart"])
NOTHING_THERE = (
    ["inspect", "./no"],
    ["export", "no", "out"],
    ["sample", "./no"],
    ["bench", "runs/no"],
    ["watch", "no"],
)


def test_commands_without_weights_load_no_torch() -> None:
    """They answer at once: torch alone takes seconds."""
    program = "import sys\nfrom stepdistill import cli\n"
    program += f"for one in {LIGHT}:\n    cli.run(one)\n    assert 'torch' not in sys.modules, one\n"
    program += f"for one in {NOTHING_THERE}:\n    assert cli.run(one) == 2\n    assert 'torch' not in sys.modules, one"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT / "docs")
    assert done.returncode == 0, done.stderr[-500:]


def test_recipes_are_filtered(capsys: pytest.CaptureFixture) -> None:
    def names(*options: str) -> set[str]:
        return {row["name"] for row in printed_json(["recipes", *options], capsys)}

    sdxl = names("--base", "SDXL")
    assert "sdxl_dmd2_lora" in sdxl and all(name.startswith("sdxl") for name in sdxl)
    assert "sdxl_dmd2_lora" not in names("--gpu", "24") and "sdxl_dmd2_lora_24gb" in names("--gpu", "24")
    assert "sdxl_tcd_lora" not in names("--no-images", "--base", "sdxl") and names("--method", "tdm") == {"fashion_tdm"}
    assert names("--steps", "1", "--base", "sd15") == {"sd15_dmd2", "sd15_sid", "sd15_swiftbrush"}
    assert all(name.startswith(("fashion", "emoji", "quickstart", "students")) for name in names("--gpu", "0"))
    in_need = {row["name"] for row in printed_json(["methods", "--no-images"], capsys)}
    assert "dmd2" in in_need and "tcd" not in in_need


def test_a_recipe_is_printed_with_its_comments(capsys: pytest.CaptureFixture) -> None:
    text = assets.recipe("quickstart").read_text(encoding="utf-8")
    assert cli.run(["recipes", "quickstart"]) == 0
    assert capsys.readouterr().out == text and text.startswith("#")
    assert printed_json(["recipes", "quickstart"], capsys)["text"] == text
    assert cli.run(["recipes", "quickstrat"]) == 2


def test_init_copies_a_recipe_with_its_comments_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    text = assets.recipe("quickstart").read_text(encoding="utf-8")
    facts = printed_json(["init", "quickstart"], capsys)
    assert facts == {"recipe": "quickstart.yaml", "next": "stepdistill plan quickstart.yaml"}
    assert cli.run(["init", "quickstart", "deep/mine.yaml"]) == 0
    assert (tmp_path / "quickstart.yaml").read_text() == text == (tmp_path / "deep" / "mine.yaml").read_text()
    assert load("deep/mine.yaml").output == "runs/mine"
    (tmp_path / "quickstart.yaml").write_text("mine")
    for words, message in (
        (["quickstart"], "quickstart.yaml: expected a new file"),
        (["nope"], "or the name of a shipped recipe"),
    ):
        assert cli.run(["init", *words]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"


def test_runs_are_listed(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (row,) = printed_json(["runs", str(run_folder.parent)], capsys)
    assert row["run"] == str(run_folder) and row["method"] == "sfd" and row["state"] == "finished"
    assert row["step"] == row["steps"] == 2 and row["best"] is None and 0 <= row["seconds"] < 600
    assert cli.run(["runs", str(run_folder.parent)]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "method", "state", "step", "best", "age"]
    assert line.split()[:5] == [str(run_folder), "sfd", "finished", "2/2", "-"]
    assert cli.run(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert cli.run(["runs", str(tmp_path / "no")]) == 2
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.run(["runs"]) == 0 and capsys.readouterr().out == "no runs in runs\n"


def test_version_and_short_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"stepdistill {stepdistill.__version__}\n"
    assert cli.run(["-h"]) == 0 and cli.run(["train", "-h"]) == 0
    assert "--dry-run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "proposed"), [("stepdistill ini", "init"), ("stepdistill train sdxl_tc", "sdxl_tcd_lora")]
)
def test_a_shell_completes_commands_and_recipes(words: str, proposed: str) -> None:
    variables = {"_STEPDISTILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    script = Path(sys.executable).with_name("stepdistill")
    done = subprocess.run([str(script)], capture_output=True, text=True, env=os.environ | variables)
    assert done.stdout.split() == [proposed]


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
        (["sample", "{teacher}", "--size", "64"], "--size: expected HEIGHTxWIDTH in pixels, such as 832x1216, found"),
        (["sample", "{teacher}", "--size", "64x64"], "size: DiTPipeline takes no height"),
        (["sample", "{teacher}", "--classes", "Bagg"], "did you mean 'Bag'?"),
        (["sample", "{teacher}", "--classes", "10"], "from 0 to 9"),
        (["inspect", "{here}"], "model_index.json"),
        (["bench", "{teacher}", "--steps", "1,two"], "--steps: expected numbers separated by commas, found '1,two'"),
        (["export", "{here}", "{here}/out"], "expected a run folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    arguments: list[str], message: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.run([word.format(teacher=teacher, here=tmp_path) for word in arguments]) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert all(line == f"loading {teacher}" for line in before)


def test_anything_else_is_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the disk\nis full")

    monkeypatch.setattr(stepdistill, "inspect", fail, raising=False)
    assert cli.run(["inspect", "emoji"]) == 1
    error = capsys.readouterr().err
    assert "failed: RuntimeError: the disk is full" in error and "STEPDISTILL_TRACEBACK=1" in error
    assert "Traceback" not in error
    monkeypatch.setenv("STEPDISTILL_TRACEBACK", "1")
    assert cli.run(["inspect", "emoji"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_no_module_is_called_like_a_verb() -> None:
    assert not any(importlib.util.find_spec(f"stepdistill.{verb}") for verb in stepdistill.__all__)
    assert all(callable(getattr(stepdistill, verb)) for verb in stepdistill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = stepdistill.distil


def test_what_only_looks_does_not_wait_for_torch(tmp_path: Path) -> None:
    mine, gone = str(tmp_path / "mine.yaml"), str(tmp_path / "gone")
    answered = [[], ["--version"], ["init", "quickstart", mine], ["runs", str(tmp_path)], ["doctor"]]
    refused = [["convert", "gone", "out"], ["join", gone, gone, "--out", "out"]]
    refused += [[verb, mine, f"data.images={gone}"] for verb in ("train", "plan", "encode")]
    program = "import sys\nfrom stepdistill import cli, doctor\ndoctor._DEVICE_FILES = ()\n"
    program += f"assert [cli.run(one) for one in {answered + refused}] == {[0] * len(answered) + [2] * len(refused)}\n"
    program += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


@pytest.mark.parametrize("verb", ["inspect", "sample", "bench"])
def test_what_loads_a_pipeline_says_so_before_it_loads_torch(verb: str) -> None:
    program = (
        f"import sys\nsys.modules['torch'] = None\nfrom stepdistill import cli\ncli.run([{verb!r}, 'fashion-dit'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.startswith("loading fashion-dit\nfailed: ModuleNotFoundError")


def test_console_script_and_module_are_the_same_command() -> None:
    environment = os.environ | {"COLUMNS": "100"}
    script = Path(sys.executable).with_name("stepdistill")
    for command in ([str(script)], [sys.executable, "-m", "stepdistill"]):
        done = subprocess.run([*command, "train", "no.yaml"], capture_output=True, text=True, env=environment)
        assert done.returncode == 2
        assert done.stderr.startswith("error: no.yaml: expected a recipe file") and done.stdout == ""
