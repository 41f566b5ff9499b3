"""How many steps of a run each player moves in, and the mean seconds per update if a run has measured them."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping

from stepdistill.errors import InputError
from stepdistill.methods.base import DistillMethod
from stepdistill.recipe import Recipe, load
from stepdistill.training.layout import RunFolder


def kinds_of_steps(method: DistillMethod, steps: int) -> dict[tuple[str, ...], float]:
    """Which share of the steps has which turns."""
    kinds = Counter(tuple(method.checked_turns(step)) for step in range(steps))
    return {turns: count / steps for turns, count in kinds.items()}


def seconds_alone(source: str, kinds: Mapping[tuple[str, ...], float], batch_size: int) -> float:
    """Seconds of a mean update on one GPU: ``source`` as a number, or from the run folder that it names.

    Steps that were logged stand for all with the same players; the time is taken to grow with the batch.

    Raises:
        InputError: it is neither, or no step of some kind was logged.
    """
    try:
        return float(source)
    except ValueError:
        pass
    folder = RunFolder(source)
    if not folder.metrics.is_file():
        raise InputError(f"--seconds: expected a number or a run folder with metrics.jsonl, found '{source}'")
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    measured: dict[frozenset[str], list[float]] = {}
    for line in lines:
        players = frozenset(key.partition("/")[0] for key in line if key.endswith("/grad_norm"))
        measured.setdefault(players, []).append(line.get("seconds", 0.0))
    total = 0.0
    for turns, share in kinds.items():
        if frozenset(turns) not in measured:
            names = " and ".join(sorted(set(turns)))
            raise InputError(
                f"--seconds: expected a logged step in {folder.path} in which {names} move, found none; "
                "train.log_every=1 logs every step"
            )
        total += share * statistics.median(measured[frozenset(turns)])
    return total * batch_size / load(folder.recipe).train.batch_size


def own_seconds(recipe: Recipe, kinds: Mapping[tuple[str, ...], float]) -> float | None:
    """The same from the recipe's own run folder; None where it has not measured enough yet."""
    try:
        return seconds_alone(str(recipe.output), kinds, recipe.train.batch_size)
    except (InputError, ValueError):  # a line of a run that is being written
        return None
