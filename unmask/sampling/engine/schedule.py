"""How many tokens each call of a block settles, for the rule that counts (LLaDA, generate.py). No torch."""

from __future__ import annotations

from collections.abc import Sequence


def shares(total: int, parts: int) -> tuple[int, ...]:
    """Split `total` into `parts` integers that differ by at most one, the larger ones first."""
    each, more = divmod(total, parts)
    return (each + 1,) * more + (each,) * (parts - more)


def planned_calls(sizes: Sequence[int], steps: int) -> tuple[int, ...]:
    """Return how many calls each block of an answer is planned to take.

    The blocks with something open have steps // blocks calls each, the first ones one more until all are given out, and
    at least one. A call that would settle nothing is left out, since it could not change anything: so there are no more
    of them than open positions.

    Args:
        sizes: open positions of each block at the start; 0 where all are given, and then no call is made.
        steps: calls for the whole answer.
    """
    blocks = sum(size > 0 for size in sizes)
    given_out = iter(shares(steps, blocks) if blocks else ())
    return tuple(min(size, max(1, next(given_out))) if size else 0 for size in sizes)


def quota(size: int, calls: int, step: int) -> int:
    """Return how many positions call number `step` (from 0) of a block settles: size // calls, the first ones one more.

    Over the planned calls the quotas add up to `size`. Calls beyond the plan, which only revised positions ask for,
    settle size // calls.
    """
    return size // calls + (step < size % calls)
