"""Runs of neighbouring rows that attend together: the keys a row has room for but does not have cost what real ones do.

A batch of prompts of unlike length is as wide as the longest. On a CPU, where starting a kernel is cheap, several
narrower calls are faster; rows stay where they are, so that nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Keys whose attention takes about as long as starting a kernel (32 queries of 8 heads of 64, two cores of an EPYC).
_CALL = 48
# The longest run that is looked at, so that a batch of a thousand rows is divided in no time.
_LONGEST = 64


@dataclass(frozen=True)
class KeyRun:
    """Some rows and the keys that they attend to.

    Attributes:
        rows: neighbouring rows.
        keys: columns that the longest of them has.
        mask: bool (K, 1, 1, keys) of K rows, True = attend; None = all.
    """

    rows: slice
    keys: int
    mask: Tensor | None


def key_runs(lengths: Sequence[int]) -> tuple[KeyRun, ...]:
    """Divide rows of these many keys, each at least 1, into runs so that the whole costs least; all in order."""
    runs = []
    for rows in _split(tuple(lengths)):
        own_K = torch.tensor(lengths[rows])
        keys = int(own_K.max())
        ragged = int(own_K.min()) < keys
        runs.append(KeyRun(rows, keys, (torch.arange(keys) < own_K[:, None])[:, None, None] if ragged else None))
    return tuple(runs)


@lru_cache(maxsize=256)
def _split(lengths: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the cheapest runs; of equally cheap splits the one with fewer."""
    # Of the first n rows: the least cost, the number of runs, and where the last one starts.
    best = [(0, 0, 0)]
    for end in range(1, len(lengths) + 1):
        longest, choices = 0, []
        for start in reversed(range(max(0, end - _LONGEST), end)):
            longest = max(longest, lengths[start])
            choices.append((best[start][0] + (end - start) * longest + _CALL, best[start][1] + 1, start))
        best.append(min(choices))
    runs: list[slice] = []
    end = len(lengths)
    while end:
        start = best[end][2]
        runs.append(slice(start, end))
        end = start
    return tuple(reversed(runs))
