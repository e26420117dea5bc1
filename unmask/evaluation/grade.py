"""Grading answers in GSM8K's format: the result stands after `####` (Cobbe et al. 2021, arXiv 2110.14168, appendix)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_RESULT = re.compile(r"####\s*(-?[0-9.,]+)")


def final_answer(text: str) -> str | None:
    """Return the number after the first `####` without commas and trailing dots, or None when there is none."""
    found = _RESULT.search(text)
    if found is None:
        return None
    return found[1].replace(",", "").rstrip(".") or None


def exact_match(texts: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of texts whose final answer equals the reference's, from 0 to 1.

    Args:
        texts: what the model wrote.
        references: worked answers that end in `#### result`; as many, at least one.
    """
    right = [
        final_answer(text) is not None and final_answer(text) == final_answer(reference)
        for text, reference in zip(texts, references, strict=True)
    ]
    return sum(right) / len(right)
