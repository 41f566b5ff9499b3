"""A hook of mkdocs: the page of every error message, made from the code that raises it when the site is built.

A message stands there with ``...`` for names and numbers, by room, with what its function's docstring says of it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ERRORS = ("InputError", "TraceError", "RunError", "NonFiniteError", "ExportError")
FEWEST = 3
"""Words of a message that can be searched for."""
INTRODUCTION = """# Every message

Made from the code when this site is built. `...` stands for names and numbers of your run, and the line below says when
it comes. What to do about the frequent ones is in [troubleshooting](troubleshooting.md).
"""


def on_files(files: Files, config: Any) -> Files:
    """Add messages.md."""
    files.append(File.generated(config, "messages.md", content=page()))
    return files


def page() -> str:
    """The page in Markdown."""
    rooms: dict[str, dict[str, str]] = {}
    for folder in ("stepdistill", "eval", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            room = path.relative_to(ROOT).parts[:-1][-2:]
            rooms.setdefault("/".join(room), {}).update(messages(ast.parse(path.read_text(encoding="utf-8"))))
    parts = [INTRODUCTION]
    for room, found in sorted(rooms.items()):
        parts += [f"## {room}"] if found else []
        parts += [
            f"**`{message}`**  \n{when}" if when else f"**`{message}`**" for message, when in sorted(found.items())
        ]
    return "\n\n".join(parts) + "\n"


def messages(tree: ast.AST, when: str = "") -> Iterator[tuple[str, str]]:
    """(message, when it comes) of everything that a module raises.

    Args:
        tree: of the module, or a part of it.
        when: what the docstring around it says.
    """
    for node in ast.iter_child_nodes(tree):
        inner = when
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = raised(ast.get_docstring(node) or "")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
            text = " ".join(words(node.args[0]).split()).replace("`", "'")
            if len(re.findall(r"[a-z]{2,}", text)) >= FEWEST:
                yield text, inner
        yield from messages(node, inner)


def words(node: ast.expr) -> str:
    """A string expression, with ``...`` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    return "..."


def raised(docstring: str) -> str:
    """What a docstring says under Raises, without the names of errors."""
    found = re.search(r"Raises:\n((?:[ \t]+.*\n?)+)", docstring + "\n")
    text = " ".join(found[1].split()) if found else ""
    text = re.sub(rf"\b(?:{'|'.join(ERRORS)}): *", "", text).replace("``", "`").strip()
    return text[:1].upper() + text[1:]
