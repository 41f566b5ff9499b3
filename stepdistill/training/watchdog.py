"""Watchdog: the stacks of all threads of a run that hangs."""

import faulthandler
import os
from pathlib import Path
from types import TracebackType

from stepdistill.progress import say
from stepdistill.training.layout import RunFolder


class Watchdog:
    """Inside, a run that finishes no step for so long leaves the stacks of all its threads in stacks-RANK.txt.

    The interpreter's own timer writes them (:func:`faulthandler.dump_traceback_later`), also while a library holds
    Python's lock. The run itself is not stopped: if it continues, a log line says so.

    Args:
        folder: the run folder.
        minutes: without a step; None: never.
        rank: of the process.
    """

    def __init__(self, folder: Path, minutes: float | None, rank: int = 0):
        self.stacks, self.minutes = RunFolder(folder).stacks(rank), minutes

    def __enter__(self) -> "Watchdog":
        if self.minutes is not None:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)  # on a node with a disk of its own
            self.file = open(self.stacks, "a", encoding="utf-8")
            self.size = self._written()
            self._arm()
        return self

    def step(self) -> None:
        """A step is done."""
        if self.minutes is not None:
            self._arm()
            if (size := self._written()) > self.size:
                self.size = size
                say(f"no step for {self.minutes:g} minutes; what every thread did: {self.stacks}")

    def _written(self) -> int:
        """Bytes in the file, whose name somebody may have removed."""
        return os.fstat(self.file.fileno()).st_size

    def _arm(self) -> None:
        faulthandler.dump_traceback_later(60 * self.minutes, file=self.file)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.minutes is not None:
            faulthandler.cancel_dump_traceback_later()
            empty = not self._written()
            self.file.close()
            if empty:
                self.stacks.unlink(missing_ok=True)
