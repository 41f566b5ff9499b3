"""The page of what data cost is that of the stored numbers."""

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_stored_lines_and_says_which_miss_a_bar():
    script = runpy.run_path(str(ROOT / "scripts" / "bench_data.py"))
    facts = json.loads((ROOT / "assets" / "benchmarks" / "data.json").read_text(encoding="utf-8"))
    table = script["table"](facts)
    assert f"{script['BEGIN']}\n{table}\n{script['END']}" in script["PAGE"].read_text(encoding="utf-8")
    for line in facts["lines"]:
        assert line["within_bars"] == all(line[key] <= bar for key, bar in script["BARS"].items())
    worse = {"lines": [facts["lines"][0] | {"within_bars": False}]}
    assert f"| **{facts['lines'][0]['count']:,} prompts** |" in script["table"](facts | worse)
