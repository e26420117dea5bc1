"""Which rows of a batch go through the network together: padding costs what real positions cost. No torch."""

from __future__ import annotations

from functools import lru_cache

# Positions whose computation takes about as long as starting one more forward and reading the weights again.
_FORWARD = 128


@lru_cache(maxsize=256)
def length_groups(lengths: tuple[int, ...], forward: int = _FORWARD) -> tuple[tuple[int, ...], ...]:
    """Split rows into groups, each to be padded to its longest row, so that the whole costs least.

    Args:
        lengths: positions of each row.
        forward: what a group costs beside its positions, padding included, in positions.

    Returns:
        the indices of each group, rising; groups by rising length. Of equally cheap splits the one with fewer groups.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    # Of the first n rows in this order: the least cost, the number of groups, and where the last group starts.
    best = [(0, 0, 0)]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best.append(
            min((best[start][0] + (end - start) * longest + forward, best[start][1] + 1, start) for start in range(end))
        )
    groups: list[tuple[int, ...]] = []
    end = len(order)
    while end:
        start = best[end][2]
        groups.append(tuple(sorted(order[start:end])))
        end = start
    return tuple(reversed(groups))
