"""An upload: the folder as it is, its card complete; the hub itself is a stand-in."""

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
from stepdistill.exporting.card import PLACE, model_card
from stepdistill.exporting.export import ExportResult
from stepdistill.pipeline.trace import trace


class FakeHub:
    """Remembers what it was asked."""

    calls: list = []  # noqa: RUF012 - one for all instances

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create", repository, private, exist_ok))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append(("upload", repo_id, {p.name: p.read_text() for p in Path(folder_path).iterdir()}))


@pytest.fixture
def calls(monkeypatch) -> list:
    FakeHub.calls = []
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    return FakeHub.calls


@pytest.fixture(scope="module")
def traced():
    return trace(tiny_sd())


def facts(form: str, teacher: str) -> dict:
    stated = {"teacher": teacher, "method": "dmd2", "steps": 4, "guidance": 7.5, "call_guidance": 1.0}
    return stated | {"adapter": False, "form": form, "trained_steps": 9, "recipe": {"teacher": {"ip_adapter": None}}}


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


def test_the_command_uploads_what_it_exported(calls, tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text(PLACE)
    result = ExportResult(tmp_path, 1e-7, "lora")
    monkeypatch.setattr(stepdistill, "export", lambda *_: result, raising=False)
    assert cli.run(["export", "run", "out", "--hub", "me/student"]) == 0
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
