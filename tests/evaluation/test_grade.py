"""Grading as the benchmarks do, and the interval of a share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import MissingDependencyError
from unmask.evaluation.grade import final_answer, grade, number_answer, wilson


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
    ("written", "number"),
    [
        ("−5", "-5"),  # U+2212
        ("－5", "-5"),  # full-width hyphen-minus
        ("﹣5", "-5"),  # small hyphen-minus
        ("–5", "-5"),  # en dash
        ("‑5", "-5"),  # non-breaking hyphen
        ("−$1,250.50", "-1250.50"),
        ("$−3", "-3"),
        ("€−3", "-3"),
        ("１８", "18"),
        ("１，２３４", "1234"),
        ("３．５", "3.5"),
        ("١٨", "18"),
        ("१८", "18"),
        ("١٬٢٣٤٫٥", "1234.5"),
        ("12\u202f345\u202f678", "12345678"),
        ("1\u00a0234", "1234"),
        ("1\u2009234.5", "1234.5"),
        ("1’234", "1234"),
        ("1'234", "1234"),
        (r"10{,}000", "10000"),
        (r"10,\!000", "10000"),
        (r"10\,000", "10000"),
    ],
)
def test_a_number_is_read_as_people_write_it(written: str, number: str) -> None:
    for text in (f"so it is {written}.", f"#### {written}", f"7 + 8 = {written}"):
        assert number_answer(text) == number
    assert grade(f"it makes {written}", f"#### {number}").correct
    assert grade(number, f"#### {written}").correct


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7−3", "3"),
        ("pages 10–15", "15"),
        ("between $5–$10", "10"),
        ("the total–18", "18"),
        ("it is 12\u00a0345 6", "6"),
        ("in 2024\u00a0500 came", "500"),
        ("有3，4个", "4"),
        ("5 m²", "5"),
        ("1½ of 4", "4"),
    ],
)
def test_what_is_no_sign_and_no_group_of_a_number_is_none(text: str, number: str) -> None:
    assert number_answer(text) == number


@pytest.mark.parametrize(
    ("text", "reference", "grader", "correct"),
    [
        ("It is 18.", "9 + 9 = 18\n#### 18", "number", True),
        ("#### 1,000", "#### 1000", "number", True),
        ("18.00", "#### 18", "number", False),  # the benchmark compares texts
        ("nothing", "#### 18", "number", False),
        (" two  words\n", "two words", "text", True),
        ("two", "two words", "text", False),
        (r"so $\frac{1}{2}$", r"\boxed{0.5}", "expression", True),
        ("$x = 3$", "$4$", "expression", False),
        ("", "$4$", "expression", False),
        (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}", "expression", True),
        (r"\boxed{2}", r"2\sqrt{3}", "expression", False),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left( 3, \frac{\pi}{2} \right)", "expression", True),
        (r"\boxed{3}", r"\left( 3, \frac{\pi}{2} \right)", "expression", False),
        (r"\boxed{1 + x^2}", "x^2+1", "expression", True),
        (r"\boxed{1}", "x^2+1", "expression", False),
        (r"\boxed{p - q}", "p - q", "expression", True),
        (r"\boxed{q - p}", "p - q", "expression", False),
        (r"so it is \boxed{\text{Evelyn}}.", r"\text{Evelyn}", "expression", True),
        (r"\boxed{Evelyn}", r"\text{Evelyn}", "expression", True),
        (r"\boxed{\text{Evelyn}}", "Evelyn", "expression", True),
        ("Evelyn", r"\text{Evelyn}", "expression", True),
        (r"\boxed{\text{Carla}}", r"\text{Evelyn}", "expression", False),
        (r"\boxed{1}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", "expression", False),
        (r"it costs \boxed{32}", r"\$32", "expression", True),
        ("It is $18$.", "9 + 9 = 18\n#### 18", "expression", True),
        (r"\boxed{18}", "That makes 18 dollars", "expression", True),
        ("$x = −3$", "$-3$", "expression", True),
        (r"\boxed{−3}", "-3", "expression", True),
        (r"\boxed{-3}", "−3", "expression", True),
        (r"\boxed{1{,}234}", "1234", "expression", True),
    ],
)
def test_an_answer_is_judged_as_its_task_does(text: str, reference: str, grader: str, correct: bool) -> None:
    assert grade(text, reference, grader).correct is correct


def test_a_grader_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"math-verify.*pip install 'unmask\[eval\]'"):
        grade("1", "1", "expression")


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_published_one(right: int, total: int, low: float, high: float) -> None:
    found = wilson(right, total)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(total=st.integers(1, 10_000), data=st.data())
def test_the_interval_holds_the_share_and_stays_within_0_and_1(total: int, data) -> None:
    right = data.draw(st.integers(0, total))
    found = wilson(right, total)
    assert 0 <= found.low <= right / total <= found.high <= 1


def test_without_questions_nothing_is_known() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0, 1)


@pytest.mark.parametrize("right", [-1, 4])
def test_an_impossible_count_is_refused(right: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.3"):
        wilson(right, 3)
