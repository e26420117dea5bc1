"""How a bound that the project promises stands in a table: marked where it is missed."""

from __future__ import annotations


def at_least(value: float, bound: float) -> str:
    """Return `bound ≥ …`, and whether the value misses it."""
    return f"bound ≥ {bound:g}{'' if value >= bound else ', MISSED'}"


def at_most(value: float, bound: float, percent: bool = False) -> str:
    """Return `bound ≤ …`, and whether the value misses it."""
    return f"bound ≤ {f'{bound:.0%}' if percent else f'{bound:g}'}{'' if value <= bound else ', MISSED'}"
