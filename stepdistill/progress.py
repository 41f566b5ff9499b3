"""Log lines and progress of long commands on stderr, with the time left."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

COLUMNS = 80
"""What is printed for people fits a terminal as narrow as this."""

EVERY = 60
"""Seconds between the lines of a piece of work where there is no terminal."""

_console = Console(stderr=True, highlight=False)
_listeners: list[Callable[[str], None]] = []


def quiet() -> None:
    """Say and report nothing from now on: what all but the first of several processes do."""
    _console.quiet = True


def say(message: str) -> None:
    """One line on stderr; on a terminal it is broken between words."""
    _console.print(message, markup=False, soft_wrap=not _console.is_terminal)


def phase(doing: str) -> None:
    """A line that says what a long command does from now on, such as "loading fashion-dit"."""
    say(doing)
    _report(doing)


@contextmanager
def reporting(listener: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``listener`` is called with every phase, and with the state of a piece of work once a minute."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _report(doing: str) -> None:
    for listener in () if _console.quiet else _listeners:
        listener(doing)


def in_short(metrics: dict[str, float]) -> str:
    """Losses, gradient norms and drift, by player: ``student dm 0.105 grad 0.152 · drift mean 0.001 std -0.02``."""
    players: dict[str, list[str]] = {}
    for name, value in metrics.items():
        player, _, rest = name.partition("/")
        if rest and not rest.startswith("grad_norm/"):  # those of single terms are in metrics.jsonl
            rest = rest.removeprefix("loss/").removeprefix("signal/").replace("grad_norm", "grad")
            players.setdefault(player, []).append(f"{rest} {value:.3g}")
    return " · ".join(f"{player} {' '.join(signals)}" for player, signals in players.items())


class _Name(ProgressColumn):
    """The description: the one column that gives way in a narrow terminal."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class _Bar(Progress):
    """A line for each task: description, bar, count, elapsed time and time left; ``signals`` below them."""

    def __init__(self) -> None:
        self.signals = ""
        columns = [
            BarColumn(bar_width=20, table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        ]
        super().__init__(_Name(), *columns, console=_console)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The lines of the tasks, then the signals."""
        yield from super().get_renderables()
        if self.signals:
            yield Text(self.signals, style="dim")


def counted(number: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


T = TypeVar("T", bound="_Line")


class _Line:
    """A progress bar that is drawn on a terminal only."""

    def __init__(self) -> None:
        self.bar = _Bar()

    def __enter__(self: T) -> T:
        if _console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if _console.is_terminal:
            self.bar.stop()


class TrainingProgress(_Line):
    """The training line, above losses, gradient norms and drift; plain lines where there is no terminal."""

    def __init__(self, first: int, total: int):
        super().__init__()
        self.first, self.total = first, total
        self.began = time.monotonic()
        self.task = self.bar.add_task("train", total=total, completed=first)

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Advance to ``step``; ``metrics`` is empty for steps that are not logged."""
        if metrics:
            self.bar.signals = in_short(metrics)
        self.bar.update(self.task, completed=step)
        if metrics and not _console.is_terminal:
            left = (time.monotonic() - self.began) * (self.total - step) / max(1, step - self.first)
            signals = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items() if "/" in name)
            say(f"step {step}/{self.total}  left {timedelta(seconds=round(left))}  {signals}")


class WorkProgress(_Line):
    """One line per piece of work, called as ``progress(name, done, total)``; without a terminal one a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[str, TaskID] = {}
        self.began = self.said = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=total)
            if not _console.is_terminal:
                say(name)
            _report(name)
            self.began = self.said = time.monotonic()
        self.bar.update(self.tasks[name], completed=done, total=total)
        if (now := time.monotonic()) - self.said >= EVERY:
            self.said, left = now, (now - self.began) * (total - done) / max(1, done)
            state = f"{name} {done}/{total}  left {timedelta(seconds=round(left))}"
            if not _console.is_terminal:
                say(state)
            _report(state)
