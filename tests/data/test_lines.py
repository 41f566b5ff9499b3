"""A file of prompts is read as a whole read would be, line by line."""

import pytest

from stepdistill.data.lines import Lines
from stepdistill.errors import InputError
from stepdistill.files import digest


def test_lines_are_those_of_the_text(tmp_path):
    text = "\ufeffa red shoe\n\n  rain \r\nzwei Vögel\u2028one\x0btwo\n \u3000 \n鳥"
    (tmp_path / "a.txt").write_bytes(text.encode())
    expected = [line.strip() for line in text.removeprefix("\ufeff").splitlines() if line.strip()]
    found = Lines(tmp_path / "a.txt")
    assert expected == ["a red shoe", "rain", "zwei Vögel", "one", "two", "鳥"]
    assert list(found) == expected and found == expected and len(found) == 6
    assert found[-1] == "鳥" and found[1:4] == ("rain", "zwei Vögel", "one")
    copy = found.copied(tmp_path / "copy.txt")
    (tmp_path / "a.txt").unlink()
    assert copy == expected and copy.path == tmp_path / "copy.txt"
    found = copy
    assert digest(found) == digest(expected), "the same store, however the prompts are given"
    with pytest.raises(IndexError):
        found[6]


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"rain\n\xff\n")
    with pytest.raises(InputError, match="UTF-8 text, found byte 0xff"):
        Lines(tmp_path / "a.txt")
    with pytest.raises(InputError, match="cannot be read"):
        Lines(tmp_path / "b.txt")
