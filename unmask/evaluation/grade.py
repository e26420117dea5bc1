"""Graders: extract the answer from a text, compare it with the reference, and give the interval of the share right.

GSM8K: the result stands after `####` (Cobbe et al. 2021, arXiv 2110.14168, appendix); an answer without the mark is
judged by its last number, as lm-evaluation-harness's `flexible-extract` does. Expressions are compared by math-verify.
"""

from __future__ import annotations

import importlib.util
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unmask.errors import MissingDependencyError

# Numbers are looked for in what `_folded` returns.
_RESULT = re.compile(r"####\s*(-?[0-9.,]+)")
_CURRENCY = "[$€£¥₹\uff04\uffe5]?"
# A sign counts where no digit stands before it: the last number of "7-3" is 3.
_NUMBER = re.compile(rf"(?:(?<![0-9])-)?{_CURRENCY}([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
# The minus sign, small and full-width; and a hyphen or short dash before a number that no word or number joins it to.
_MINUS = re.compile(rf"[\u2212\ufe63\uff0d]|(?<!\w)[\u2010-\u2013](?={_CURRENCY}\.?[0-9])")
# Groups of three digits that are parted by a narrow or unbreakable space, an apostrophe, the comma of another script,
# or as LaTeX parts them: 1{,}000, 1\,000, 1,\!000. A comma of ASCII may stand anywhere, as in the benchmark.
_PARTED = re.compile(
    r"(?<![0-9.,])[0-9]{1,3}(?:(?:[\u00a0\u2007-\u2009\u202f'\u2019\u066c\uff0c]|\{,\}|,?\\[,!])[0-9]{3})+(?![0-9])"
)
# How mathematics is set apart from prose; an escaped dollar is one of currency.
_DELIMITERS = (r"\boxed", r"\fbox", r"\(", r"\[", "$")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
_BARE_WORD = re.compile(r"(?:^|(?<=\s))[A-Za-z]{2,}(?=[\s.,;:!?]|$)")
_ONLY_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*")
# Two-sided 95 % quantile of the normal distribution.
_Z = 1.959963984540054


def _folded(text: str) -> str:
    """Return a text with its numbers as ASCII writes them: digits of any script, minus signs, points, groups joined."""
    if not text.isascii():
        text = re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text)
        text = _MINUS.sub("-", text.translate({0x066B: ".", 0xFF0E: "."}))
    return _PARTED.sub(lambda number: "".join(filter(str.isdigit, number[0])), text)


def final_answer(text: str) -> str | None:
    """Return the number after the first `####` without commas and trailing dots, or None when there is none."""
    result = _RESULT.search(_folded(text))
    return (result[1].replace(",", "").rstrip(".") or None) if result else None


def last_number(text: str) -> str | None:
    """Return the last number of a text without commas and currency, or None when it has none."""
    numbers = list(_NUMBER.finditer(_folded(text)))
    if not numbers:
        return None
    sign = "-" if numbers[-1][0].startswith("-") else ""
    return sign + numbers[-1][1].replace(",", "")


def number_answer(text: str) -> str | None:
    """Return the number after `####`, otherwise the last number, otherwise None."""
    marked = final_answer(text)
    return last_number(text) if marked is None else marked


def plain_answer(text: str) -> str | None:
    """Return the text with runs of blanks as one, None when nothing is left."""
    return " ".join(text.split()) or None


def _expression(text: str) -> str | None:
    """Return the expression that math-verify finds in a text, as it shows it; else plain words, or None."""
    found = _parsed(text)
    return str(found[-1]) if found else _words(text)


def _reference_expression(text: str) -> str | None:
    return _expression(_delimited(text))


def _same_expression(answer: str, reference: str) -> bool:
    from math_verify import verify

    if verify(_parsed(_delimited(reference)), _parsed(answer)):
        return True
    words = _words(reference)
    return words is not None and words == _words(answer)


