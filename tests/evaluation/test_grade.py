"""Grading in GSM8K's format."""

from __future__ import annotations

import pytest

from unmask.evaluation.grade import exact_match, final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24 clips\n#### 24", "24"),
        ("#### 1,234", "1234"),
        ("#### -5.", "-5"),
        ("####7 and then #### 8", "7"),
        ("#### 0.5", "0.5"),
        ("no mark 24", None),
        ("#### none", None),
        ("#### ,", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_exact_match_counts_only_equal_results() -> None:
    assert exact_match(["#### 1", "#### 2", "2", "#### 1,000"], ["#### 1", "#### 3", "#### 2", "#### 1000"]) == 0.5
