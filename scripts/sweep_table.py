"""How many of diffusers' own tiny test pipelines are traced: store a sweep's results, write the section of a page.

    python scripts/sweep_table.py RESULTS.jsonl --tests COMMIT   # stores assets/benchmarks/sweep.json, then as below
    python scripts/sweep_table.py                                # writes the section of what is stored

RESULTS.jsonl is written by scripts/sweep/sweep.py and whole.py beside it, a line for each test; a later line of a
``test`` wins over an earlier one. ``name`` is the pipeline's class, ``kind`` text-to-image or another, ``built`` and
``traced`` are booleans, ``reason`` says why not. ``arguments`` are those that a refusal named and that were then set;
``objects`` says that some are no plain values. ``whole`` is what came of the whole way: ``passed``, the ``form`` of the
export, the ``sampler``, what was trained (``train``), ``mask`` where a white one was stated, and the ``reason`` where
it did not pass.
"""

import argparse
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, STORED = ROOT / "docs" / "pipelines.md", ROOT / "assets" / "benchmarks" / "sweep.json"
BEGIN, END = "<!-- sweep: written by scripts/sweep_table.py -->", "<!-- end of sweep -->"
WIDTH, LONGEST, A_LINE = 120, 160, 8
TEXT = """\
diffusers tests its pipelines on tiny random ones. Each of them is built here offline, with small tokenizers and text
encoders in the place of those that its test would download. Then it is traced with the arguments of its test.
`scripts/sweep/sweep.py` repeats this; its first lines say how. The tests of SkyReels V2 and Cosmos 2.5 leave their
scheduler at defaults that no flow network is sampled with; here it has settings of flow (`SCHEDULERS` there). The
prompts of Bria Fibo Edit are JSON here, as its test's are. `stepdistill inspect` has plain words, which that pipeline
refuses.

Of {tests} tests (commit {commit}), {built} build a pipeline with diffusers {diffusers} here. **{traced} of these
({share}) are traced** by stepdistill {stepdistill}: recorded steps are repeated to 1e-5. For {advised} of them an
argument was set that the first refusal had named (`{names}`).

**{passed} of the {tried} that were tried ({passed_share}) go the whole way** (`scripts/sweep/whole.py`): the pipeline
is saved as a folder, and `stepdistill train` distils it with a recipe: two steps of DMD2, a LoRA. The export is loaded
by stock diffusers, and a plain call of it repeats the student's samples to 1e-5. {loras} of the exports are LoRAs,
{wholes} whole pipelines. {ddim} students take DDIM's or Euler's step, because the pipeline's call knows no other.

{white} of these students fill a masked part of a picture. They were distilled with a white mask, as the refusal of
another says: the network is not given the mask, and the student then works with any.
"""


