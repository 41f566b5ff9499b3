"""A report in three sentences: how much faster its student is, how good, and what it cost to train."""

from typing import TYPE_CHECKING

from stepdistill.eval.names import metric_text
from stepdistill.eval.verdict import GAP_TARGET, RATIO_TARGET, certain, verdict_metric

if TYPE_CHECKING:
    from stepdistill.eval.report import Report, Row


def student_and_teacher(report: "Report") -> tuple["Row", "Row"] | None:
    """The row that the report is about, at the steps of its verdict or else of its training, and its teacher's row."""
    students = [row for row in report.rows if row.role == "student"]
    teachers = {row.name: row for row in report.rows if row.role == "teacher"}
    if not students or not teachers:
        return None
    for entry in report.verdict:
        for row in students:
            if (row.name, row.steps) == (entry.student, entry.steps) and entry.teacher in teachers:
                return row, teachers[entry.teacher]
    first = [row for row in students if row.name == students[0].name]
    trained = report.trained.get(first[0].name, {}).get("student_steps", max(row.steps for row in first))
    return min(first, key=lambda row: abs(row.steps - trained)), next(iter(teachers.values()))


def sentences(report: "Report") -> list[str]:
    """One on speed, one on quality and, of a run, one on its training; none unless a report is of one student."""
    pair = student_and_teacher(report)
    if pair is None or len({row.name for row in report.rows if row.role == "student"}) > 1:
        return []
    student, teacher = pair
    lines = [_speed(report, student, teacher), _quality(report, student, teacher)]
    return [line for line in (*lines, _training(report, student)) if line]


def _speed(report: "Report", student: "Row", teacher: "Row") -> str:
    passes = f"{student.nfe} network pass{'' if student.nfe == 1 else 'es'}"
    text = f"{student.name} draws an image in {passes}, its teacher in {teacher.nfe}"
    text += f": {_times(teacher.nfe / student.nfe)} fewer"
    ours, theirs = (_seconds(report, row) for row in (student, teacher))
    if ours and theirs:
        text += f". On {report.device}, an image takes {ours:.3g} s in place of {theirs:.3g} s, decoding included"
        text += f": {_times(theirs / ours)} faster"
    return f"{text}."


def _quality(report: "Report", student: "Row", teacher: "Row") -> str:
    metric = verdict_metric(report.labels)
    if metric not in student.metrics:
        return ""
    title = report.title(metric)
    for entry in report.verdict:
        if (entry.student, entry.steps) == (student.name, student.steps):
            text = f"its {title} is {entry.ratio:.2f} times its teacher's (lower is better, target {RATIO_TARGET:g})"
            if entry.gap_closed is not None:
                text += f", and it closes {100 * entry.gap_closed:.0f} % of the gap that the best stock solver leaves"
                text += f" (target {100 * GAP_TARGET:.0f} %)"
            start = {True: "It replaces its teacher", False: "It does not replace its teacher"}.get(entry.passed)
            few = "" if start else f"; {student.samples:,} samples are too few"
            return f"{start or 'Not decided whether it replaces its teacher'}: {text}{few}."
    solvers = [row for row in report.rows if row.role == "solver" and metric in row.metrics and row.nfe <= student.nfe]
    value = metric_text(metric, student.metrics[metric])
    if not solvers:
        return f"Its {title} is {value} (lower is better)."
    best = min(solvers, key=lambda row: row.metrics[metric])
    theirs = f"{best.name} in as many passes has {metric_text(metric, best.metrics[metric])}"
    if certain(metric, [(student, 1.0), (best, -1.0)]) < 1:
        return f"Not decided whether it beats the best stock solver: its {title} is {value}, {theirs}; they overlap."
    better = "beats" if student.metrics[metric] < best.metrics[metric] else "does not beat"
    return f"It {better} the best stock solver: its {title} is {value} (lower is better), {theirs}."


def _training(report: "Report", student: "Row") -> str:
    facts = report.trained.get(student.name, {})
    if not facts:
        return ""
    text = f"It was trained in {facts['steps']:,.0f} steps"
    if facts.get("seconds"):
        text += f", about {_duration(facts['seconds'])} of updates"
    if facts.get("evaluations"):
        text += f" and {facts['evaluations']:,.0f} network passes of one image each"
    return f"{text}."


def _seconds(report: "Report", row: "Row") -> float | None:
    return row.cost.get("seconds_per_image") if report.timed(row) else None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.2g} times"
