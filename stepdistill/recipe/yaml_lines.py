"""YAML that remembers on which line each key stands, so that an error can point at it.

Scalars follow the YAML 1.2 core schema: ``1e-4`` is a number and ``yes`` is text (YAML 1.1, PyYAML's own
reading, has both the other way round). Duplicate keys, aliases and tags are errors.
"""

import re
from textwrap import indent
from typing import Any

import yaml
from yaml.reader import ReaderError

from stepdistill.errors import InputError, found

Keys = tuple[str | int, ...]
"""A place in the tree: ("train", "lr"), ("report", "steps", 0)."""

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"([-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan)$")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes these line separators bare unless the text is double-quoted, and reads them as a line break.
        style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
# The writer quotes whatever this reader or a YAML 1.1 reader would not take for text.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    """Parse one YAML document.

    Args:
        text: the document.
        name: what error messages call it, usually its path.

    Returns:
        The tree of dicts, lists and scalars, and the 1-based line of every key and list item.

    Raises:
        InputError: not YAML, several documents, a duplicate or non-text key, an alias or a tag.
    """
    lines: dict[Keys, int] = {}
    try:
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            here = f"{name}:{event.start_mark.line + 1}"
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"{here}: not valid YAML: aliases are not supported")
            if getattr(event, "tag", None):
                raise InputError(f"{here}: tag {event.tag} is not supported")
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return (None if node is None else _build(node, (), lines, name)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{name}:{mark.line + 1}: not valid YAML: {problem}{hint}") from None
    except (ReaderError, RecursionError) as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        reason = getattr(error, "reason", "nested too deeply")
        raise InputError(f"{name}:{line}: not valid YAML: {reason}") from None


def dump(tree: Any, flow: bool | None = None) -> str:
    """Write a tree of dicts, lists and scalars so that :func:`read` returns it unchanged.

    Args:
        flow: all on one line, in brackets; None: only lists and sections of scalars alone; False: nothing.
    """
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=100)


def scalar(value: Any) -> str:
    """One scalar as it stands in a file."""
    return dump([value]).strip()[1:-1]


def put(text: str, keys: Keys, value: Any, name: str) -> str:
    """The document with the scalar at ``keys`` set to ``value``; all other characters, and comments, stay as they are.

    Args:
        keys: a new one goes to the end of its section.
        name: as in :func:`read`.

    Raises:
        InputError: the place holds something other than a scalar on the key's line, or the section is empty.
    """
    read(text, name)
    key, node, missing = None, yaml.compose(text, Loader=yaml.BaseLoader), [*keys]
    while missing and isinstance(node, yaml.MappingNode):
        inside = {pair[0].value: pair for pair in node.value}
        if missing[0] not in inside:
            break
        key, node = inside[missing.pop(0)]
    if not missing and isinstance(node, yaml.ScalarNode) and key.start_mark.line == node.end_mark.line:
        return f"{text[: key.end_mark.index]}: {scalar(value)}{text[node.end_mark.index :]}"
    if not (missing and isinstance(node, yaml.MappingNode) and node.value):
        line = 1 + (key.start_mark.line if key else 0)
        raise InputError(f"{name}:{line}: cannot be rewritten; put '{keys[-1]}: {scalar(value)}' there by hand")
    for one in reversed(missing):
        value = {one: value}
    column, last = node.value[0][0].start_mark.column, node
    while isinstance(last, yaml.CollectionNode) and not last.flow_style:  # whose own mark is where the next one begins
        last = last.value[-1] if isinstance(last, yaml.SequenceNode) else last.value[-1][1]
    if node.flow_style:
        end = node.value[-1][1].end_mark.index
        return f"{text[:end]}, {dump(value, flow=True).strip()[1:-1]}{text[end:]}"
    # Below what is there with its comment, and above the comments and blank lines that lead to the next section.
    end = len(text[: last.end_mark.index].rstrip())
    comment, _, below = text[end:].partition("\n")
    return f"{text[:end]}{comment}\n{indent(dump(value, flow=False), ' ' * column)}{below}"


def _build(node: yaml.Node, keys: Keys, lines: dict[Keys, int], name: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        tree: dict[str, Any] = {}
        for key_node, value in node.value:
            here = f"{name}:{key_node.start_mark.line + 1}"
            key = _build(key_node, (), {}, name)
            if not isinstance(key, str):
                raise InputError(f"{here}: expected text as a key, found {found(key)}")
            place = (*keys, key)
            if key in tree:
                dotted = ".".join(map(str, place))
                raise InputError(f"{here}: {dotted}: duplicate key; first given on line {lines[place]}")
            lines[place] = key_node.start_mark.line + 1
            tree[key] = _build(value, place, lines, name)
        return tree
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*keys, index)] = item.start_mark.line + 1
        return [_build(item, (*keys, index), lines, name) for index, item in enumerate(node.value)]
    return _plain(node.value) if node.style is None else node.value


def _plain(text: str) -> Any:
    """What a scalar without quotes stands for."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) and len(text) < 1000:  # Python refuses to read a longer one, which no setting is
        return int(text)
    return float(text.replace(".inf", "inf").replace(".nan", "nan")) if _FLOAT.fullmatch(text) else text
