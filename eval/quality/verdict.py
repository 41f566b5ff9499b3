"""Verdict: whether a student replaces its teacher, or the samples are too few to decide."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepdistill.eval.names import metric_name
from stepdistill.progress import counted

if TYPE_CHECKING:
    from stepdistill.eval.report import Row

RATIO_TARGET = 1.2
GAP_TARGET = 0.8
VERDICT_METRIC = "fd_classifier"
INTERVAL = 1.96
"""Standard errors on each side of a value in a 95 % interval, which people are shown."""
SURE = 1.645
"""Standard errors from a target at which one is 95 % sure on which side of it a value lies."""
MOST_SAMPLES = 100_000


@dataclass
class Verdict:
    """Whether a student replaces its teacher, by FD on the classifier's features.

    Args:
        ratio: student / teacher.
        gap_closed: (solver - student) / (solver - teacher) for the best solver at the student's NFE;
            None without solvers, or when the best of them is as good as the teacher: it is not 95 % sure that it is
            worse.
        passed: ratio <= 1.2, and at least 0.8 of the gap closed where there is one. None: not decided, the samples are
            too few to be 95 % sure.
    """

    student: str
    teacher: str
    solver: str | None
    steps: int
    ratio: float
    gap_closed: float | None
    passed: bool | None
    text: str

    @property
    def word(self) -> str:
        return {True: "Pass", False: "Fail", None: "Not decided"}[self.passed]

    @property
    def short(self) -> str:
        """The verdict where it is one of many."""
        closed = "" if self.gap_closed is None else f", {100 * self.gap_closed:.0f} % of the gap"
        return f"{self.student}, {counted(self.steps, 'step')}: {self.ratio:.2f}× the teacher's{closed}"


def verdict(
    student: "Row", teacher: "Row", solvers: Sequence["Row"], labels: Mapping[str, str] | None = None
) -> Verdict | None:
    """The verdict on one student row; None when the rows lack the metric that it is about.

    Args:
        labels: the metrics' names under a protocol without classes, whose verdicts are by FID or its own distance.
    """
    metric = verdict_metric(labels)
    if any(metric not in row.metrics for row in (student, teacher, *solvers)):
        return None
    ours, theirs = student.metrics[metric], teacher.metrics[metric]
    best = min(solvers, key=lambda row: row.metrics[metric], default=None)
    ratio = ours / theirs if theirs > 0 else math.inf
    # Each target as a sum over rows that is to be at most zero, and whether it is.
    targets = [([(student, 1.0), (teacher, -RATIO_TARGET)], ratio <= RATIO_TARGET)]
    gap = None
    if best is not None and best.metrics[metric] > theirs and certain(metric, [(best, 1.0), (teacher, -1.0)]) >= 1:
        reference = best.metrics[metric]
        gap = (reference - ours) / (reference - theirs)
        weights = [(student, 1.0), (teacher, -GAP_TARGET), (best, GAP_TARGET - 1)]
        targets.append((weights, gap >= GAP_TARGET))
    certainty = {met: [certain(metric, rows) for rows, is_met in targets if is_met is met] for met in (True, False)}
    if any(value >= 1 for value in certainty[False]):
        passed = False
    else:
        passed = None if certainty[False] or any(value < 1 for value in certainty[True]) else True
    result = Verdict(
        student=student.name,
        teacher=teacher.name,
        solver=best.name if best else None,
        steps=student.steps,
        ratio=ratio,
        gap_closed=gap,
        passed=passed,
        text="",
    )
    result.text = f"{result.word}: {_words(metric, labels, student, teacher, best, result)}"
    if all(_error(metric, row) is None for row in (student, teacher, *solvers)):
        result.text += " Their sampling errors are not known: the verdict rests on the values alone."
    if passed is None:
        lowest = min(value for values in certainty.values() for value in values)
        result.text += f" The samples are too few to be 95 % sure{_enough(student.samples, lowest)}."
    return result


def certain(metric: str, weighted: Sequence[tuple["Row", float]]) -> float:
    """How far a weighted sum of independent rows is from zero, as a share of what makes one 95 % sure of its sign.

    Where no error is known it is infinitely far. An unknown one beside others is taken to be as large a part of its
    value as the largest of these.
    """
    value = sum(weight * row.metrics[metric] for row, weight in weighted)
    errors = [_error(metric, row) for row, _ in weighted]
    part = max((e / row.metrics[metric] for e, (row, _) in zip(errors, weighted, strict=True) if e), default=0.0)
    known = [part * row.metrics[metric] if e is None else e for e, (row, _) in zip(errors, weighted, strict=True)]
    error = math.hypot(*(weight * one for one, (_, weight) in zip(known, weighted, strict=True)))
    return abs(value) / (SURE * error) if error > 0 else math.inf


def _error(metric: str, row: "Row") -> float | None:
    """The standard error of a row's value; None: not known."""
    return row.diagnostics.get(f"{metric}_error")


def verdict_metric(labels: Mapping[str, str] | None) -> str:
    """What a verdict is about: FID under a protocol that has it; ``labels`` as for :func:`verdict`."""
    if not labels:
        return VERDICT_METRIC
    return "fd_enet" if "fd_enet" in labels else "fid"


def _words(
    metric: str,
    labels: Mapping[str, str] | None,
    student: "Row",
    teacher: "Row",
    best: "Row | None",
    result: Verdict,
) -> str:
    """The numbers behind a verdict as one sentence."""
    name = labels[metric] if labels else metric_name(metric, student.samples)
    text = (
        f"{student.name} in {counted(student.steps, 'step')} (NFE {student.nfe}) has {name} {_value(student, metric)}, "
        f"{result.ratio:.2f}× that of its teacher ({_value(teacher, metric)}, {teacher.steps} steps, "
        f"w = {teacher.guidance:g}, NFE {teacher.nfe}; target at most {RATIO_TARGET:g}×)"
    )
    if result.gap_closed is not None:
        return (
            f"{text}, and closes {100 * result.gap_closed:.0f} % of the gap to the teacher that the best stock solver "
            f"at NFE {best.nfe} leaves ({best.name}, {_value(best, metric)}; target at least {100 * GAP_TARGET:.0f} %)."
        )
    if best is None:
        return f"{text}."
    level = "already as good as the teacher, so there is no gap"
    if best.metrics[metric] > teacher.metrics[metric]:
        level = f"as good as the teacher within the errors ({_value(best, metric)}), so no gap can be measured"
    return f"{text}; the stock solver {best.name} at NFE {best.nfe} is {level}."


def _value(row: "Row", metric: str) -> str:
    error = _error(metric, row)
    return f"{row.metrics[metric]:.2f}" + ("" if error is None else f" ± {INTERVAL * error:.2f}")


def _enough(samples: int, certainty: float) -> str:
    """How many samples would decide, where errors fall with the root of their number."""
    needed = samples / certainty**2 if certainty > 0 else math.inf
    if needed > MOST_SAMPLES:
        return f"; it would take more than {MOST_SAMPLES:,}"
    step = 10 ** max(1, math.floor(math.log10(needed)) - 1)
    return f"; about {math.ceil(needed / step) * step:,} would decide"
