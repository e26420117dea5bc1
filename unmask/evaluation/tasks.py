"""The table of tasks: what `unmask eval --tasks` knows by itself. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# In front of a name: the task of lm-evaluation-harness, also where there is one of ours with that name.
HARNESS = "lm_eval/"


@dataclass(frozen=True)
class Task:
    """One task on a file of questions and answers.

    Attributes:
        kind: `answers` lets the model write and judges it; `likelihood` asks how likely it finds the given answers.
        about: one line for `--help`.
        grader: a key of `grade.GRADERS`; None for likelihoods.
        asks: what stands before a question that is asked as literal text.
        answers: what stands between it and its answer.
        stops: texts that end an answer to literal text: there is no turn to end.
    """

    kind: Literal["answers", "likelihood"]
    about: str
    grader: str | None = None
    asks: str = "Question: "
    answers: str = "\nAnswer:"
    stops: tuple[str, ...] = ("Question:", "\n\n\n")


# name → task. A new one is a line here.
TASKS: dict[str, Task] = {
    "gsm8k": Task("answers", "exact match of the number after ####, otherwise of the last number", "number"),
    "math": Task("answers", "expressions, compared by math-verify", "expression", "Problem: ", "\nSolution:",
                 ("Problem:", "\n\n\n")),
    "text": Task("answers", "exact match of the whole answer, runs of blanks as one", "text"),
    "likelihood": Task("likelihood", "nats a token of the given answers"),
}  # fmt: skip


def near_miss(name: str) -> str | None:
    """Return the task of ours that a name is a misspelling of, one character or so away; None if of none."""
    near = difflib.get_close_matches(name, [own for own in TASKS if abs(len(own) - len(name)) <= 1], n=1, cutoff=0.8)
    return near[0] if near and name not in TASKS else None


def split_names(words: Iterable[str]) -> list[str]:
    """Return the names of a list whose entries may hold several, separated by commas, each once."""
    names = [name.strip() for word in words for name in word.split(",")]
    return list(dict.fromkeys(name for name in names if name))
