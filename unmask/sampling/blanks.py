"""Blanks in a text: `{blank:N}` is N tokens, `{blank:A-B}` from A to B of them. No torch.

`{{blank:N}}` is the text `{blank:N}` itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from unmask.errors import SamplingError

_BLANK = re.compile(r"\{\{(blank(?::[^{}]*)?)\}\}|\{blank(?::([^{}]*))?\}")
_LENGTH = re.compile(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?")
# Blanks of unknown length in a text → lengths tried of each; each combination is sampled.
_TRIED = {0: 1, 1: 8, 2: 4, 3: 2}


@dataclass(frozen=True)
class Blank:
    """A gap of `low` to `high` tokens, both included."""

    low: int
    high: int


def has_blank(text: str) -> bool:
    """Say whether a blank is written in a text."""
    return any(found.group(1) is None for found in _BLANK.finditer(text))


def parse(text: str, where: str) -> list[str | Blank]:
    """Return a text as pieces: blanks and what stands between them, which may be empty.

    Args:
        text: with at least one blank.
        where: what messages call it.

    Raises:
        SamplingError: no blank, one without a length of at least 1, or more than three of unknown length.
    """
    pieces: list[str | Blank] = [""]
    at = 0
    for found in _BLANK.finditer(text):
        before = text[at : found.start()]
        at = found.end()
        if found.group(1) is not None:
            pieces[-1] = f"{pieces[-1]}{before}{{{found.group(1)}}}"
            continue
        pieces[-1] = f"{pieces[-1]}{before}"
        pieces += [_blank(found.group(), found.group(2), where), ""]
    pieces[-1] = f"{pieces[-1]}{text[at:]}"
    blanks = [piece for piece in pieces if isinstance(piece, Blank)]
    if not blanks:
        raise SamplingError(f"{where}: there is no blank in it; write {{blank:N}} where N tokens are to be filled in")
    unknown = sum(blank.low < blank.high for blank in blanks)
    if unknown not in _TRIED:
        raise SamplingError(
            f"{where}: {unknown} blanks of unknown length are too many to try; give at most {max(_TRIED)} as "
            "{blank:A-B} and the others a length"
        )
    return pieces


def _blank(written: str, inside: str | None, where: str) -> Blank:
    found = _LENGTH.fullmatch(inside or "")
    low, high = (int(found.group(1)), int(found.group(2) or found.group(1))) if found else (0, 0)
    if low < 1 or high < low:
        raise SamplingError(
            f"{where}: {written} needs a length of 1 to 999999999 tokens, as {{blank:4}}, or a range, as "
            f"{{blank:2-6}}; for this text itself write {{{written}}}"
        )
    return Blank(low, high)


def lengths_to_try(blanks: Sequence[Blank]) -> list[tuple[int, ...]]:
    """Return the combinations of lengths to sample, one length a blank in each.

    Of one blank of unknown length every length is tried, or eight spread over its range; of two, four of each; of
    three, two of each.
    """
    most = _TRIED[sum(blank.low < blank.high for blank in blanks)]
    return list(product(*(spread(blank.low, blank.high, most) for blank in blanks)))


def spread(low: int, high: int, most: int) -> list[int]:
    """Return the integers from `low` to `high`, or `most` of them, evenly spread with both ends."""
    if high - low < most:
        return list(range(low, high + 1))
    return [low + round(number * (high - low) / (most - 1)) for number in range(most)]
