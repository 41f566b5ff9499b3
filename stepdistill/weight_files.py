"""The files of a diffusers folder by their names: which weights a component has, as which variant, in which format."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

SINGLE_FILE = (
    "expected a folder in diffusers format, found a file; of a checkpoint make one with "
    "from_single_file(FILE).save_pretrained(FOLDER) of the pipeline's class (docs/your-model.md)"
)
"""The message where a pipeline's place holds a single file."""
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors and, of earlier versions, ...-00001-of-00002.fp16...
_WEIGHTS = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?(\.(?P<variant>\w+))?(-\d+-of-\d+)?"
    r"\.(?P<format>safetensors|bin)"
)
_INDEX = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model)\.(?P<format>safetensors|bin)\.index(\.(?P<variant>\w+))?\.json"
)


def weight_file(name: str) -> tuple[str, str | None] | None:
    """(format, variant) of a file that holds weights or lists the files that do; None for any other.

    Args:
        name: without its folder. The format is "safetensors" or "bin"; the variant None or a name such as "fp16".
    """
    if found := _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name):
        return found["format"], found["variant"]
    return None


def lacking(files: Iterable[str], variant: str | None = None) -> tuple[str, str] | None:
    """(key of the recipe's teacher section, problem) of a pipeline that cannot be loaded; None for one that can.

    Args:
        files: names relative to the pipeline's folder, with forward slashes.
        variant: the one to be loaded.
    """
    held: dict[str, set[tuple[str, str | None]]] = {}
    for file in map(PurePosixPath, files):
        if len(file.parts) == 2 and (weights := weight_file(file.name)) is not None:
            held.setdefault(file.parts[0], set()).add(weights)
    safe = {name: {one for kind, one in weights if kind == "safetensors"} for name, weights in held.items()}
    if pickled := sorted(name for name, variants in safe.items() if not variants):
        return "pipeline", (
            f"expected weights as .safetensors, found only pickled ones (.bin) in {', '.join(pickled)}; make a folder "
            "with safetensors of it: stepdistill convert SOURCE OUT"
        )
    known = sorted({one for variants in safe.values() for one in variants if one is not None})
    if variant is not None and variant not in known:
        expected = " or ".join(map(repr, known)) if known else "null"
        return "variant", f"expected {expected}, found '{variant}': no component has weights of that name"
    for name, variants in sorted(safe.items()):
        if not variants & {variant, None}:
            expected = " or ".join(f"'{one}'" for one in sorted(filter(None, variants)))
            return "variant", f"expected {expected}, the only weights that {name} has, found {variant or 'null'}"
    return None


def files_in(folder: Path) -> list[str]:
    """The files in the folders of a local pipeline's components, relative to ``folder``."""
    return [path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file()]
