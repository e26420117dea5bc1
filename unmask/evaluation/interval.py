"""How far a share of right answers may be from the truth, given how few questions there were."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Two-sided 95 % quantile of the normal distribution.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a share, 0 ≤ low ≤ high ≤ 1."""

    low: float
    high: float


def wilson(right: int, total: int, z: float = _Z) -> Interval:
    """Return Wilson's score interval of a binomial share (Wilson 1927, JASA 22; Brown, Cai & DasGupta 2001, eq. 4).

    Unlike share ± z · √(p(1−p)/n) it keeps within [0, 1] and does not shrink to nothing at 0 or all right.

    Args:
        right: number of right answers, 0..total.
        total: number of questions; 0 gives [0, 1], since nothing is known.
        z: quantile; the default gives 95 %.

    Raises:
        ValueError: `right` outside 0..total.
    """
    if not 0 <= right <= total:
        raise ValueError(f"right must lie in 0..{total}, got {right}")
    if total == 0:
        return Interval(0.0, 1.0)
    share, shrink = right / total, z * z / total
    middle = (share + shrink / 2) / (1 + shrink)
    half = z / (1 + shrink) * math.sqrt(share * (1 - share) / total + shrink / (4 * total))
    # Rounding must not take the ends past what was observed.
    return Interval(max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))
