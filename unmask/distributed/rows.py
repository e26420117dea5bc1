"""Rows of work divided among ranks, and their results brought together again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from unmask.distributed.ranks import Ranks

Row = TypeVar("Row", bound=Hashable)
Result = TypeVar("Result")


def own_rows(rows: Sequence[Hashable], ranks: Ranks) -> list[int]:
    """Return the indices of this rank's rows, in their order.

    Equal rows go to one rank: what is drawn for a row may depend on how often it came before.
    """
    numbers: dict[Hashable, int] = {}
    for row in rows:
        numbers.setdefault(row, len(numbers))
    return [index for index, row in enumerate(rows) if numbers[row] % ranks.size == ranks.rank]


def divide_rows(
    rows: Sequence[Row],
    ranks: Ranks,
    function: Callable[[list[Row]], Sequence[Result]],
    together: AbstractContextManager = nullcontext(),  # noqa: B008 - has no state
) -> list[Result]:
    """Return a result for each row, computed by the rank whose row it is; the same list on every rank.

    Args:
        rows: all of them, equal on every rank.
        ranks: all of them; a collective.
        function: gives a picklable result for each of some rows; not called for none.
        together: a context for `function` that all ranks enter, those without rows too (`answering.load_for_answers`).
    """
    own = own_rows(rows, ranks)
    with together:
        found = list(zip(own, function([rows[index] for index in own]), strict=True)) if own else []
    results = {index: result for part in ranks.gather(found) for index, result in part}
    return [results[index] for index in range(len(rows))]