def _delimited(reference: str) -> str:
    """Return a reference in which math-verify sees what is mathematics.

    It reads bare LaTeX as prose, of which it takes a number: of 2\\sqrt{3} the 2. Benchmarks keep answers bare.
    """
    reference = reference.rpartition("####")[2].strip()
    if any(mark in reference.replace(r"\$", "") for mark in _DELIMITERS):
        return reference
    words = _BARE_WORD.findall(_TEXT.sub("", reference))
    prose = len(words) > 1 or (words and any(letter.isdigit() for letter in reference))
    return reference if prose or not reference else rf"\boxed{{{reference}}}"


def _words(text: str) -> str | None:
    """Return the words that are all of an answer, the last boxed one of a text; None where it is more than words."""
    inside = text.rpartition(r"\boxed{")[2].strip().strip("$.").strip()
    if r"\boxed{" in text:
        inside = inside[: _closing(inside)]
    found = _TEXT.fullmatch(inside.strip())
    words = " ".join((found[1] if found else inside).split())
    return words if _ONLY_WORDS.fullmatch(words) else None


def _closing(text: str) -> int:
    """Return the place of the brace that closes a group whose opening one stands before the text; its end if none."""
    depth = 1
    for place, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return place
    return len(text)


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    return parse(_folded(text))


@dataclass(frozen=True)
class Grader:
    """How answers are graded."""

    extract: Callable[[str], str | None]  # answer's text → what is compared; None where there is nothing
    same: Callable[[str, str], bool] | None = None  # (text, reference) → equal; None compares what was extracted
    package: str | None = None  # an optional package that it needs, in the extra `eval`
    expect: Callable[[str], str | None] | None = None  # as `extract`, of a reference; None = `extract`


# name → grader. A new one is a function or two and a line here.
GRADERS: dict[str, Grader] = {
    "number": Grader(number_answer),
    "text": Grader(plain_answer),
    "expression": Grader(_expression, _same_expression, "math_verify", _reference_expression),
}


@dataclass(frozen=True)
class Grade:
    """The grade of one answer: what was extracted from it (None is never correct) and from the reference."""

    correct: bool
    extracted: str | None
    expected: str | None


def grade(text: str, reference: str, grader: str = "number") -> Grade:
    """Grade a text against a reference answer by a grader of GRADERS: `number` (GSM8K's), `text` or `expression`.

    Raises:
        MissingDependencyError: the grader needs a package that is not installed.
    """
    judge = GRADERS[grader]
    check_grader(grader)
    extracted, expected = judge.extract(text), expected_answer(reference, grader)
    if extracted is None or expected is None:
        return Grade(False, extracted, expected)
    correct = extracted == expected if judge.same is None else judge.same(text, reference)
    return Grade(correct, extracted, expected)


def expected_answer(reference: str, grader: str) -> str | None:
    """Return what answers are compared with; None where a reference has nothing to match."""
    judge = GRADERS[grader]
    return (judge.expect or judge.extract)(reference)


def check_grader(grader: str) -> None:
    """Raise MissingDependencyError when a grader's package is not installed."""
    package = GRADERS[grader].package
    if package is not None and importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        raise MissingDependencyError(
            f"grading expressions needs {name}, which is not installed; run: pip install 'unmask[eval]'"
        )


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a share, 0 ≤ low ≤ high ≤ 1."""

    low: float
    high: float


def wilson(right: int, total: int, z: float = _Z) -> Interval:
    """Return Wilson's score interval of a binomial share (Wilson 1927, JASA 22; Brown, Cai & DasGupta 2001, eq. 4).

    Unlike share ± z · √(p(1−p)/n) it stays within [0, 1] and does not vanish at 0 or all right. A total of 0 gives
    [0, 1]; the default z gives 95 %.

    Raises:
        ValueError: `right` outside 0..total.
    """
    if not 0 <= right <= total:
        raise ValueError(f"right must lie in 0..{total}, got {right}")
    if total == 0:
        return Interval(0.0, 1.0)
    share, shrink = right / total, z * z / total
    middle = (share + shrink / 2) / (1 + shrink)
    half = z / (1 + shrink) * math.sqrt(share * (1 - share) / total + shrink / (4 * total))
    # Rounding must not take the ends past what was observed.
    return Interval(max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))
