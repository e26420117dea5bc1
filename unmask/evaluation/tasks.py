"""What `unmask eval` measures on a file: the table of tasks, and the questions read from the rows. Needs no torch.

A row has one of the formats that training reads, or a pair of columns, recognised by their names or named by the
caller. The last answer that may be learned is the reference.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from unmask.data.conversation import Conversation, Message, RowProblem
from unmask.data.formats import FORMATS, NO_COLUMNS, Columns, read_conversation
from unmask.data.keys import is_blank, read_object
from unmask.errors import DataError
from unmask.parsing import ParseProblem, parse_json
from unmask.places import user_path

if TYPE_CHECKING:
    from unmask.data.sources import Rows

# Prefix of a task of lm-evaluation-harness, also where there is one of ours with that name.
HARNESS = "lm_eval/"


@dataclass(frozen=True)
class Task:
    """One task on a file of questions and answers."""

    kind: Literal["answers", "likelihood"]  # samples answers and grades them, or scores the reference answers
    about: str  # one line for `--help`
    grader: str | None = None  # a key of `grade.GRADERS`; None for likelihoods
    asks: str = "Question: "  # precedes a question asked as literal text
    answers: str = "\nAnswer:"  # stands between it and its answer
    stops: tuple[str, ...] = ("Question:", "\n\n\n")  # for literal text, which has no end of turn


# name → task. A new one is a line here.
TASKS: dict[str, Task] = {
    "gsm8k": Task("answers", "exact match of the number after ####, otherwise of the last number", "number"),
    "math": Task("answers", "expressions, compared by math-verify", "expression", "Problem: ", "\nSolution:",
                 ("Problem:", "\n\n\n")),
    "text": Task("answers", "exact match of the whole answer, runs of blanks as one", "text"),
    "likelihood": Task("likelihood", "nats a token of the given answers"),
}  # fmt: skip


def near_miss(name: str) -> str | None:
    """Return the task of ours that a name misspells by about one character; None if none."""
    near = difflib.get_close_matches(name, [own for own in TASKS if abs(len(own) - len(name)) <= 1], n=1, cutoff=0.8)
    return near[0] if near and name not in TASKS else None


def split_names(words: Iterable[str]) -> list[str]:
    """Return the names in a list whose entries may hold several, separated by commas, each once."""
    names = [name.strip() for word in words for name in word.split(",")]
    return list(dict.fromkeys(name for name in names if name))


# Pairs of columns, in the order in which a row without messages is searched for them.
COLUMN_PAIRS = (
    Columns("question", "answer"),
    Columns("prompt", "completion"),
    Columns("problem", "answer"),
    Columns("problem", "solution"),
)


@dataclass(frozen=True)
class Question:
    """One question: chat turns before the answer, or literal text without a chat template; and its answer."""

    prompt: tuple[Message, ...] | str
    reference: str
    label: str = ""  # what messages call it: `file:line`
    unread: tuple[str, ...] = ()  # keys of its row that nothing reads

    def as_prompt(self) -> str | list[dict]:
        """Return the prompt as `unmask.generate` takes it."""
        return self.prompt if isinstance(self.prompt, str) else [message.as_dict() for message in self.prompt]


def read_questions(
    path: str | Path, limit: int | None = None, columns: Columns = NO_COLUMNS, where: str = "--data"
) -> list[Question]:
    """Read the questions of a JSONL file, or the first `limit` of them.

    Where `columns` names no pair, a row has one of training's formats, or the first of COLUMN_PAIRS that it holds.
    `where` is the flag that named the file, for messages.

    Raises:
        DataError: no such file, no rows, or a row without a question and an answer, with its file and line.
    """
    path = user_path(path, where)
    questions: list[Question] = []
    try:
        for label, row in _rows(path):
            if limit is not None and len(questions) >= limit:
                break
            try:
                found = columns if columns.prompt is not None else _columns_of(row, columns)
                questions.append(_question(read_conversation(row, found), label))
            except RowProblem as error:
                other = "its" if columns.prompt is None else "other"
                remedy = f"fix the row, or name {other} columns with --prompt-column and --completion-column"
                if error.key is not None:
                    remedy = f"fix the row, or leave the key out with --ignore-keys {error.key}"
                raise DataError(f"{label}: {error}; {remedy}") from None
    except OSError as error:
        raise DataError(f"{where}: {path.absolute()} cannot be read ({error.strerror or error})") from None
    if not questions:
        raise DataError(f"{where}: {path} has no rows; give a JSONL file with questions and answers")
    return questions


def questions_of(rows: Rows, limit: int | None, skip_malformed: bool = False) -> list[Question]:
    """Return the questions of the first rows of a data set; one that asks nothing is a DataError, or left out."""
    questions = []
    for index in range(len(rows) if limit is None else min(limit, len(rows))):
        label = rows.describe(index)
        try:
            questions.append(_question(rows[index], label))
        except (RowProblem, DataError) as error:
            if skip_malformed:
                continue
            raise error if isinstance(error, DataError) else DataError(f"{label}: {error}; remove the row") from None
    return questions


def unread_keys(questions: Sequence[Question]) -> list[str]:
    """Return a line for each key that rows have and nothing reads: how many, and the first."""
    counts = Counter(key for question in questions for key in question.unread)
    firsts = {key: next(one.label for one in questions if key in one.unread) for key in counts}
    return [f"{n} rows have the key {key!r}, which nothing reads (first: {firsts[key]})" for key, n in counts.items()]


def refuse_leaks(questions: Sequence[Question], shots: Sequence[Question]) -> None:
    """Raise DataError for a question that is also a worked example: its answer would stand in its prompt."""
    shown = {" ".join(_asked(shot).split()): shot.label for shot in shots}
    for question in questions:
        label = shown.get(" ".join(_asked(question).split()))
        if label is not None:
            raise DataError(
                f"--shots_file: {label} is the question of {question.label} too, so its answer would be shown; "
                "take the examples from other data, as a training split"
            )


def with_shots(questions: Sequence[Question], shots: Sequence[Question]) -> list[Question]:
    """Put worked examples before each chat question, as earlier turns; a system turn of the question stays first."""
    before = tuple(turn for shot in shots for turn in (*_turns(shot), Message("assistant", shot.reference)))

    def shown(question: Question) -> Question:
        systems = tuple(turn for turn in _turns(question, systems=True) if turn.role == "system")
        return replace(question, prompt=(*systems, *before, *_turns(question)))

    return [shown(question) for question in questions]


def as_text(questions: Sequence[Question], shots: Sequence[Question], asks: str, answers: str) -> list[Question]:
    """Write each question as literal text after worked examples, for base models; `asks` and `answers` as in `Task`.

    Turns of a question are joined by line breaks.
    """
    before = "".join(f"{asks}{_asked(shot)}{answers} {shot.reference}\n\n" for shot in shots)
    return [replace(question, prompt=f"{before}{asks}{_asked(question)}{answers}") for question in questions]


def _question(conversation: Conversation, label: str) -> Question:
    if conversation.tools:
        raise RowProblem("the row has 'tools', and questions are asked without any", "tools")
    turns = list(conversation.messages)
    while turns and (turns[-1].role != "assistant" or turns[-1].supervised is False):
        turns.pop()
    if len(turns) < 2:
        raise RowProblem("nothing is asked before the assistant's turn")
    if is_blank(turns[-1].content):
        raise RowProblem("its answer is a call of a tool, without text")
    return Question(tuple(turns[:-1]), turns[-1].content, label, conversation.unread)


def _turns(question: Question, systems: bool = False) -> tuple[Message, ...]:
    assert not isinstance(question.prompt, str), "literal text has no turns"
    return tuple(turn for turn in question.prompt if systems or turn.role != "system")


def _asked(question: Question) -> str:
    return "\n".join(turn.content for turn in _turns(question, systems=True))


def _columns_of(row: object, columns: Columns) -> Columns:
    if not isinstance(row, dict) or columns.format_of(row) is not None:
        return columns
    for pair in COLUMN_PAIRS:
        if pair.prompt in row and pair.completion in row:
            return pair._replace(ignore=columns.ignore)
    pairs = [*COLUMN_PAIRS, *(Columns(*format.keys) for format in FORMATS if len(format.keys) == 2)]
    shown = ", ".join(dict.fromkeys(f"{pair.prompt}/{pair.completion}" for pair in pairs))
    names = ", ".join(repr(name) for name in list(row)[:8]) or "nothing"
    raise RowProblem(f"neither messages nor a pair of columns {shown}, the row has {names}")


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            label = f"{path}:{number}"
            try:
                yield label, parse_json(line, read_object, strict=False)
            except RowProblem as problem:
                raise DataError(f"{label}: {problem}; keep one of them") from None
            except ParseProblem as error:
                raise DataError(
                    f"{label}: not JSON in UTF-8 ({error}); give a file of one JSON object a line"
                ) from None
