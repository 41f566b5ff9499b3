"""The measured rules on prompts of docs/guidance.md: the page shows the stored rows."""

import json

from stepdistill import assets

ROOT = assets.root()


def test_the_page_shows_the_stored_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench_prompt_rules as script

    stored = json.loads((ROOT / "assets" / "benchmarks" / "guidance_rules_emoji.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8")
    shown = page.partition(script.BEGIN)[2].partition(script.END)[0].strip()
    assert shown == script.table(stored), "run python scripts/bench_prompt_rules.py --table-only"
    assert [row["name"] for row in stored["rows"]] == [name for name, *_ in script.RULES]
    passes = {row["name"]: row["nfe"] for row in [*stored["rows"], *stored["student_rows"]]}
    assert passes["cfg"] == 2 * passes["no guidance"] == 2 * stored["steps"]
    assert passes["teacher's first step"] == passes["student"] + 1
