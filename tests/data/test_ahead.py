"""One step ahead, in a thread that ends with the run."""

import threading

import pytest

from stepdistill.data.ahead import Ahead


def names() -> set[str]:
    return {thread.name.partition("_")[0] for thread in threading.enumerate()}


def test_results_are_those_of_the_work_whoever_does_it():
    seen = []

    def work(step, first):
        seen.append(threading.current_thread() is threading.main_thread())
        return step * 10 + first

    with Ahead(work) as ahead:
        assert ahead.take(0, 1) == 1
        ahead.announce(1, 2)
        assert ahead.take(1, 2) == 12 and ahead.take(1, 3) == 13
    assert seen == [True, False, True] and "ahead" not in names()


def test_what_the_thread_raises_comes_to_the_caller():
    def work(step):
        raise FileNotFoundError(f"row {step}")

    with pytest.raises(FileNotFoundError, match="row 3"), Ahead(work) as ahead:
        ahead.announce(3)
        ahead.take(3)
    assert "ahead" not in names()
