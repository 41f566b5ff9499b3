"""How many samples of a source cannot be used, when that is too many, and what was changed in the others."""

from pathlib import Path

from stepdistill.data.sample import Sample
from stepdistill.errors import InputError
from stepdistill.progress import say

# Rejections are held against the limit from this many samples on, so that a wrong key stops a long read early.
FIRST_LOOK = 100
# Examples in a line.
SHOWN = 3


class Tally:
    """Counts what is read and what is rejected; says so once, and stops past the limit.

    Args:
        key: the recipe's key, for messages. limit: the share of samples that may be rejected.
    """

    def __init__(self, key: str, limit: float):
        self.key, self.limit = key, limit
        self.read, self.reasons, self.example = 0, {}, ""
        self.notes: dict[str, list[str]] = {}

    def accepts(self, sample: Sample) -> bool:
        """Count a sample; whether it has a caption and no problem so far.

        Raises:
            InputError: too many have been rejected.
        """
        self.read += 1
        problem = sample.problem or ("no caption" if sample.caption is None else "empty caption")
        if sample.problem or not sample.caption:
            self.reject(sample, problem)
            return False
        for kind, example in sample.notes.items():
            self.notes.setdefault(kind, []).append(example)
        return True

    def note(self, sample: Sample, *kinds: str) -> None:
        """Count a sample, already counted as read, as one of which something was changed."""
        for kind in kinds:
            self.notes.setdefault(kind, []).append(Path(sample.name).name)

    def reject(self, sample: Sample, reason: str) -> None:
        """Count a sample, already counted as read, as one that cannot be used."""
        # What follows a colon belongs to this one sample.
        kind = reason.partition(": ")[0]
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        self.example = self.example or f"{sample.name} ({reason})"
        if self.read >= FIRST_LOOK:
            self._check()

    def close(self, aloud: bool = True) -> None:
        """The source has been read.

        Raises:
            InputError: too many were rejected, or there was nothing.
        """
        self._check()
        if not aloud:
            return
        if self.reasons:
            say(f"{self.key}: {self._rejected()}")
        for kind, examples in self.notes.items():
            different = list(dict.fromkeys(examples))
            shown = ", ".join(different[:SHOWN]) + ", ..." * (len(different) > SHOWN)
            say(f"{self.key}: {kind}: {len(examples)} of {self.read} ({shown})")

    def _check(self) -> None:
        rejected = sum(self.reasons.values())
        if rejected > self.limit * self.read:
            raise InputError(f"{self.key}: {self._rejected()}; more than data.max_rejected, {self.limit:g}")

    def _rejected(self) -> str:
        reasons = ", ".join(f"{number} {kind}" for kind, number in self.reasons.items())
        rejected = sum(self.reasons.values())
        return f"{rejected} of {self.read} samples rejected ({reasons}), the first: {self.example}"
