"""Files and folders that appear as a whole, and the names of what is kept for the next run."""

import os

import pytest
import torch

from stepdistill.files import atomic, digest, json_lines, write_text


def tree(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_takes_the_place_of_another_as_a_whole(tmp_path):
    for number in ("1", "2"):
        with atomic(tmp_path / "out") as draft:
            write_text(draft / "in" / number, number)
            assert tree(tmp_path / "out") == ({} if number == "1" else {"in/1": "1"})
    assert tree(tmp_path) == {"out/in/2": "2"}


def test_what_fails_or_was_killed_leaves_nothing(tmp_path):
    write_text(tmp_path / ".out.1.partial" / "half", "killed")
    write_text(tmp_path / "out" / "whole", "1")
    with pytest.raises(KeyError), atomic(tmp_path / "out") as draft:
        assert not (tmp_path / ".out.1.partial").exists()
        write_text(draft / "half", "2")
        raise KeyError
    with pytest.raises(KeyError), atomic(tmp_path / "out" / "whole") as draft:
        draft.write_text("half")
        raise KeyError
    assert tree(tmp_path) == {"out/whole": "1"}


def test_a_digest_depends_on_every_value_and_not_on_the_order_of_keys():
    weights = torch.arange(4.0)
    assert digest({"a": 1, "b": weights}) == digest({"b": weights.clone(), "a": 1}) and len(digest()) == 24
    values = [1, "1", [1], (), [[1], 2], [1, [2]], ["ab", "c"], ["a", "bc"], {"a": None}, None, b"1", 1.0, True]
    values += [weights, weights + 1e-7, weights.half(), weights.view(2, 2), weights.to(torch.bfloat16), {"b": weights}]
    assert len({digest(value) for value in values}) == len(values)


def test_what_a_library_keeps_to_its_owner_is_as_readable_as_other_files(tmp_path):
    kept = tmp_path / "elsewhere"
    write_text(kept, "another's file")
    kept.chmod(0o600)
    with atomic(tmp_path / "out") as draft:
        write_text(draft / "plain", "1")
        write_text(draft / "weights", "1")
        (draft / "weights").chmod(0o600)
        os.link(kept, draft / "link")
    rights = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert rights["weights"] == rights["plain"] and rights["link"] == 0o600


def test_lines_that_a_kill_cut_short_are_left_out(tmp_path):
    assert json_lines(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n[2]\n{"step": 3}\n{"step": 4, "lo')
    assert json_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 3}]