def rows_of(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The results by name, of each test the last; a refusal without what all begin with."""
    last = {}
    for row in map(json.loads, lines):
        row["reason"] = re.sub(r"^trace: check '([\w-]+)' failed: ", r"\1: ", row.get("reason", ""))[: LONGEST + 1]
        last[row.pop("test", row["name"])] = {key: value for key, value in row.items() if value or key == "traced"}
    return sorted(last.values(), key=lambda row: (row["kind"], row["name"], row.get("reason", "")))


def share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def totals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each kind of pipeline and one for all."""
    lines = ["| kind | tests | built | traced | of those built | the whole way | of those traced |"]
    lines.append("|---|---|---|---|---|---|---|")
    for kind in [*dict.fromkeys(row["kind"] for row in rows), None]:
        some = [row for row in rows if kind in (row["kind"], None)]
        built, traced = (sum(bool(row.get(key)) for row in some) for key in ("built", "traced"))
        passed = sum(whole(row)["passed"] for row in some)
        counts = f"{len(some)} | {built} | {traced} | {share(traced, built)} | {passed} | {share(passed, traced)}"
        lines.append(f"| {kind or '**all**'} | {counts} |")
    return lines


def whole(row: dict[str, Any]) -> dict[str, Any]:
    """What came of a test's whole way."""
    return row.get("whole") or {"passed": False}


def names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The classes in order, with how many tests each has where there are several."""
    return [f"`{name}`{f' ({n})' if n > 1 else ''}" for name, n in Counter(row["name"] for row in rows).items()]


def reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each reason, with what is refused for it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["reason"]):
        text = " ".join(row["reason"].replace("|", "/").split())
        # One reason for all, whatever the pipeline's name.
        text = re.sub(r"^(\w+: )\w+(?= (takes|failed|never))", r"\1the pipeline", text)
        text = re.sub(r"^trace: check '([\w-]+)' failed: ", r"\1: ", text)
        text = re.sub(r"^teacher\.pipeline: a plain call .* what is trained; ", "plain call: ", text)
        text = re.sub(r"(?<=own )\w+ failed on \[[^\]]*\](?=: )", "the pipeline failed", text)
        text = re.sub(r"; (its tensors are|the closest).*| \[[\d, ]+\](?=, scaled)|:? \(?off by .*", "", text)
        text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
        open_code = text.count("`") % 2  # a mark whose partner was cut off
        groups.setdefault("".join(text.rsplit("`", 1)) if open_code else text, []).append(row)
    return [f"| {', '.join(names(some))} | {reason} |" for reason, some in groups.items()]


def section(stored: dict[str, Any]) -> str:
    """The section between its markers."""
    rows = stored["rows"]
    built = [row for row in rows if row.get("built")]
    traced = [row for row in built if row["traced"]]
    advised = [row for row in traced if row.get("arguments")]
    passed = [row for row in traced if whole(row)["passed"]]
    failed = [row | {"reason": whole(row)["reason"]} for row in traced if "reason" in whole(row)]
    words = sorted({f"{name}: {json.dumps(value)}" for row in advised for name, value in row["arguments"].items()})
    paragraphs = TEXT.format(
        tests=len(rows),
        built=len(built),
        traced=len(traced),
        share=share(len(traced), len(built)),
        advised=len(advised),
        names="`, `".join(words),
        tried=len(passed) + len(failed),
        passed=len(passed),
        passed_share=share(len(passed), len(passed) + len(failed)),
        loras=sum(whole(row)["form"] == "lora" for row in passed),
        wholes=sum(whole(row)["form"] == "pipeline" for row in passed),
        white=sum(whole(row).get("mask") == "white" for row in passed),
        ddim=sum(whole(row)["sampler"] == "ddim" for row in passed),
        commit=stored["tests"][:10],
        **stored["versions"],
    )
    text = "\n\n".join(textwrap.fill(one, WIDTH, break_on_hyphens=False) for one in paragraphs.split("\n\n"))
    refused = [row for row in built if not row["traced"]]
    lines = [BEGIN, "", text, "", *totals(rows), "", "Refused, with the [check](#what-is-refused) that failed:", ""]
    lines += ["| pipeline | reason |", "|---|---|", *reasons(refused), ""]
    lines += ["Traced, but not taken the whole way:", "", "| pipeline | reason |", "|---|---|", *reasons(failed), ""]
    lines += ["The whole way:", "", "| kind | pipelines |", "|---|---|"]
    for kind in dict.fromkeys(row["kind"] for row in passed):
        each = names([row for row in passed if row["kind"] == kind])
        lines += [f"| {kind} | {', '.join(each[at : at + A_LINE])} |" for at in range(0, len(each), A_LINE)]
    lines += ["", "Not built here:", "", "| pipeline | reason |", "|---|---|"]
    return "\n".join([*lines, *reasons([row for row in rows if not row.get("built")]), "", END])


def page() -> str:
    """docs/pipelines.md with its section anew."""
    text, stored = PAGE.read_text(encoding="utf-8"), json.loads(STORED.read_text(encoding="utf-8"))
    before, _, rest = text.partition(BEGIN)
    return before + section(stored) + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, help="a sweep's results, a line of JSON for each test")
    parser.add_argument("--tests", help="the commit of diffusers whose tests they are")
    chosen = parser.parse_args()
    if chosen.results is not None:
        if not chosen.tests:
            parser.error("expected --tests COMMIT beside results")
        rows = rows_of(chosen.results.read_text(encoding="utf-8").splitlines())
        head = {"tests": chosen.tests, "versions": {name: version(name) for name in ("stepdistill", "diffusers")}}
        body = ",\n  ".join(json.dumps(row) for row in rows)
        STORED.write_text(json.dumps(head)[:-1] + f', "rows": [\n  {body}\n]}}\n', encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
