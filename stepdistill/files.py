"""Files: text and JSON, read with an error that says what is wrong and written whole or not at all; tensors kept for
the next run; which weights a folder in diffusers format has."""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors and, of earlier versions, ...-00001-of-00002.fp16...
_WEIGHTS = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?(\.(?P<variant>\w+))?(-\d+-of-\d+)?"
    r"\.(?P<format>safetensors|bin)"
)
_INDEX = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model)\.(?P<format>safetensors|bin)\.index(\.(?P<variant>\w+))?\.json"
)


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: expected JSON, found {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, InputError) else InputError(f"{path}: expected JSON, found {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def check_sha256(path: Path, expected: str) -> None:
    """Raises InputError unless ``path`` is a file whose SHA-256 is ``expected``."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if (actual := sha256(path)) != expected:
        raise InputError(f"{path}: SHA-256 is {actual}, the protocol expects {expected}")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A draft beside ``path`` to write, a file or a folder. It is published as a whole: no kill leaves half of it.

    Two processes may write the same file at once; not the same folder. An exception removes the draft.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{escape(path.name)}.*.partial"):  # by a kill
        if left.is_dir():
            shutil.rmtree(left)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield draft
        publish(draft, path)
    except BaseException:
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)
        raise


def publish(draft: Path, path: Path) -> None:
    """Have the disk hold a file or folder, then rename it to ``path`` in the place of what is there."""
    for part in (*draft.rglob("*"), draft):
        _open_to_others(part)
        sync(part)
    if not draft.is_dir():
        draft.replace(path)
        return
    # Under another name first: at no moment is there half of a folder under its own.
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    draft.rename(path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


_UMASK = os.umask(0)
os.umask(_UMASK)


def _open_to_others(path: Path) -> None:
    """Give a file the rights that the umask grants to any new one: some libraries keep theirs to their owner."""
    state = path.lstat()
    granted = state.st_mode | (0o666 & ~_UMASK)
    if stat.S_ISREG(state.st_mode) and state.st_nlink == 1 and granted != state.st_mode:
        path.chmod(stat.S_IMODE(granted))


def sync(path: Path) -> None:
    """Have the disk hold what was written into a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; its folder is made."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all; its folder is made."""
    write_text(path, json.dumps(content, indent=1))


def cache_folder() -> Path:
    """$STEPDISTILL_CACHE, or ~/.cache/stepdistill."""
    return Path(os.environ.get("STEPDISTILL_CACHE") or Path.home() / ".cache" / "stepdistill")


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest(*values: Any) -> str:
    """24 hexadecimal digits that stand for the values, in the name of what is kept for the next run.

    Args:
        values: plain ones; tensors, which count with dtype, shape and every bit; and dicts and sequences of such.
    """
    import torch

    content = hashlib.sha256()

    def add(value: Any) -> None:
        if type(value) is str:  # first, for lists of a million prompts
            plain = repr(value).encode()
            content.update(b"str %d;" % len(plain) + plain)
        elif isinstance(value, torch.Tensor):
            content.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, Mapping):
            content.update(f"dict {len(value)};".encode())
            for key in sorted(value, key=str):
                add(key)
                add(value[key])
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes | range):
            content.update(f"list {len(value)};".encode())
            for one in value:
                add(one)
        else:
            plain = value if isinstance(value, bytes) else repr(value).encode()
            content.update(f"{type(value).__name__} {len(plain)};".encode() + plain)

    add(values)
    return content.hexdigest()[:24]


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line, damaged lines left out; none where there is no file."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):  # a line that a kill cut short
            entry = json.loads(line)
            found += [entry] if isinstance(entry, dict) else []
    return found


def cached(file: Path | None, make: Callable[[], dict[str, "Tensor"]]) -> dict[str, "Tensor"]:
    """The tensors in ``file``; where there are none, or damaged ones, those that ``make`` returns, and the file holds.

    Args:
        file: its name says everything that the tensors depend on; None: keep nothing.
    """

    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    if file is None:
        return make()
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError):
        tensors = {name: value.cpu().contiguous() for name, value in make().items()}
    with atomic(file) as draft:
        save_file(tensors, draft)
    # The file's pages are read when they are needed, and need no memory of the process's own.
    return load_file(file)


def weight_file(name: str) -> tuple[str, str | None] | None:
    """(format, variant) of a file that holds weights or lists the files that do; None for any other.

    Args:
        name: without its folder. The format is "safetensors" or "bin"; the variant None or a name such as "fp16".
    """
    if match := _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name):
        return match["format"], match["variant"]
    return None


INDEXES = ("model_index.json", "modular_model_index.json")
"""The files that list a pipeline's components: of one class, or of blocks; the first that is there counts."""


def index_of(folder: Path) -> Path | None:
    """The file that lists the components of the pipeline in ``folder``; None: it holds none."""
    return next((folder / name for name in INDEXES if (folder / name).is_file()), None)


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
