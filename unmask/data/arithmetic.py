"""Arithmetic word problems in GSM8K's answer format, for the quickstart: made here, so nothing is downloaded.

A held-out problem shares its operands and operator (23 + 4, say) with no training problem, whatever names and things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unmask.rng import generator

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")
_THINGS = ("apples", "books", "coins", "cards", "eggs", "pens", "shells", "stamps")
# operator → stories; {n}ame, {t}hings, operands {a} and {b}
_STORIES: dict[str, tuple[str, ...]] = {
    "+": (
        "{n} has {a} {t} and buys {b}. How many now?",
        "{n} finds {a} {t}, then {b} more. How many now?",
    ),
    "-": (
        "{n} has {a} {t} and loses {b}. How many now?",
        "{n} had {a} {t} but sold {b} of them. How many now?",
    ),
}
# First and second operands: every result has two digits, with and without a carry.
FIRST, SECOND = range(20, 91), range(2, 7)


@dataclass(frozen=True)
class Problem:
    """A question and its worked answer, `… a+b = <<a+b=c>>c …` and the result after `####`.

    `key` is (operand, operator, operand): what held-out problems have to themselves.
    """

    key: tuple[int, str, int]
    question: str
    answer: str

    def row(self) -> dict[str, Any]:
        """Return the problem as a chat row."""
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": self.answer},
            ]
        }


def make_problems(train: int, held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Return training problems, whose keys repeat in other stories, and held-out ones, each with a key of its own."""
    random = generator(seed, "quickstart/problems")
    keys = [(a, operator, b) for a in FIRST for operator in _STORIES for b in SECOND]
    order = random.permutation(len(keys))
    held, rest = [keys[i] for i in order[:held_out]], [keys[i] for i in order[held_out:]]
    return (
        [_tell(rest[int(i)], random) for i in random.integers(len(rest), size=train)],
        [_tell(key, random) for key in held],
    )


def _tell(key: tuple[int, str, int], random: np.random.Generator) -> Problem:
    a, operator, b = key
    question = _pick(_STORIES[operator], random)
    words = {"n": _pick(_NAMES, random), "t": _pick(_THINGS, random), "a": a, "b": b}
    result = a + b if operator == "+" else a - b
    sum_ = f"{a}{operator}{b}"
    return Problem(key, question.format(**words), f"{sum_} = <<{sum_}={result}>>{result} {words['t']}\n#### {result}")


def _pick(choices: Sequence[Any], random: np.random.Generator) -> Any:
    return choices[int(random.integers(len(choices)))]
