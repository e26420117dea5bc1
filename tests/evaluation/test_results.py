from __future__ import annotations

from unmask.evaluation.results import Comparison, compare


def test_a_comparison_counts_answers_and_judgements_that_differ() -> None:
    def record(row: int, correct: bool, *ids: int) -> dict:
        return {"row": row, "correct": correct, "token_ids": list(ids)}

    first = [record(0, True, 1), record(1, True, 1), record(2, False, 1), record(3, False, 1)]
    second = [record(3, False, 2), record(2, True, 2), record(1, False, 2), record(0, True, 1), record(9, True, 1)]
    assert compare(first, second) == Comparison(rows=4, differing=3, gained=1, lost=1)
