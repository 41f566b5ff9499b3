"""The verdict: the arithmetic of its definition, and what too few samples leave open."""

import pytest
from made_reports import SOLVERS, TEACHER, measured, row

from stepdistill.eval.verdict import verdict


def test_verdict_is_the_arithmetic_of_its_definition():
    found = verdict(row("a", "student", 4, 12.0), TEACHER, SOLVERS)
    assert found.ratio == pytest.approx(1.2)
    assert found.solver == "UniPC w=1.5"
    assert found.gap_closed == pytest.approx((30 - 12) / (30 - 10))
    assert found.passed
    assert found.text.startswith("Pass: a in 4 steps (NFE 4) has FD-classifier@1000 12.00, 1.20× that of its teacher")
    assert "closes 90 % of the gap" in found.text


@pytest.mark.parametrize(("fd", "passed"), [(9.0, True), (12.0, True), (12.1, False), (29.0, False)])
def test_verdict_needs_the_ratio(fd, passed):
    assert verdict(row("a", "student", 4, fd), TEACHER, SOLVERS).passed is passed


def test_verdict_needs_the_gap_too_where_there_is_one():
    close = [row("UniPC", "solver", 4, 12.0)]
    found = verdict(row("a", "student", 4, 11.0), TEACHER, close)
    assert found.ratio < 1.2 and found.gap_closed == pytest.approx(0.5) and not found.passed
    level = verdict(row("a", "student", 4, 11.0), TEACHER, [row("UniPC", "solver", 4, 9.0)])
    assert level.gap_closed is None and level.passed and "no gap" in level.text
    assert verdict(row("a", "student", 4, 11.0), TEACHER, []).gap_closed is None


def test_too_few_samples_decide_nothing():
    found = verdict(measured("q2", "student", 4, 24.90, 18.40), measured("t", "teacher", 50, 25.12, 18.47), [])
    assert found.passed is None and found.ratio == pytest.approx(0.99, abs=0.01)
    assert found.text.startswith(
        "Not decided: q2 in 4 steps (NFE 4) has FD-classifier@20 24.90 ± 18.40, 0.99× that of its teacher "
        "(25.12 ± 18.47, "
    )
    # The difference from 1.2 times the teacher's is 5.24, with a standard error of 14.7.
    assert found.text.endswith("The samples are too few to be 95 % sure; about 430 would decide.")


def test_what_the_errors_leave_open_and_what_they_do_not():
    teacher = measured("t", "teacher", 50, 10.0, 0.5)
    for fd, half, passed in ((10.0, 1.0, True), (11.5, 1.0, None), (12.5, 1.0, None), (15.0, 1.0, False)):
        assert verdict(measured("a", "student", 4, fd, half), teacher, []).passed is passed
    # A gap that is surely not closed fails, whatever the ratio is.
    solver = measured("UniPC", "solver", 4, 14.0, 0.5)
    assert verdict(measured("a", "student", 4, 12.5, 0.9), teacher, [solver]).passed is False
    assert verdict(measured("a", "student", 4, 10.9, 0.9), teacher, [solver]).passed is None
    # Where the solver is as good as the teacher within the errors there is no gap.
    level = verdict(measured("a", "student", 4, 10.5, 0.5), teacher, [measured("UniPC", "solver", 4, 10.3, 0.5)])
    assert (
        level.gap_closed is None
        and level.passed
        and "within the errors (10.30 ± 0.50), so no gap can be" in (level.text)
    )


def test_errors_that_are_not_known():
    """Without any the values alone decide, and the sentence says so; beside others they are as large as these."""
    found = verdict(row("a", "student", 4, 11.9), TEACHER, SOLVERS)
    assert found.passed and found.text.endswith("are not known: the verdict rests on the values alone.")
    student, exact, unknown = measured("a", "student", 4, 10.9, 0.9), measured("t", "teacher", 50, 10.0, 0.0), TEACHER
    assert TEACHER.metrics["fd_classifier"] == 10
    assert verdict(student, exact, []).passed and verdict(student, unknown, []).passed is None
    assert "not known" not in verdict(student, unknown, []).text


def test_no_verdict_without_its_metric():
    student = row("a", "student", 4, 11.0)
    del student.metrics["fd_classifier"]
    assert verdict(student, TEACHER, SOLVERS) is None
