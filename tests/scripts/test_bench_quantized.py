"""The measured students of few bits in docs/export.md: the page shows the stored rows, and every grid has two."""

import importlib.util
import json
import sys
from typing import get_args

from stepdistill import assets
from stepdistill.roles.quantized import Quantization

ROOT = assets.root()


def test_the_page_shows_the_stored_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("bench_quantized", ROOT / "scripts" / "bench_quantized.py")
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_quantized", loaded)  # its dataclass looks its module up
    spec.loader.exec_module(loaded)
    stored = json.loads((ROOT / "assets" / "benchmarks" / "quantized.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    shown = page.partition(loaded.BEGIN)[2].partition(loaded.END)[0].strip()
    assert shown == loaded.table(stored), "run python scripts/bench_quantized.py --table-only"
    rows = [(row["weights"], row["rounded"]) for row in stored["rows"]]
    both = [(how, when) for how in get_args(Quantization) for when in ("afterwards", "in training")]
    assert rows == [("teacher", "-"), (loaded.EXACT, "-"), *both]
