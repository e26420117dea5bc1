from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from unmask.data.encode import Dropped, EncodedRow, RememberedRows, Visit, encoded_ahead
from unmask.errors import DataError


class Source:
    """Rows of `index` tokens, 9 bytes each; row 0 is dropped. Counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: Counter[int] = Counter()

    def __call__(self, index: int, epoch: int) -> EncodedRow | Dropped:
        self.asked[index] += 1
        if index == 0:
            return Dropped("empty")
        if index < 0:
            raise DataError("no such row")
        return EncodedRow(np.arange(index), np.ones(index, dtype=bool))


def tokens(row: EncodedRow | Dropped) -> list[int]:
    assert isinstance(row, EncodedRow)
    return row.input_ids.tolist()


def test_a_row_is_encoded_once() -> None:
    source = Source()
    rows = RememberedRows(source)
    assert [tokens(rows(index, 0)) for index in (3, 5, 3, 5)] == [tokens(source(index, 0)) for index in (3, 5, 3, 5)]
    assert source.asked == {3: 3, 5: 3}  # two of them by the line above


def test_a_full_memory_keeps_what_it_has() -> None:
    source = Source()
    rows = RememberedRows(source, most_bytes=2 * 512 + 9 * 8)
    for index in (3, 5, 1, 3, 5, 1):
        assert len(tokens(rows(index, 0))) == index
    assert source.asked == {3: 1, 5: 1, 1: 2}


def test_a_dropped_row_is_dropped_again_and_an_error_raised_again() -> None:
    rows = RememberedRows(Source())
    assert rows(0, 0) == rows(0, 1) == Dropped("empty")
    for _ in range(2):
        with pytest.raises(DataError, match="no such row"):
            rows(-1, 0)


def test_the_second_epoch_of_a_loader_costs_no_encoding() -> None:
    source = Source()
    visits = [Visit(epoch, place, 2) for epoch in range(3) for place in range(2)]
    found = list(encoded_ahead(RememberedRows(source), visits, 0, 4))
    assert len(found) == 6 and source.asked == {2: 1}
