"""Rows that were encoded are remembered: a small data set is passed over many times, and rendering costs each time."""

from __future__ import annotations

from collections.abc import Callable

from unmask.data.encode import Dropped, EncodedRow

MOST_BYTES = 2**26
_ROW_BYTES = 512  # of a row's objects beside its numbers


class RememberedRows:
    """Gives what `encode` gives; a row that trains and that it was asked for before it does not encode again.

    When its memory is full it stays as it is: rows come in a new order each epoch, so the ones that it has are as good
    as any, while making room for the newest would throw each one out before its turn comes.

    Args:
        encode: a function of the row's index alone.
        most_bytes: of rows that are kept.
    """

    def __init__(self, encode: Callable[[int], EncodedRow | Dropped], most_bytes: int = MOST_BYTES) -> None:
        self._encode = encode
        self._left = most_bytes
        self._rows: dict[int, EncodedRow] = {}

    def __call__(self, index: int) -> EncodedRow | Dropped:
        """Return row `index` as tokens; what `encode` raises is raised."""
        if index in self._rows:
            return self._rows[index]
        row = self._encode(index)
        if isinstance(row, EncodedRow):
            self._left -= row.input_ids.nbytes + row.supervised.nbytes + _ROW_BYTES
            if self._left >= 0:
                self._rows[index] = row
        return row
