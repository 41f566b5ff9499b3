"""Pipelines of the Hugging Face hub as local folders, with one-line errors for those that cannot be loaded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session

from stepdistill.errors import InputError, in_a_line
from stepdistill.files import INDEXES, lacking
from stepdistill.progress import say

FILES = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model"]
"""All that a pipeline is, but its weights."""
PATIENCE = 5
"""Seconds in which the hub has to answer; huggingface_hub itself tries for half a minute, with a line each time."""
# The first that fits counts: a gated repository is one that was not found, to huggingface_hub.
_REASONS = {
    GatedRepoError: "it is gated: accept the licence on its page, then hf auth login",
    RevisionNotFoundError: "it has no such revision",
    RepositoryNotFoundError: "there is no such repository, or it is private: then hf auth login",
}


def download(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of the hub's cache with all that the pipeline ``name`` needs; safetensors only.

    Raises:
        InputError: it is not there, has no such weights, or the hub cannot be reached.
    """
    with asking(name, revision, variant) as cached:
        options = {"revision": revision, "variant": variant, "local_files_only": cached}
        found = Path(DiffusionPipeline.download(name, use_safetensors=True, **options))
    if cached:
        say(f"{name}: the hub does not answer; these are the files of an earlier download")
    return found


def configs(name: str, revision: str | None = None, patterns: Sequence[str] = FILES) -> Path:
    """The folder of the hub's cache with the configs and tokenizers of the pipeline ``name``, or files of ``patterns``.

    Raises:
        InputError: it is not there, or the hub cannot be reached.
    """
    with asking(name, revision) as cached:
        options = {"allow_patterns": list(patterns), "local_files_only": cached}
        return Path(snapshot_download(name, revision=revision, **options))


@contextmanager
def asking(name: str, revision: str | None = None, variant: str | None = None) -> Iterator[bool]:
    """Inside, whether the hub does not answer, so that the cache has to do; what fails says why it did.

    Raises:
        InputError: the pipeline ``name`` is not there, or the hub cannot be reached.
    """
    silent = unreachable()
    try:
        yield silent is not None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"pipeline {name}: {why_not(name, revision, variant, error, silent)}") from error


def unreachable() -> str | None:
    """Why the hub does not answer; None where it does."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # what cannot be reached has as many classes as there are ways to ask
        return in_a_line(error)
    return None


def why_not(name: str, revision: str | None, variant: str | None, error: Exception, silent: str | None) -> str:
    """Why the hub did not give the pipeline ``name``: its answer was ``error``, or it is ``silent``."""
    for kind, words in _REASONS.items():
        if isinstance(error, kind):
            return f"cannot be loaded from the hub: {words}{_typo(name)}"
    reason = silent
    try:
        files = [] if reason else HfApi().list_repo_files(name, revision=revision)
    except tuple(_REASONS) as refused:
        return why_not(name, revision, variant, refused, silent)
    except Exception as failed:  # as in unreachable()
        reason = in_a_line(failed)
    if reason:
        return (
            f"cannot be loaded: there is no such folder here{_typo(name)}, the cache of the Hugging Face hub does not "
            f"hold it, and the hub cannot be reached ({reason}); with a network, once: hf download {name}"
        )
    if INDEXES[1] in files and INDEXES[0] not in files:
        return f"a modular pipeline is loaded from a folder alone: hf download {name} --local-dir FOLDER"
    if (fault := lacking(files, variant)) is not None:
        key, problem = fault
        return problem if key == "pipeline" else f"teacher.{key}: {problem}"
    return f"cannot be loaded from the hub: {in_a_line(error)}"


def _typo(name: str) -> str:
    """A hint at the folder of that name's first half, where there is one."""
    folder, last = Path(name).parent, Path(name).name
    return f" (there is a folder {folder} here, without {last})" if folder.is_dir() else ""
