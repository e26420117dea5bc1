"""How many answers are trained with later turns in sight: what `dataset.answers: all` costs without causality.

A network with bidirectional attention sees the turns behind an answer while it learns the answer. Where they give it
away ("So 7 eggs."), it learns to copy from them, and has nothing to copy from when it is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from unmask.data.chat import ChatTemplate
from unmask.data.sources import Rows
from unmask.errors import DataError

MOST_ROWS = 2048  # under a second


@dataclass(frozen=True)
class LaterTurns:
    """A count over rows evenly spread over the data; malformed ones have no answers.

    Attributes:
        rows: how many were looked at.
        answers: how many of theirs are supervised.
        followed: how many of these have a later supervised answer in their text, and so all turns between.
    """

    rows: int
    answers: int
    followed: int


def count_later_turns(rows: Rows, template: ChatTemplate, most_rows: int = MOST_ROWS) -> LaterTurns:
    """Count over all rows, or over about `most_rows` of them if there are more."""
    answers, looked_at = [], range(0, len(rows), -(-len(rows) // most_rows))
    for index in looked_at:
        try:
            row = rows[index]
            answers.append(len(template.with_tools(row.tools).answers(row.messages)))
        except DataError:
            continue  # what is wrong with it is said where it is trained on
    return LaterTurns(len(looked_at), sum(answers), sum(count - 1 for count in answers if count))
