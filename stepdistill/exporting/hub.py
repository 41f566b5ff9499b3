"""An export as a repository on the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from stepdistill.errors import InputError
from stepdistill.exporting.card import PLACE


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Upload an export, its card naming the repository; returns the address.

    Args:
        repository: OWNER/NAME; made if there is none. private: of a repository that is made.

    Raises:
        InputError: no such name, or nobody is logged in.
    """
    check_name(repository)
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace(PLACE, repository), encoding="utf-8")
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Student, scheduler and model card")
    except LocalTokenNotFoundError:
        raise InputError("--hub: expected a login to the hub (hf auth login, or HF_TOKEN), found none") from None
    return str(url)


def check_name(repository: str) -> None:
    """Refuse what is no OWNER/NAME, before any work."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise InputError(f"--hub: expected OWNER/NAME, found '{repository}'")
