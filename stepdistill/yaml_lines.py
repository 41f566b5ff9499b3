"""YAML that remembers on which line each key stands, so that an error can point at it.

Scalars follow the YAML 1.2 core schema: ``1e-4`` is a number and ``yes`` is text (YAML 1.1, PyYAML's own
reading, has both the other way round). Duplicate keys are an error; anchors and aliases are refused.
"""

import re
from typing import Any

import yaml

from stepdistill.errors import InputError

Keys = tuple[str | int, ...]
"""A place in the tree: ("train", "lr"), ("report", "steps", 0)."""

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$|[-+]?\.inf$|\.nan$")
_SCALARS = {
    "null": (re.compile(r"~$|null$|$"), ["~", "n", ""]),
    "bool": (re.compile(r"true$|false$"), ["t", "f"]),
    "int": (re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
}

_PLAIN = {f"tag:yaml.org,2002:{name}" for name in (*_SCALARS, "str")}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own registry

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes these line separators bare unless the text is double-quoted, and reads them as a line break.
        style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
# The writer quotes whatever this reader or a YAML 1.1 reader would not take for text.
_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", *_SCALARS["float"])


def read(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    """Parse one YAML document.

    Args:
        text: the document. name: what error messages call it, usually its path.

    Returns:
        The tree of dicts, lists and scalars, and the 1-based line of every key and list item.

    Raises:
        InputError: not YAML, several documents, a duplicate or non-text key, an alias or a foreign tag.
    """
    lines: dict[Keys, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _build(loader, node, (), lines, name)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{name}:{mark.line + 1}: not valid YAML: {problem}{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{name}:{line}: not valid YAML: {error.reason}") from None


def dump(tree: Any) -> str:
    """Write a tree of dicts, lists and scalars so that :func:`read` returns it unchanged; lists on one line."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def scalar(value: Any) -> str:
    """One scalar as it stands in a file."""
    return dump([value]).strip()[1:-1]


def put(text: str, keys: Keys, value: Any, name: str) -> str:
    """The document with the scalar at ``keys`` set to ``value``; every other line, and its comment, stay as they are.

    Args:
        keys: a key, or one of a section at the top level. name: as in :func:`read`.

    Raises:
        InputError: the place is not written as a line of its own.
    """
    lines, places = text.splitlines(), read(text, name)[1]
    *parent, key = keys
    wanted = f"{key}: {scalar(value)}"
    if keys in places:
        number = places[keys] - 1
        match = re.fullmatch(rf"(\s*){re.escape(str(key))}\s*:[^#\[{{|>]*?(\s+#.*)?", lines[number])
        if match is None:
            raise InputError(f"{name}:{number + 1}: cannot be rewritten; put '{wanted}' there by hand")
        lines[number] = f"{match[1]}{wanted}{match[2] or ''}"
    elif parent and tuple(parent) in places:
        number = places[tuple(parent)] - 1
        below = [line for place, line in places.items() if place[:-1] == tuple(parent) and line - 1 > number]
        if not below:
            raise InputError(f"{name}:{number + 1}: cannot be added to; put '{wanted}' there by hand")
        indent = re.match(r"\s*", lines[min(below) - 1])[0]
        # Below what is there, and above the comments and blank lines that lead to the next section.
        last = max(line for place, line in places.items() if place[: len(parent)] == tuple(parent))
        lines.insert(last, f"{indent}{wanted}")
    else:
        lines += [f"{parent[0]}:", f"  {wanted}"] if parent else [wanted]
    return "\n".join(lines) + "\n"


def _build(loader: _Loader, node: yaml.Node, keys: Keys, lines: dict[Keys, int], name: str) -> Any:
    here = f"{name}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode) and node.tag == loader.DEFAULT_MAPPING_TAG:
        tree: dict[str, Any] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            key = _build(loader, key_node, (), {}, name)
            if not isinstance(key, str):
                raise InputError(f"{name}:{line}: expected text as a key, found {key!r}")
            if key in tree:
                first = lines[(*keys, key)]
                raise InputError(f"{name}:{line}: {_dotted((*keys, key))}: duplicate key; first given on line {first}")
            lines[(*keys, key)] = line
            tree[key] = _build(loader, value, (*keys, key), lines, name)
        return tree
    if isinstance(node, yaml.SequenceNode) and node.tag == loader.DEFAULT_SEQUENCE_TAG:
        for index, item in enumerate(node.value):
            lines[(*keys, index)] = item.start_mark.line + 1
        return [_build(loader, item, (*keys, index), lines, name) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN:
        raise InputError(f"{here}: tag {node.tag} is not supported")
    try:
        return loader.construct_object(node)
    except ValueError:
        raise InputError(f"{here}: {node.value!r} does not fit its tag {node.tag}") from None


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))
