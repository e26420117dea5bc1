"""Grading in GSM8K's format."""

from __future__ import annotations

import pytest

from unmask.errors import MissingDependencyError
from unmask.evaluation.grade import exact_match, final_answer, grade, number_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24 clips\n#### 24", "24"),
        ("#### 1,234", "1234"),
        ("#### -5.", "-5"),
        ("####7 and then #### 8", "7"),
        ("#### 0.5", "0.5"),
        ("no mark 24", None),
        ("#### none", None),
        ("#### ,", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_exact_match_counts_only_equal_results() -> None:
    assert exact_match(["#### 1", "#### 2", "2", "#### 1,000"], ["#### 1", "#### 3", "#### 2", "#### 1000"]) == 0.5


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("first #### 7, then 9", "7"),
        ("so it is $1,234.50.", "1234.50"),
        ("from -7 to -9.", "-9"),
        ("that makes 7-3", "3"),
        ("costs .5 each", ".5"),
        ("no number", None),
    ],
)
def test_without_the_mark_the_last_number_counts(text: str, number: str | None) -> None:
    assert number_answer(text) == number


@pytest.mark.parametrize(
    ("text", "reference", "grader", "correct"),
    [
        ("It is 18.", "9 + 9 = 18\n#### 18", "number", True),
        ("18.00", "#### 18", "number", False),  # the benchmark compares texts
        ("nothing", "#### 18", "number", False),
        (" two  words\n", "two words", "text", True),
        ("two", "two words", "text", False),
        (r"so $\frac{1}{2}$", r"\boxed{0.5}", "expression", True),
        ("$x = 3$", "$4$", "expression", False),
        ("", "$4$", "expression", False),
    ],
)
def test_an_answer_is_judged_as_its_task_does(text: str, reference: str, grader: str, correct: bool) -> None:
    assert grade(text, reference, grader).correct is correct


def test_a_grader_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"math-verify.*pip install 'unmask\[eval\]'"):
        grade("1", "1", "expression")
