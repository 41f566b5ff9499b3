"""An export as a repository on the Hugging Face hub."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from stepdistill.errors import InputError
from stepdistill.exporting.card import PLACE
from stepdistill.files import read_json
from stepdistill.pipeline.exports import FACTS
from stepdistill.pipeline.modular import holds_modular, name_repository


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Upload an export, its card naming the repository and no file of it a folder of this machine; returns the address.

    Args:
        repository: OWNER/NAME; made if there is none.
        private: of a repository that is made.

    Raises:
        InputError: no such name, or nobody is logged in.
    """
    check_name(repository)
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace(PLACE, repository), encoding="utf-8")
    if holds_modular(folder):
        name_repository(folder, repository)
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        message = "Student, scheduler and model card"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=[FACTS])
        if (folder / FACTS).is_file():
            facts = json.dumps(without_places(read_json(folder / FACTS)), indent=1).encode()
            api.upload_file(path_or_fileobj=facts, path_in_repo=FACTS, repo_id=repository, commit_message="Its recipe")
    except LocalTokenNotFoundError:
        raise InputError("--hub: expected a login to the hub (hf auth login, or HF_TOKEN), found none") from None
    return str(url)


def without_places(value: Any) -> Any:
    """What JSON holds, with absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {key: without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~/")) else value


def check_name(repository: str) -> None:
    """Refuse what is no OWNER/NAME, before any work."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise InputError(f"--hub: expected OWNER/NAME, found '{repository}'")
