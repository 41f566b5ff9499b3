"""Trackers get the metrics, the previews and the recipe; one that is missing or fails is one line."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepdistill.errors import InputError
from stepdistill.recipe import load
from stepdistill.training.tracking import Tracking, check_trackers, configuration


@pytest.fixture(autouse=True)
def _process() -> None:
    PartialState()  # accelerate's trackers ask it whether they are the first


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("L", (6, 4), 9).save(tmp_path / "000002.png")
    return tmp_path / "000002.png"


def recipe(*trackers: str):
    return load("quickstart", [f"train.tracker={json.dumps(trackers)}"])


class Stub:
    """Stands for one of accelerate's trackers."""

    def __init__(self, project: str = "", **arguments: object):
        self.project, self.arguments, self.calls = project, arguments, []

    def __getattr__(self, name: str):
        return lambda *given, **named: self.calls.append((name, given, named))


def test_tensorboard_has_metrics_previews_and_the_recipe_in_the_run_folder(tmp_path: Path, picture: Path) -> None:
    with Tracking(load("quickstart"), tmp_path, 0) as tracking:
        tracking.log({"student/loss/dm": 0.5, "evaluations": 3}, 2)
        tracking.draw(picture, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = events.Scalars("student/loss/dm")
    assert (scalar.step, scalar.value) == (2, 0.5)
    (image,) = events.Images("preview")
    assert (image.step, image.width, image.height) == (2, 6, 4)
    (kept,) = (tmp_path / "tensorboard").glob("*/hparams.yml")
    assert "method.name: dmd2" in kept.read_text()
    with Tracking(load("quickstart"), tmp_path, 4):  # a resumed run is no other one
        pass
    assert len(list((tmp_path / "tensorboard").glob("*/hparams.yml"))) == 1


def test_the_recipe_is_flat_for_trackers() -> None:
    flat = configuration(load("quickstart", ["train.betas=[0.5, 0.9]"]))
    assert flat["teacher.guidance.scale"] == 1.5 and flat["train.betas"] == "[0.5, 0.9]" and flat["resume"] == "auto"
    assert all(value is None or isinstance(value, bool | int | float | str) for value in flat.values())


def test_several_trackers_get_the_same_and_wandb_goes_on_with_its_run(tmp_path, picture, monkeypatch) -> None:
    for name in ("wandb", "mlflow", "clearml"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Stub)
    runs = []
    for first in (0, 2):
        with Tracking(recipe("wandb", "clearml", "wandb"), tmp_path / "mine", first) as tracking:
            tracking.log({"a": 1.0}, first)
            tracking.draw(picture, first)
        runs.append(tracking.trackers)
    before, after = runs[0]["wandb"].arguments, runs[1]["wandb"].arguments
    assert before == after and before["resume"] == "allow" and before["name"] == "mine" and len(before["id"]) == 8
    for name in ("wandb", "clearml"):
        calls = [call[0] for call in runs[0][name].calls]
        assert calls == ["start", "store_init_configuration", "log", "log_images", "finish"]
    pictures = {name: runs[0][name].calls[3][1][0]["preview"] for name in ("wandb", "clearml")}
    assert isinstance(pictures["wandb"], list) and pictures["clearml"].mode == "RGB"


WORDS = {
    "mlflow": {"key": "preview", "step": 2},
    "trackio": {"step": 2},
    "comet_ml": {"name": "preview", "step": 2},
    "dvclive": {},
}


@pytest.mark.parametrize("name", WORDS)
def test_pictures_go_by_a_trackers_own_word_where_accelerate_has_none(name, tmp_path, picture, monkeypatch) -> None:
    """The packages' functions stand here as they do in their sources."""
    drawn = []

    def log_image(*given, **named) -> None:
        drawn.append((given[-1], named))

    class Own(Stub):
        tracker, log_images = SimpleNamespace(log_image=log_image), None

        def log(self, values: dict, step: int) -> None:
            drawn.append((values["preview"], {"step": step}))

    package = ModuleType(name)
    package.Image, package.log_image = lambda image: image, log_image
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Own)
    with Tracking(recipe(name), tmp_path, 0) as tracking:
        tracking.draw(picture, 2)
    ((image, named),) = drawn
    assert (image.size, image.mode, named) == ((6, 4), "RGB", WORDS[name])


def test_a_tracker_that_fails_in_the_run_is_dropped_with_a_line(tmp_path, monkeypatch, capsys) -> None:
    class Broken(Stub):
        def log(self, values: dict, step: int) -> None:
            raise ConnectionError("no\nserver")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", Stub)
    with Tracking(recipe("wandb", "mlflow"), tmp_path, 0) as tracking:
        for step in (1, 2):
            tracking.log({"a": 1.0}, step)
    error = capsys.readouterr().err
    assert error.count("wandb failed to log at step 1 and gets nothing more: ConnectionError: no server") == 1
    assert [call[0] for call in tracking.trackers["mlflow"].calls].count("log") == 2


def test_a_tracker_that_does_not_start_is_wrong_input(tmp_path, monkeypatch) -> None:
    class Keyless(Stub):
        def start(self) -> None:
            raise RuntimeError("no API key")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Keyless)
    with pytest.raises(InputError, match=r"train\.tracker: wandb does not start here: RuntimeError: no API key"):
        Tracking(recipe("wandb"), tmp_path, 0)


def test_a_missing_package_is_one_line_and_a_wrong_name_too(monkeypatch) -> None:
    found = {"tensorboard": SimpleNamespace()}
    monkeypatch.setattr("importlib.util.find_spec", found.get)
    check_trackers(["tensorboard"])
    with pytest.raises(InputError, match=r"train\.tracker: comet_ml needs its package \(pip install comet-ml\)"):
        check_trackers(["tensorboard", "comet_ml"])
    with pytest.raises(InputError, match=r"train\.tracker: expected one of 'tensorboard', .*'none' or a list"):
        load("quickstart", ["train.tracker=wandbb"])
    assert recipe("wandb", "wandb").train.trackers == ["wandb"]
    assert load("quickstart", ["train.tracker=none"]).train.trackers == []


def test_wandb_itself_takes_it_all_offline(tmp_path, picture, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Tracking(recipe("wandb"), tmp_path, 0) as tracking:
        tracking.log({"student/loss/dm": 0.5}, 2)
        tracking.draw(picture, 2)
    assert list(tracking.trackers) == ["wandb"]
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/preview_2_*.png"))
