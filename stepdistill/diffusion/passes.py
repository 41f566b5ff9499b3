"""Names of the conditions of several unconditional passes, in one dict: those of the first have plain names."""

from collections.abc import Mapping
from typing import TypeVar

Rows = TypeVar("Rows")


def of_pass(cond: Mapping[str, Rows], number: int) -> dict[str, Rows]:
    """The conditions of an unconditional pass under names of their own, beside those of the first, number 0."""
    return {f"pass {number}/{name}" if number else name: rows for name, rows in cond.items()}


def in_pass(null: Mapping[str, Rows], number: int) -> dict[str, Rows]:
    """Of all unconditional conditions those of one pass, under their plain names: the inverse of :func:`of_pass`."""
    return {plain_name(name): rows for name, rows in null.items() if name in of_pass({plain_name(name): rows}, number)}


def plain_name(name: str) -> str:
    """The name of a condition without the pass that it is of."""
    return name.partition("/")[2] if name.startswith("pass ") else name
