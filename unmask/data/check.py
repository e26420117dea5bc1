"""Looks at the rows before training: renders and tokenises them as training will, and counts answers with later turns.

So a row of a table, or one that only the chat template refuses, is named before a GPU-hour is spent, not in mid-run.

Later turns are what `dataset.answers: all` costs without causality: a network with bidirectional attention sees the
turns behind an answer while it learns the answer. Where they give it away ("So 7 eggs."), it learns to copy from them,
and has nothing to copy from at inference.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from unmask.data.chat import ChatTemplate
from unmask.data.encode import Dropped, Encode, Visit, count_dropped, count_notes, encoded_ahead
from unmask.data.sources import Rows
from unmask.errors import DataError

_MOST_SECONDS = 60.0  # all rows are checked if that takes less, else a sample of them
_SAMPLE_SECONDS = 10.0
_START_SECONDS = 10.0  # until worker processes are there, which import much
_MOST_WORKERS = 8  # each holds a tokenizer, and what that imports
_TRIAL = 64  # rows whose time tells that of the others
_TICK = 64  # rows between two reports of progress
MOST_ROWS = 2048  # of which later turns are counted, in under a second

Tick = Callable[[int, int], object]  # rows done, rows to do


@dataclass(frozen=True)
class Checked:
    """What a check of the rows found.

    Attributes:
        count: rows checked.
        total: rows of the source.
        seconds: that all of them take, or would take.
        dropped, noted, examples: as in `TrainLoader`.
    """

    count: int
    total: int
    seconds: float
    dropped: Mapping[str, int]
    noted: Mapping[str, int]
    examples: Mapping[str, str]

    @property
    def summary(self) -> str:
        """How many rows were checked, and why not all."""
        if self.count == self.total:
            return f"all {self.total:,} rows rendered and tokenised"
        return (
            f"{self.count:,} of {self.total:,} rows rendered and tokenised, a sample over all of the source; all of "
            f"them would take about {math.ceil(self.seconds / 60):,} min"
        )


def check_rows(rows: Rows, encode: Encode, processes: int = 0, tick: Tick = lambda done, of: None) -> Checked:
    """Encode all rows if that takes less than a minute, else a sample that is spread over the source.

    Args:
        encode: what training encodes rows with; what it remembers need not be encoded again.
        processes: worker processes that may be started, where they save time.
        tick: called now and then.

    Raises:
        DataError: a row is malformed, or the template refuses it, and `on_malformed` is "error".
    """
    total = len(rows)
    stride = -(-total // _TRIAL)
    dropped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    examples: dict[str, str] = {}
    done = 0

    def check(visits: Iterable[Visit], of: int, workers: int, until: float) -> None:
        nonlocal done
        with contextlib.closing(encoded_ahead(encode, visits, workers, 0)) as stream:
            for visit, row in stream:
                done += 1
                if isinstance(row, Dropped):
                    count_dropped(visit.index, row, rows, dropped, examples)
                else:
                    count_notes([(visit.index, row)], rows, noted, examples)
                if done % _TICK == 0:
                    tick(done, max(done, of))
                    if time.monotonic() > until:
                        return

    # 64 rows at a time, each time between those that were checked: wherever it ends, it has been all over the source.
    jump = next(jump for jump in range(int(0.618 * stride), stride + 1) if math.gcd(jump, stride) == 1)
    starts = (number * jump % stride for number in range(stride))
    order = (Visit(0, index, index) for start in starts for index in range(start, total, stride))
    check(islice(order, 1), total, 0, math.inf)  # which also compiles the template
    began = time.monotonic()
    check(islice(order, _TRIAL - 1), total, 0, math.inf)
    each = (time.monotonic() - began) / max(1, done - 1)
    alone, workers = each * total, min(processes, _MOST_WORKERS)
    helped = _START_SECONDS + alone / workers if workers > 1 else math.inf
    if min(alone, helped) > _MOST_SECONDS:
        check(order, int(_SAMPLE_SECONDS / each), 0, began + _SAMPLE_SECONDS)
    else:
        check(order, total, workers if helped < alone else 0, began + _MOST_SECONDS)
    seconds = (time.monotonic() - began) * total / done
    return Checked(done, total, seconds, dropped, noted, examples)


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
