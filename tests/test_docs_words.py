"""The README is short, sentences are too, and every heading of a table of numbers is in the glossary."""

import ast
import re
from collections.abc import Iterator

import pytest

from stepdistill.eval import names
from test_docs import PAGES, ROOT

MOST_WORDS = 34
GENERATED = {"recipe.md"}
"""From docstrings of the recipe, which have tests of their own."""


def sentences(text: str) -> Iterator[str]:
    """Of a page's paragraphs, list entries and table cells; code counts as a word, targets of links as none."""
    text = re.sub(r"^```.*?^```$|^ {4}.*?$|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "CODE", text))
    text = re.sub(r"^\s*([-*]|\d+\.|#+) | · |\|", "\n\n", text, flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n", text):
        yield from re.split(r"(?<=[.!?])[\"')*_]*\s+(?=\W*[A-Z0-9])", " ".join(block.split()))


def test_sentences_end_where_sentences_end():
    page = "A b\n[c](d e). `F g` h.\n- i (j.) K\n\n| l m | n |\n|---|---|\n```sh\no p\n```\n"
    assert list(filter(None, sentences(page))) == ["A b c.", "CODE h.", "i (j.", "K", "l m", "n", "---", "---"]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name)
def test_sentences_are_short(page):
    found = sentences(page.read_text(encoding="utf-8"))
    assert [one for one in found if len(one.split()) > MOST_WORDS] == []


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150 and len(text.split()) < 1500


def test_the_glossary_has_every_heading_of_a_table_of_numbers():
    terms = re.findall(r"\*\*([^*]+)\*\*", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))
    headings = set(names._TITLES.values()) | {names.metric_name("diversity_enet", 1)}
    for name in ("README.md", "docs/comparison.md", "assets/reports/fashion/report.md"):
        tables = re.findall(r"^\|(.*)\|\n\|[-:| ]+\|$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        headings |= {heading.strip() for table in tables for heading in table.split("|")}
    number = r"@[^\s,]+| ×1000|, seed \d| / teacher's|(?<=NFE) \d|^\d+ GB "
    plain = {re.sub(number, "", heading).lower() for heading in headings} - {""}
    assert len(plain) > 30 and plain - {term.lower() for term in terms} == set()


def messages() -> list[str]:
    """Every string of the library, with ``...`` for what is filled in."""
    found = []
    for path in [path for folder in ("stepdistill", "eval") for path in sorted((ROOT / folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_that_are_explained_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained, known = re.findall(r"\*\*`([^`]+)`\*\*", page), messages()
    assert len(explained) > 30
    for message in explained:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.DOTALL)
        assert any(pattern.search(one) for one in known), message
