"""Reads the text files that users write."""

from pathlib import Path

from stepdistill.errors import InputError


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
