"""An upload: the folder as it is, its card complete; the hub itself is a stand-in."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

import stepdistill
from pipeline.tiny import tiny_sd
from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.exporting import hub
from stepdistill.exporting.card import PLACE, fill_in_quality, model_card
from stepdistill.exporting.export import ExportResult
from stepdistill.pipeline.exports import FACTS, ExportFacts
from stepdistill.pipeline.trace import trace


class FakeHub:
    """Remembers what it was asked."""

    calls: list = []  # noqa: RUF012 - one for all instances

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create", repository, private, exist_ok))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, ignore_patterns: list[str]) -> None:
        files = {
            p.name: p.read_text() for p in Path(folder_path).iterdir() if p.is_file() and p.name not in ignore_patterns
        }
        self.calls.append(("upload", repo_id, files))

    def upload_file(self, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, commit_message: str) -> None:
        self.calls.append(("file", repo_id, {path_in_repo: path_or_fileobj.decode()}))


@pytest.fixture
def calls(monkeypatch) -> list:
    FakeHub.calls = []
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    return FakeHub.calls


@pytest.fixture(scope="module")
def traced():
    return trace(tiny_sd())


def facts(form: str, teacher: str) -> ExportFacts:
    recipe = {"teacher": {"ip_adapter": None}}
    return ExportFacts(teacher, 7.5, "dmd2", 4, form=form, trained_steps=9, recipe=recipe)


@pytest.mark.parametrize("form", ["lora", "pipeline"])
def test_the_uploaded_card_names_the_repository_and_its_teacher(form, traced, calls, tmp_path):
    (tmp_path / "README.md").write_text(model_card(facts(form, "owner/teacher"), traced, 1e-6))
    assert hub.push(tmp_path, "me/student", private=False) == "https://huggingface.co/me/student"
    created, (verb, repository, files) = calls
    assert created == ("create", "me/student", False, True) and (verb, repository) == ("upload", "me/student")
    card = files["README.md"]
    assert PLACE not in card and '"me/student"' in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "owner/teacher" and metadata["pipeline_tag"] == "text-to-image"
    assert metadata["base_model_relation"] == {"lora": "adapter", "pipeline": "finetune"}[form]
    assert ("lora" in metadata["tags"]) == (form == "lora") and metadata["license"] == "other"


def test_a_teacher_that_is_not_on_the_hub_is_no_base_model(traced, tmp_path):
    for teacher in (str(tmp_path), "fashion-dit"):
        metadata = yaml.safe_load(model_card(facts("pipeline", teacher), traced, 1e-6).split("---")[1])
        assert "base_model" not in metadata and metadata["library_name"] == "diffusers"


@pytest.mark.parametrize("form", ["lora", "pipeline"])
def test_neither_card_nor_upload_names_a_folder_of_this_machine(form, traced, calls, tmp_path):
    teacher = tmp_path / "mine" / "tinysd"
    teacher.mkdir(parents=True)
    out = tmp_path / "out"
    out.mkdir()
    made = facts(form, str(teacher))
    made.write(out)
    (out / "README.md").write_text(model_card(made, traced, 1e-6))
    fill_in_quality(out / "README.md", f"# Benchmark\n\ntable\n\nDevice: cpu.\n\n    stepdistill bench {tmp_path}\n")
    hub.push(out, "me/student")
    sent = "".join(text for _, _, files in calls[1:] for text in files.values())
    assert "tinysd" in sent and "Device: cpu." in sent and str(tmp_path) not in sent
    assert str(teacher) in (out / FACTS).read_text()  # what loads it here


def test_the_command_uploads_what_it_exported(calls, tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text(PLACE)
    result = ExportResult(tmp_path, 1e-7, "lora")
    monkeypatch.setattr(stepdistill, "export", lambda *_: result, raising=False)
    (tmp_path / "recipe.yaml").write_text("")
    assert cli.run(["export", str(tmp_path), "out", "--hub", "me/student"]) == 0
    assert calls[0] == ("create", "me/student", True, True)
    assert "https://huggingface.co/me/student" in capsys.readouterr().out


def test_a_wrong_name_is_said_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr(stepdistill, "export", lambda *_: pytest.fail("exported"), raising=False)
    assert cli.run(["export", "run", "out", "--hub", "student"]) == 2
    assert "--hub: expected OWNER/NAME, found 'student'" in capsys.readouterr().err


def test_without_a_login_it_is_one_line(monkeypatch, tmp_path):
    def refuse(*_: object, **__: object) -> None:
        raise LocalTokenNotFoundError("no token")

    (tmp_path / "README.md").write_text("card")
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(create_repo=refuse))
    with pytest.raises(InputError, match="--hub: expected a login"):
        hub.push(tmp_path, "me/student")


def test_an_uploaded_index_says_where_the_components_lie(calls, tmp_path):
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "unet").mkdir()
    entry = {"pretrained_model_name_or_path": None, "subfolder": "unet"}
    index = {"unet": ["diffusers", "UNet2DConditionModel", entry], "controlnet": [None, None, entry]}
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index))
    hub.push(tmp_path, "me/student")
    uploaded = json.loads(calls[1][2]["modular_model_index.json"])
    places = {name: value[2]["pretrained_model_name_or_path"] for name, value in uploaded.items()}
    assert places == {"unet": "me/student", "controlnet": None}
