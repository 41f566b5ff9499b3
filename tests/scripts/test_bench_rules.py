"""The measured rules of docs/guidance.md: the page shows the stored rows, and no rule is missing."""

import importlib.util
import json

from stepdistill import assets
from stepdistill.sampling.rules.names import NAMES

ROOT = assets.root()


def script():
    spec = importlib.util.spec_from_file_location("bench_rules", ROOT / "scripts" / "bench_rules.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_page_shows_the_stored_rows():
    stored = json.loads((ROOT / "assets" / "benchmarks" / "guidance_rules.json").read_text(encoding="utf-8"))
    page, loaded = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8"), script()
    shown = page.partition(loaded.BEGIN)[2].partition(loaded.END)[0].strip()
    assert shown == loaded.table(stored), "run python scripts/bench_rules.py --table-only"
    assert [row["name"] for row in stored["rows"]] == [name for name, *_ in loaded.RULES]
    passes = {row["name"]: row["nfe"] for row in stored["rows"]}
    assert passes["no guidance"] == stored["steps"] and passes["cfg"] == 2 * stored["steps"]


def test_every_rule_has_a_row():
    """But two that are younger than the rows that are stored: the next whole run is to take them in."""
    assert {rule.partition(":")[0] for _, rule, *_ in script().RULES} | {"apg", "noise-correction"} == {*NAMES}
