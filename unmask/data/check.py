"""A check of the rows before training: each is rendered and tokenised as training will do it.

So a row of a table, or one that only the chat template refuses, is named before a GPU-hour is spent, not in mid-run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from unmask.data.encode import Dropped, Encode, Visit, count_notes, encoded_ahead
from unmask.data.sources import Rows

_MOST_SECONDS = 60.0  # all rows are checked if that takes less, else a sample of them
_SAMPLE_SECONDS = 10.0
_START_SECONDS = 10.0  # until worker processes are there, which import much
_MOST_WORKERS = 8  # each holds a tokenizer, and what that imports
_TRIAL = 64  # rows whose time tells that of the others
_TICK = 64  # rows between two reports of progress

Tick = Callable[[int, int], object]  # rows done, rows to do


@dataclass(frozen=True)
class Checked:
    """What a check of the rows found.

    Attributes:
        count: rows checked.
        total: rows of the source.
        seconds: that checking all of them would take.
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
            f"them would take {self.seconds / 60:,.0f} min"
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
    dropped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    examples: dict[str, str] = {}
    done = 0

    def check(indices: Iterable[int], of: int, workers: int = 0) -> None:
        nonlocal done
        for visit, row in encoded_ahead(encode, (Visit(0, index, index) for index in indices), workers, 0):
            done += 1
            if isinstance(row, Dropped):
                dropped[row.reason] += 1
                examples.setdefault(row.reason, row.detail or rows.describe(visit.index))
            else:
                count_notes([(visit.index, row)], rows, noted, examples)
            if done % _TICK == 0:
                tick(done, of)

    trial = range(0, total, -(-total // _TRIAL))
    check(trial[:1], total)  # which also compiles the template
    began = time.monotonic()
    check(trial[1:], total)
    each = (time.monotonic() - began) / max(1, len(trial) - 1)
    left = total - len(trial)
    workers = min(processes, _MOST_WORKERS)
    alone, helped = each * left, _START_SECONDS + each * left / max(1, workers)
    seconds = min(alone, helped) if workers > 1 else alone
    step = 1 if seconds <= _MOST_SECONDS else -(-left // max(1, int(_SAMPLE_SECONDS / each)))
    rest = (index for index in range(total) if index % trial.step)
    check(islice(rest, 0, None, step), len(trial) + -(-left // step), workers if step == 1 and seconds < alone else 0)
    return Checked(done, total, seconds, dropped, noted, examples)
