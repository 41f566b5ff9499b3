"""Progress in a terminal of 80 columns, and what listeners get of it."""

import io

import pytest
from rich.console import Console

from stepdistill import progress

METRICS = {
    "student/loss/distribution_matching": 0.10512,
    "student/loss/generator": 1.2345,
    "student/grad_norm/generator": 0.5,
    "student/grad_norm": 0.152,
    "critic/loss/denoising": 0.147,
    "critic/grad_norm": 0.169,
    "drift/mean": 0.00123,
    "drift/std": -0.0456,
    "seconds": 1.5,
}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "_console", Console(file=screen, width=80, force_terminal=True, color_system=None))
    return screen


def test_step_bar_and_time_left_fit_80_columns_above_all_signals(terminal: io.StringIO) -> None:
    with progress.TrainingProgress(0, 20_000) as line:
        line.update(12_345, METRICS)
    lines = terminal.getvalue().splitlines()
    shown = lines[max(number for number, one in enumerate(lines) if "train" in one) :]
    assert "12345/20000" in shown[0] and "━━━" in shown[0] and "left -:--:--" in shown[0]
    assert max(map(len, shown)) <= 80 + len("\x1b[2K")
    text = " ".join(" ".join(shown[1:]).split())
    assert "student distribution_matching 0.105 generator 1.23 grad 0.152 · critic denoising 0.147" in text
    assert "drift mean 0.00123 std -0.0456" in text


def test_long_lines_break_between_words_on_a_terminal(terminal: io.StringIO) -> None:
    progress.say("word " * 17)
    assert [line.split() for line in terminal.getvalue().splitlines()] == [["word"] * 16, ["word"]]


def test_a_long_name_gives_way_to_count_and_time(terminal: io.StringIO) -> None:
    with progress.WorkProgress() as work:
        work("samples of a pipeline whose name is far too long for a terminal of eighty columns", 5, 10)
    assert all(part in terminal.getvalue() for part in ("…", " 5/10", "left"))


def test_a_listener_gets_phases_and_work(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(progress, "EVERY", 0)
    with progress.reporting(heard.append), progress.WorkProgress() as work:
        progress.phase("loading fashion-dit")
        work("encoding prompts", 1, 4)
    progress.phase("later")
    assert heard[:2] == ["loading fashion-dit", "encoding prompts"]
    assert heard[2].startswith("encoding prompts 1/4") and len(heard) == 3
