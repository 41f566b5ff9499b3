"""Signs of life: a file that says how far a run is, and the stacks of all threads when it goes no further."""

import faulthandler
import json
import threading
import time
from pathlib import Path
from types import TracebackType

from stepdistill.progress import say
from stepdistill.text_files import write_text


def heartbeat(folder: Path, step: int, phase: str) -> None:
    """Write heartbeat.json: the last finished step, what the run is doing, and the time in seconds since 1970."""
    facts = {"step": step, "phase": phase, "time": round(time.time(), 1)}
    write_text(folder / "heartbeat.json", json.dumps(facts) + "\n")


class Watchdog:
    """Inside, a run that finishes no step for so long says so once, and leaves the stacks of all its threads.

    A line on stderr, and stacks-RANK.txt in the run folder. The run is left alone: it may yet go on.

    Args:
        folder: the run folder. minutes: without a step; None: never. step: the last finished one. rank: of the process.
    """

    def __init__(self, folder: Path, minutes: float | None, step: int, rank: int = 0):
        self.stacks = folder / f"stacks-{rank}.txt"
        self.minutes, self.last = minutes, step
        self.moved, self.ended = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def step(self, step: int) -> None:
        """Step ``step`` is done."""
        self.last = step
        self.moved.set()

    def __enter__(self) -> "Watchdog":
        if self.minutes is not None:
            self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended.set()
        self.moved.set()

    def _watch(self) -> None:
        while not self.ended.is_set():
            if not self.moved.wait(60 * self.minutes):
                self._report()
                self.moved.wait()
            self.moved.clear()

    def _report(self) -> None:
        said = f"no step for {self.minutes:g} minutes, the last was {self.last}"
        with open(self.stacks, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {said}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        say(f"{said}; what every thread is doing: {self.stacks}")
