"""What a long command says while it works: a line on stderr, or a progress line with the time left."""

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_console = Console(stderr=True, highlight=False)


def quiet() -> None:
    """Say nothing from now on: what all but the first of several processes do."""
    _console.quiet = True


def say(message: str) -> None:
    """One line on stderr."""
    _console.print(message, markup=False, soft_wrap=True)


def bar() -> Progress:
    """A progress line: description, bar, count, elapsed time and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[signals]}"),
        console=_console,
        transient=False,
    )


class _Line:
    """A progress bar that is drawn on a terminal only."""

    def __init__(self) -> None:
        self.bar = bar()

    def __enter__(self) -> "_Line":
        if _console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if _console.is_terminal:
            self.bar.stop()


class TrainingProgress(_Line):
    """The training line: losses, gradient norms and drift beside the bar; plain lines where there is no terminal."""

    def __init__(self, first: int, total: int):
        super().__init__()
        self.first, self.total = first, total
        self.began = time.monotonic()
        self.task = self.bar.add_task("train", total=total, completed=first, signals="")

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Advance to ``step``; ``metrics`` is empty for steps that are not logged."""
        self.bar.update(self.task, completed=step)
        if metrics:
            signals = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items() if "/" in name)
            self.bar.update(self.task, signals=signals)
            if not _console.is_terminal:
                left = (time.monotonic() - self.began) * (self.total - step) / max(1, step - self.first)
                say(f"step {step}/{self.total}  left {timedelta(seconds=round(left))}  {signals}")


class WorkProgress(_Line):
    """One line per piece of work, called as ``progress(name, done, total)``; a line each where there is no terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=total, signals="")
            if not _console.is_terminal:
                say(name)
        self.bar.update(self.tasks[name], completed=done, total=total)
