"""Sources of the same three samples, by the names of their forms."""

import pytest

from data.made import folder, jsonl, shards, table


@pytest.fixture
def source(request, tmp_path) -> str:
    (tmp_path / "pictures").mkdir()
    makers = {"folder": folder, "jsonl": jsonl, "shards": shards}
    if request.param in makers:
        place = tmp_path / "made"
        (place / "pictures").mkdir(parents=True)
        return makers[request.param](place)
    return table(tmp_path, request.param)
