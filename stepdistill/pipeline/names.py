"""What the name of a pipeline stands for, known before torch and diffusers are imported, which takes seconds."""

import difflib
from pathlib import Path

from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.files import index_of


def source(path: str | Path) -> str:
    """What diffusers loads for the name of an embedded teacher, a folder, a checkpoint file or a hub id.

    Raises:
        InputError: it is none of them, or a file of another kind than safetensors.
    """
    name = str(path)
    if index_of(Path(name)):
        return name
    if name in assets.teachers():
        return str(assets.find(f"teachers/{name}"))
    if Path(name).is_file():
        check_file(f"pipeline {name}", Path(name))
        return name
    if Path(name).exists():
        raise InputError(f"pipeline {name}: expected a diffusers folder with model_index.json, found none in it")
    if name.startswith("runs/"):  # the folder of runs by default, and nobody's name on the hub
        raise InputError(f"pipeline {name}: expected a run, found no such folder; `stepdistill runs` lists all")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        close = difflib.get_close_matches(name, assets.teachers(), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        known = ", ".join(assets.teachers()) or "none"
        raise InputError(
            f"pipeline {name}: expected a folder, a hub id or an embedded teacher ({known}), found no such thing{hint}"
        )
    return name


def check_name(path: str | Path) -> None:
    """Refuse what is no run with an export, no export, and nothing that :func:`source` knows.

    Raises:
        InputError: it is none of them, or a run without an export.
    """
    place = Path(path)
    if (place / "recipe.yaml").is_file() and not (place / "export").is_dir():
        export = place / "export"
        raise InputError(f"{place}: the run has no export/ yet; finish it, or run stepdistill export {place} {export}")
    if not any((place / name).exists() for name in ("export", "stepdistill.json")):
        source(path)


def check_file(where: str, path: Path) -> None:
    """Raises InputError, which begins with ``where``, unless ``path`` is a file of safetensors by its name."""
    if not path.is_file():
        raise InputError(f"{where}: expected a .safetensors file, found nothing at {path}")
    if path.suffix != ".safetensors":
        kind = path.suffix or "a file without an ending"
        raise InputError(f"{where}: expected a .safetensors file, found {kind} at {path}; pickles are not read")
