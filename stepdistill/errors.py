"""The two user-facing exceptions, printed in one line without a traceback, and helpers for their messages."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class InputError(ValueError):
    """Wrong input: a recipe, a path, a pipeline. The message says where, what was expected, what was found. Exit 2."""


class RunError(RuntimeError):
    """What stops a run that was right: numbers, memory, disk. What was saved before is whole. Exit 1."""


def found(value: Any) -> str:
    """A value as an error shows it: on one line and short."""
    if isinstance(value, dict):
        return f"a section with the keys {', '.join(map(str, value))}"[:80]
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def in_a_line(error: BaseException) -> str:
    """An error's message on one line; its class, where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class, where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of a message: a question that names the nearest known word, or nothing."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
