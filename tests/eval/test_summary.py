"""A report in three sentences."""

from made_reports import TEACHER, a_report, measured, row

from stepdistill.eval.summary import sentences
from stepdistill.eval.verdict import verdict


def test_three_sentences_say_speed_quality_and_training():
    student = row("a", "student", 4, 11.0, machine="cpu, 2 threads")
    report = a_report(
        student, trained={"a": {"student_steps": 4, "steps": 500, "seconds": 89.6, "evaluations": 12_000}}
    )
    for entry in report.rows:
        entry.machine, entry.cost["seconds_per_image"] = report.device, 0.001 * entry.nfe
    speed, quality, training = sentences(report)
    assert "in 4 network passes, its teacher in 100: 25 times fewer" in speed and "25 times faster" in speed
    assert (
        quality.startswith("It replaces its teacher: its FD-classifier@1000 is 1.10 times") and "closes 95 %" in quality
    )
    assert "500 steps, about 90 s" in training and "12,000 network passes" in training
    report.rows[0].machine = "a GPU"  # whose seconds do not compare
    assert "faster" not in sentences(report)[0]
    assert sentences(a_report()) == []


def test_sentences_decide_nothing_where_intervals_overlap():
    few = measured("q2", "student", 4, 24.90, 18.40), measured("t", "teacher", 50, 25.12, 18.47)
    (_, quality) = sentences(a_report(rows=list(few), verdict=[verdict(*few, [])]))
    assert quality.startswith("Not decided whether it replaces its teacher") and "20 samples are too few" in quality
    # Without a verdict it is compared with the best stock solver in as many passes.
    student, solver = measured("a", "student", 4, 10.0, 1.0), measured("UniPC", "solver", 4, 10.5, 1.0)
    report = a_report(rows=[student, TEACHER, solver], verdict=[])
    assert sentences(report)[1].startswith("Not decided whether it beats the best stock solver")
    solver.metrics["fd_classifier"] = 20.0
    assert sentences(report)[1].startswith("It beats the best stock solver") and "UniPC" in sentences(report)[1]
