"""Runs side by side: the settings in which they differ, how they stand, and what they measured. Without torch."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from stepdistill.errors import InputError
from stepdistill.files import json_lines, read_json, read_text
from stepdistill.training.layout import RunFolder
from stepdistill.training.runs import standing

Column = dict[str, Any]


def compare_runs(folders: Sequence[str | Path]) -> dict[str, Any]:
    """What :func:`stepdistill.cli_facts.compare` prints: a value for each run in every list, None where it has none.

    Returns:
        ``runs``; ``state``, ``settings`` (keys in which the recipes differ), ``metrics`` (the last of each in
        metrics.jsonl) and ``report`` (rows of their own students, where all were measured under one protocol), each a
        list by name.

    Raises:
        InputError: fewer than two folders, or one that is no run.
    """
    if len(folders) < 2:
        raise InputError(f"compare: expected at least two runs, found {len(folders)}")
    runs = [RunFolder(folder) for folder in folders]
    for run in runs:
        run.check()
    settings = _rows([_flat(_recipe(run)) for run in runs])
    own = ("output", "resume")
    return {
        "runs": [str(run.path) for run in runs],
        "state": _rows([_state(run) for run in runs]),
        "settings": {key: row for key, row in settings.items() if key not in own and any(one != row[0] for one in row)},
        "metrics": _rows([_last(run) for run in runs]),
        "report": _rows(_reported(runs)),
    }


def as_rows(compared: dict[str, Any]) -> list[list[str]]:
    """The same as text: a line of the runs' names, then the sections, each after a line of its name."""
    rows = [["", *compared["runs"]]]
    for section in ("state", "settings", "metrics", "report"):
        if compared[section]:
            title = {"settings": "settings that differ", "metrics": "last metrics"}.get(section, section)
            rows.append([f"-- {title}", *("" for _ in compared["runs"])])
            rows += [[name, *map(_text, values)] for name, values in compared[section].items()]
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rows(columns: Sequence[Column]) -> dict[str, list[Any]]:
    """A list over the columns for every key of any of them."""
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def _recipe(run: RunFolder) -> dict[str, Any]:
    # libyaml's loader where there is one.
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)(read_text(run.recipe)).get_single_data()


def _flat(tree: Any, prefix: str = "") -> Column:
    """Nested settings by their dotted keys; lists as JSON."""
    if not isinstance(tree, dict):
        return {prefix: json.dumps(tree) if isinstance(tree, list) else tree}
    flat: Column = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _state(run: RunFolder) -> Column:
    known = asdict(standing(run.path))
    return {
        "state": known["state"],
        "step": f"{known['step']}/{known['steps']}",
        known["metric"] or "best": known["best"],
    }


def _last(run: RunFolder) -> Column:
    """The last value of each number in metrics.jsonl."""
    last: Column = {}
    for line in json_lines(run.metrics):
        last |= line
    return {name: value for name, value in last.items() if name not in ("step", "lr")}


def _reported(runs: Sequence[RunFolder]) -> list[Column]:
    """Metrics of every run's own student by steps; nothing unless all reports have one protocol and one size."""
    columns: list[Column] = []
    kinds = set()
    for run in runs:
        with suppress(InputError, KeyError, TypeError, ValueError):
            report = read_json(run.report / "report.json")
            rows = [row for row in report["rows"] if row["role"] == "student"]
            kinds.add((report["protocol"], rows[0]["samples"] if rows else 0))
            columns.append(
                {f"{name}, {row['steps']} steps": value for row in rows for name, value in row["metrics"].items()}
            )
    return columns if len(columns) == len(runs) and len(kinds) == 1 else []
