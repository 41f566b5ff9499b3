"""A file with a prompt a line, read line by line: of a million prompts only their places are in memory."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, overload

from stepdistill.data.places import opened
from stepdistill.errors import InputError
from stepdistill.files import atomic

_MARK = b"\xef\xbb\xbf"


class Lines(Sequence[str]):
    """The lines of a UTF-8 text file without blanks around them; empty ones are left out. The file must stay as it is.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """

    def __init__(self, path: Path):
        self.path, self._places = path, array("q")
        try:
            with open(path, "rb") as file:
                place = len(_MARK) if file.read(len(_MARK)) == _MARK else 0
                file.seek(place)
                for line in file:
                    for text in line.decode().splitlines(keepends=True):
                        if text.strip():
                            self._places.extend((place, len(text.encode())))
                        place += len(text.encode())
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None

    def copied(self, path: Path) -> "Lines":
        """The same lines in a file of their own, which is written if it is not there."""
        if not path.is_file():
            with atomic(path) as draft, open(draft, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{line}\n" for line in self)
        return Lines(path)

    def __len__(self) -> int:
        return len(self._places) // 2

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        chosen = range(len(self))[index]
        with open(self.path, "rb") as file:
            lines = [self._line(file, number) for number in ([chosen] if isinstance(chosen, int) else chosen)]
        return lines[0] if isinstance(chosen, int) else tuple(lines)

    def _line(self, file: BinaryIO, number: int) -> str:
        file.seek(self._places[2 * number])
        return file.read(self._places[2 * number + 1]).decode().strip()

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            for number in range(len(self)):
                yield self._line(file, number)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    def __hash__(self) -> int:
        return hash(self.path)


def lines_of(places: Iterable[str]) -> Iterator[str]:
    """The lines of several text files one after the other, as :class:`Lines` has them; also of those at URLs.

    Raises:
        InputError: one cannot be read, or is not UTF-8.
    """
    for place in places:
        try:
            with opened(place) as file:
                for number, line in enumerate(file):
                    for text in (line.removeprefix(_MARK) if number == 0 else line).decode().splitlines():
                        if text.strip():
                            yield text.strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from None
        except OSError as error:
            raise InputError(f"{place}: cannot be read: {' '.join(str(error).split())}") from None
