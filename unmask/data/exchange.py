"""Rows for several ranks, each row encoded (tokenised) by one of them and sent to all."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from itertools import islice, tee
from typing import Any

from unmask.data.encode import Dropped, Encode, EncodedRow, Visit, encoded_ahead
from unmask.errors import DataError

Gather = Callable[[Any], list[Any]]  # a collective: a value of this rank → the values of all, in the order of ranks


def encoded_together(
    encode: Encode, visits: Iterable[Visit], num_workers: int, chunk: int, rank: int, gather: Gather, size: int
) -> Generator[tuple[Visit, EncodedRow | Dropped]]:
    """Yield each visit with its row, in the order of the visits, the same on every rank.

    A row is encoded by rank index % size, in each epoch, so that a rank finds the rows of its share in its cache again.

    Args:
        encode, num_workers: as in `encoded_ahead`, for this rank's share.
        visits: equal on all ranks; may be endless.
        chunk: visits whose rows are exchanged in one collective; workers may be as many rows ahead.
        gather: exchanges the rows. As it is a collective, all ranks take equally many rows from this generator.
        size: number of ranks.

    Raises:
        DataError: `encode` raised it on any rank; raised on all ranks, at the visit of that row.
    """
    if size == 1:
        yield from encoded_ahead(encode, visits, num_workers, chunk)
        return
    all_visits, for_share = tee(visits)
    share = encoded_ahead(encode, (visit for visit in for_share if visit.index % size == rank), num_workers, chunk)
    while visited := list(islice(all_visits, chunk)):
        rows, problem = _next_rows(share, sum(visit.index % size == rank for visit in visited))
        parts = gather((rows, problem))
        streams = [iter(theirs) for theirs, _ in parts]
        for visit in visited:
            row = next(streams[visit.index % size], None)
            if row is None:  # raised only here, so that the rows before the bad one are trained on, as with one rank
                raise DataError(parts[visit.index % size][1])
            yield visit, row


def _next_rows(
    share: Generator[tuple[Visit, EncodedRow | Dropped]], count: int
) -> tuple[list[EncodedRow | Dropped], str | None]:
    """Return the next rows of a rank's share, and None; up to one that cannot be encoded, the rows before and why."""
    rows: list[EncodedRow | Dropped] = []
    try:
        for _, row in islice(share, count):
            rows.append(row)
    except DataError as error:
        return rows, str(error)
    return rows, None
