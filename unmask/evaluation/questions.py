"""The questions of an evaluation: rows of a JSONL file, each with what is asked and the worked answer that is wanted.

A row is a chat (`messages` or `conversations`; its last assistant turn is the answer), or a pair of columns. Which pair
is seen from the row itself, or named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unmask.data.conversation import Columns, Message, RowProblem, read_conversation
from unmask.errors import DataError

# What a row without messages may hold, in the order in which it is looked for.
COLUMN_PAIRS = (
    Columns("question", "answer"),
    Columns("prompt", "completion"),
    Columns("problem", "answer"),
    Columns("problem", "solution"),
)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: chat turns up to where the answer starts, or literal text that takes no chat template.
        reference: the worked answer.
        place: where it was read, as `file:line`.
    """

    prompt: tuple[Message, ...] | str
    reference: str
    place: str = ""

    def as_prompt(self) -> str | list[dict]:
        """Return the prompt as `unmask.generate` takes it."""
        return self.prompt if isinstance(self.prompt, str) else [message.as_dict() for message in self.prompt]


def read_questions(
    path: str | Path, limit: int | None = None, columns: Columns | None = None, where: str = "--data"
) -> list[Question]:
    """Read the questions of a JSONL file.

    Args:
        path: the file.
        limit: read the first rows only; None = all.
        columns: the prompt and completion columns; None = as the row itself shows: messages, or one of COLUMN_PAIRS.
        where: the flag or field that named the file, for messages.

    Raises:
        DataError: no such file, no rows, or a row without a question and an answer, with its file and line.
    """
    path = Path(path).expanduser()
    questions: list[Question] = []
    try:
        for place, row in _rows(path):
            if limit is not None and len(questions) >= limit:
                break
            try:
                questions.append(_question(row, place, columns))
            except RowProblem as error:
                raise DataError(f"{place}: {error}; {_remedy(columns)}") from None
    except OSError as error:
        raise DataError(f"{where}: {path.absolute()} cannot be read ({error.strerror or error})") from None
    if not questions:
        raise DataError(f"{where}: {path} has no rows; give a JSONL file with questions and answers")
    return questions


def refuse_leaks(questions: Sequence[Question], shots: Sequence[Question]) -> None:
    """Raise DataError for a question that is also a worked example: its answer would stand in its prompt."""
    shown = {" ".join(_asked(shot).split()): shot.place for shot in shots}
    for question in questions:
        place = shown.get(" ".join(_asked(question).split()))
        if place is not None:
            raise DataError(
                f"--shots_file: {place} is the question of {question.place} too, so its answer would be shown; "
                "take the examples from other data, as a training split"
            )


def with_shots(questions: Sequence[Question], shots: Sequence[Question]) -> list[Question]:
    """Put worked examples before each chat question, as earlier turns of the same conversation.

    A system turn of the question stays first; those of the examples are left out.
    """
    before = tuple(turn for shot in shots for turn in (*_turns(shot), Message("assistant", shot.reference)))

    def shown(question: Question) -> Question:
        turns = _turns(question, systems=True)
        systems = tuple(turn for turn in turns if turn.role == "system")
        return replace(question, prompt=(*systems, *before, *(turn for turn in turns if turn.role != "system")))

    return [shown(question) for question in questions]


def as_text(questions: Sequence[Question], shots: Sequence[Question], asks: str, answers: str) -> list[Question]:
    """Write each question as literal text after worked examples, for models that know no chat.

    Args:
        questions: chat questions of one user turn (further turns are joined by line breaks).
        shots: worked examples, possibly none.
        asks: what stands before a question, such as `Question: `.
        answers: what stands between a question and its answer, such as a line break and `Answer:`.
    """
    before = "".join(f"{asks}{_asked(shot)}{answers} {shot.reference}\n\n" for shot in shots)
    return [replace(question, prompt=f"{before}{asks}{_asked(question)}{answers}") for question in questions]


def _turns(question: Question, systems: bool = False) -> tuple[Message, ...]:
    assert not isinstance(question.prompt, str), "literal text has no turns"
    return tuple(turn for turn in question.prompt if systems or turn.role != "system")


def _asked(question: Question) -> str:
    return "\n".join(turn.content for turn in _turns(question, systems=True))


def _question(row: object, place: str, columns: Columns | None) -> Question:
    turns = list(read_conversation(row, columns or _columns_of(row)).messages)
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if len(turns) < 2:
        raise RowProblem("nothing is asked before the assistant's turn")
    if not turns[-1].content.strip():
        raise RowProblem("its answer is empty")
    return Question(tuple(turns[:-1]), turns[-1].content, place)


def _columns_of(row: object) -> Columns:
    if not isinstance(row, dict) or "messages" in row or "conversations" in row:
        return Columns()
    for pair in COLUMN_PAIRS:
        if pair.prompt in row and pair.completion in row:
            return pair
    pairs = ", ".join(f"{pair.prompt}/{pair.completion}" for pair in COLUMN_PAIRS)
    names = ", ".join(repr(name) for name in list(row)[:8]) or "nothing"
    raise RowProblem(f"neither messages nor a pair of columns {pairs}, the row has {names}")


def _remedy(columns: Columns | None) -> str:
    if columns is None:
        return "fix the row, or name its columns with --prompt-column and --completion-column"
    return "fix the row, or name other columns with --prompt-column and --completion-column"


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                yield place, json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise DataError(
                    f"{place}: not JSON in UTF-8 ({error}); give a file of one JSON object a line"
                ) from None
