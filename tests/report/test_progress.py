"""Progress: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from unmask.report.progress import AnswerProgress, TrainingProgress


def show(terminal: bool, between: float = 10.0) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=120)
    with TrainingProgress(100, 40, console, between) as progress:
        for step in range(41, 101):
            progress.step(step, 1.25, 3e-4, 0.5, 12345.0)
            if step == 50:
                progress.say("step 50  [saved] somewhere")
    return written.getvalue()


def test_elsewhere_it_is_the_first_and_last_step_in_plain_lines() -> None:
    lines = show(terminal=False).splitlines()
    assert [line.split()[1] for line in lines] == ["41/100", "50", "100/100"]
    assert lines[0].startswith("step 41/100  loss 1.2500  lr 3.00e-04  grad norm 0.500  12,345 tokens/s  ETA ")
    assert lines[1] == "step 50  [saved] somewhere"
    assert "\x1b" not in "".join(lines)


def test_elsewhere_the_interval_decides_how_many_lines() -> None:
    assert len(show(terminal=False, between=0.0).splitlines()) == 61


def test_in_a_terminal_it_is_a_live_line() -> None:
    written = show(terminal=True)
    assert "\x1b" in written and "100/100" in written and "loss 1.2500" in written and "[saved]" in written


def test_answers_are_counted_on_standard_error(capsys) -> None:
    with AnswerProgress(3, seconds_between=0.0) as progress:
        for _ in range(3):
            progress.answered(5)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert not shown.out and [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert lines[2].endswith("ETA 0:00") and "tokens/s" in lines[2]
    with AnswerProgress(3, shown=False, seconds_between=0.0) as progress:
        progress.answered(5)
    assert not capsys.readouterr().err
